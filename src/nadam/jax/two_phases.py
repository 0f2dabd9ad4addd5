"""`fused` in the two phases of optax: it gives updates, which are applied elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp


def two_phases(init: Callable[[Any], Any], step: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """A gradient transformation whose updates are the way from the old parameters to the new ones."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, loss_scale: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params: fused needs them: update(updates, state, params)")
        new, state = step(updates, state, params, learning_rate=learning_rate, loss_scale=loss_scale)
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformationExtraArgs(init, update)
