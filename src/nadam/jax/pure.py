"""One call as a pure function, which XLA compiles: for `fused`, and for Keras on JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from nadam.core import traced
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.kernels import foreign

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


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        calls: Integer, calls so far, without those that were skipped.
        product: Of the momenta of all updates so far; in the dtype in which the scalars are computed.
        tensors: Parameters and their state.
    """

    calls: Array
    product: Array
    tensors: list[traced.Tensor]


class Measured(NamedTuple):
    """What a call saw: norm and clip factor where norms are taken, 0 in a call without."""

    grad_norm: Array | None
    clip_factor: Array | None
    skipped: Array | bool


class Ways(NamedTuple):
    """How it is computed.

    Attributes:
        kernels: Whether by the CPU's passes as foreign functions, rather than by XLA's own loops.
        in_place: Whether what a call does is chosen by loops of one round or none, which XLA lets work in place; a
            conditional would copy all that it passes on, but can be differentiated backwards.
        rotated: As of `foreign.one_pass`.
    """

    kernels: bool
    in_place: bool = True
    rotated: bool = False


def call(
    h: Hyperparameters,
    traits: Sequence[traced.Traits],
    ways: Ways,
    before: Progress,
    grads: Sequence[Array | None],
    now: Now,
    unscale: Any,
) -> tuple[Progress, Measured]:
    """One call: an update, or one more gradient for the accumulators.

    Args:
        h: What the user set.
        traits: What is known of each tensor.
        ways: How to compute it.
        before: How far the run is.
        grads: A gradient for each tensor; None, with accumulation, for one that has none in this call.
        now: The hyperparameters of this call; Python's floats where they are constant, from which 1 - beta is computed
            in float64.
        unscale: What multiplies the gradients.
    """
    steps, (calls, product, tensors) = h.gradient_accumulation_steps, before
    given = [i for i, grad in enumerate(grads) if grad is not None]
    clipping = traced.clips_by_norm(h)
    measuring = ways.kernels and len(given) == len(grads)
    usable, taken = _measured(h, measuring, tensors, grads, unscale)
    updating: Any = True
    if steps is not None:
        updating = (calls + 1) % steps == 0
        accumulators = [tensors[i].accumulator for i in given]
        added = _when(
            ways,
            ~updating & usable,
            lambda old, _: traced.accumulate(XP, old, [grads[i] for i in given], unscale),
            accumulators,
        )
        tensors = list(tensors)
        for i, accumulator in zip(given, added, strict=True):
            tensors[i] = tensors[i]._replace(accumulator=accumulator)

    def update(carry: Any, running: Any) -> Any:
        old, product, _ = carry
        arguments = (XP, h, now, calls // (steps or 1), product, old, grads, traits)
        done: dict[int, traced.Tensor] = {}

        def one_pass(h: Hyperparameters, p: traced.Pass, *given: Any) -> dict[int, traced.Tensor]:
            if ways.kernels:
                done.update(foreign.one_pass(p, *given, flags=h.flags, rotated=ways.rotated))
            return done

        norms = taken
        if steps and clipping and measuring:
            norms = (foreign.measure(old, grads, unscale, accumulated=True, check=Check.NOTHING) or (None,))[0]
        if norms is not None:  # The kernel takes them in float32, whatever the scalars are computed in.
            norms = norms.astype(product.dtype)
        options = {"settle": lax.optimization_barrier, "one_pass": one_pass}
        outcome = traced.update(*arguments, unscale=unscale, norms=norms, **options)
        new = [
            tensor if i in done or not steps else _cleared(tensor, running) for i, tensor in enumerate(outcome.tensors)
        ]
        extras = [jnp.zeros_like(product) if x is None else x for x in (outcome.grad_norm, outcome.clip_factor)]
        return new, outcome.momentum_product, extras

    begin = tensors, product, [jnp.zeros_like(product)] * 2
    tensors, product, (norm, factor) = _when(ways, updating & usable, update, begin)
    one = jnp.where(usable, 1, 0) if h.skip_nonfinite else 1
    measured = Measured(norm, factor, ~usable if h.skip_nonfinite else False)
    return Progress(calls + one, product, tensors), measured if clipping else measured._replace(
        grad_norm=None, clip_factor=None
    )


def _measured(
    h: Hyperparameters, kernels: bool, tensors: Sequence[traced.Tensor], grads: Sequence[Any], unscale: Any
) -> tuple[Any, Any]:
    """Whether the gradients are usable; and their norms, where they are clipped by those and the kernels take them."""
    norms = traced.clips_by_norm(h) and h.gradient_accumulation_steps is None
    check = Check.SQUARES_FINITE if h.skip_nonfinite else Check.NOTHING
    found = None
    if kernels and (norms or h.skip_nonfinite):
        found = foreign.measure(tensors, grads, unscale, accumulated=False, check=check)
    if found is not None:
        return found[1] if h.skip_nonfinite else True, found[0] if norms else None
    if not h.skip_nonfinite:
        return True, None
    given = [i for i, grad in enumerate(grads) if grad is not None]
    return traced.usable(XP, [grads[i] for i in given], [tensors[i] for i in given], unscale, check), None


def _when(ways: Ways, condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``function(carry, running)`` where the condition holds, else ``carry``.

    ``running`` is true inside, and not known to the compiler.
    """
    if condition is True:
        return function(carry, True)
    if not ways.in_place:
        return lax.cond(condition, lambda inner: function(inner, condition), lambda inner: inner, carry)

    def body(state: Any) -> Any:
        running, inner = state
        return jnp.zeros_like(running), function(inner, running)

    return lax.while_loop(lambda state: state[0], body, (condition, carry))[1]


def _cleared(tensor: traced.Tensor, running: Any) -> traced.Tensor:
    """With its accumulator at zero: written in place, after all that reads it, since it depends on what they give.

    A plain constant would be written first, and XLA would keep a copy of the accumulator for the others.
    """
    done = tensor.exp_avg + tensor.exp_avg_sq + tensor.param.astype(tensor.exp_avg.dtype)
    return tensor._replace(accumulator=jnp.where(running, jnp.zeros_like(done), done))


def is_traced(tree: Any) -> bool:
    """Whether something in a tree is not known before the program is compiled."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
