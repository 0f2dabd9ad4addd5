"""JAX as `core.traced` uses it: for `fused`, and for Keras on JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from nadam.core import traced
from nadam.jax import compressed
from nadam.kernels.xla import ffi

Array = Any


class Library:
    """jax.numpy by the names of keras.ops, which `core.traced` uses."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def cast(self, value: Any, dtype: str) -> Array:
        """A value in a dtype."""
        return jnp.asarray(value).astype(dtype)

    def convert_to_tensor(self, value: Any, dtype: str) -> Array:
        """A number as an array."""
        return jnp.asarray(value, dtype)

    cond = staticmethod(lax.cond)


XP = Library()


def means(kernels: bool, in_place: bool = True) -> traced.Means:
    """How `core.traced` computes; with ``kernels`` by the CPU's passes as foreign functions, else by XLA's own loops.

    What a call does is chosen ``in_place`` by loops of one round or none, which XLA lets work in place; a conditional
    would copy all that it passes on, but can be differentiated backwards.
    """
    made = traced.Means(
        _once if in_place else _conditional,
        lax.optimization_barrier,
        cleared=_cleared,
        widened=compressed.widened,
        narrowed=compressed.narrowed,
    )
    return made._replace(one_pass=ffi.one_pass, measure=ffi.measure) if kernels else made


def _conditional(condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    if condition is True:
        return function(carry, True)
    return lax.cond(condition, lambda inner: function(inner, condition), lambda inner: inner, carry)


def _once(condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    if condition is True:
        return function(carry, True)

    def body(state: Any) -> Any:
        running, inner = state
        return jnp.zeros_like(running), function(inner, running)

    return lax.while_loop(lambda state: state[0], body, (condition, carry))[1]


def _cleared(tensor: traced.Tensor, running: Any) -> traced.Tensor:
    """With its accumulator at zero: written in place, after all that reads it, since it depends on what they give.

    A plain constant would be written first, and XLA would keep a copy of the accumulator for the others.
    """
    done = sum(each.astype(tensor.compute_dtype) for each in tensor[:3])
    return tensor._replace(accumulator=jnp.where(running, jnp.zeros_like(done), done))


def is_traced(tree: Any) -> bool:
    """Whether something in a tree is not known before the program is compiled."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
