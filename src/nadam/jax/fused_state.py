"""The state of `fused`: what is in it, and whether it is of these settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import StepReport
from nadam.jax.checks import check_trainable
from nadam.jax.trees import beside, compute_dtype, scalar_dtype

LAST_COUNT = 2**31 - 1  # where int32 ends
# Fields that are like the parameters, or None, in the order in which a tensor has them.
LIKE_PARAMS = ("mu", "nu", "ema", "accumulator")


class FusedState(NamedTuple):
    """State of `fused`: a tree of arrays, whose structure depends on the settings alone.

    Attributes:
        count: int32, calls so far, without those that were skipped; at ``2**31 - 1`` it stays.
        mu: First moments, not bias-corrected; a tree like the parameters.
        nu: Second moments, likewise.
        mu_product: Product of the momenta of all updates so far.
        ema: Moving averages of the parameters, with ``use_ema``.
        accumulator: Sums of gradients, with ``gradient_accumulation_steps``.
        last_step: What the last call did; without what the settings do not ask for.
        beyond: int32, calls since ``count`` stays, modulo those after which accumulation and overwriting are where they
            were: so both go on. Schedules see ``count``.
    """

    count: Any
    mu: Any
    nu: Any
    mu_product: Any
    ema: Any
    accumulator: Any
    last_step: StepReport
    beyond: Any


def check_state(h: Hyperparameters, state: Any) -> None:
    """That a state is one of `fused` with such settings."""
    if not isinstance(state, FusedState):
        raise ValueError(f"state: {type(state).__name__}, expected the FusedState that init gives")
    parts = {
        "ema": (state.ema, h.use_ema),
        "accumulator": (state.accumulator, h.gradient_accumulation_steps is not None),
        "last_step.grad_norm": (state.last_step.grad_norm, h.measures_norm),
        "last_step.clip_factor": (state.last_step.clip_factor, h.clips_by_norm),
    }
    for name, (part, wanted) in parts.items():
        if (part is not None) != wanted:
            found = "there is none" if part is None else "there should be none"
            raise ValueError(f"state.{name}: it is of an optimizer with other settings: {found}")


def new_state(h: Hyperparameters, params: Any) -> FusedState:
    """Before the first call."""
    check_trainable(params)

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=compute_dtype(leaf)), params)

    def copied(leaf: Any) -> Any:
        # An abstract parameter has no value yet. Otherwise a copy, since parameter and average may both be donated.
        dtype = compute_dtype(leaf)
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros_like(leaf, dtype=dtype) if abstract else jnp.array(leaf, dtype=dtype, copy=True)

    def scalar(value: Any, dtype: Any) -> Any:
        return beside(params, jnp.full((), value, dtype))

    dtype = scalar_dtype()
    norm, factor = (scalar(0, dtype) if there else None for there in (h.measures_norm, h.clips_by_norm))
    step, skipped_steps, skipped = scalar(0, jnp.int32), scalar(0, jnp.int32), scalar(False, bool)
    return FusedState(
        count=scalar(0, jnp.int32),
        mu=zeros(),
        nu=zeros(),
        mu_product=scalar(1, dtype),
        ema=jax.tree.map(copied, params) if h.use_ema else None,
        accumulator=zeros() if h.gradient_accumulation_steps else None,
        last_step=StepReport(step, scalar(0, dtype), norm, factor, skipped_steps, skipped),
        beyond=scalar(0, jnp.int32),
    )
