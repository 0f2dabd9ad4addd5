"""Keras on JAX: the step as one pure function, which XLA compiles; eagerly in a jit of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import inf, nan
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import io_callback

from nadam.core import traced
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.step import StepReport
from nadam.keras.backends import SKIPPED, Backend, Optimizer, assign, traits_of, values, with_absent
from nadam.keras.slots import checked_gradient
from nadam.kernels import foreign

# Eager programs that are kept: of as many settings and sets of variables.
PROGRAMS_KEPT = 64


class JaxBackend(Backend):
    """Pure functions on values; the variables are set at the end, in a StatelessScope or outside of one."""

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, jax.core.Tracer)

    def number(self, value: Any) -> Any:
        if not isinstance(value, jax.core.Tracer):
            return float(value)
        # A compiled step cannot raise: a learning rate out of its range makes everything NaN, which is seen.
        return jnp.where((value >= 0) & (value < inf), value, nan)

    def call_on_host(
        self, optimizer: Optimizer, function: Callable[[int], tuple[float, ...]], calls: Any, count: int
    ) -> Sequence[Any]:
        if not isinstance(calls, jax.core.Tracer):
            return function(int(calls))
        dtype = jnp.dtype(keras.backend.standardize_dtype(optimizer._momentum_product.dtype))
        result = jax.ShapeDtypeStruct((count,), dtype)
        given = io_callback(lambda calls: np.asarray(function(int(calls)), dtype), result, calls)
        return [given[i] for i in range(count)]

    def step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        h, slots = optimizer._hyper, optimizer._runtime.slots
        indices, grads = with_absent(h, slots, members, grads)
        grads = [None if g is None else _dense(slots[i].variable, g) for i, g in zip(indices, grads, strict=True)]
        calls = optimizer._iterations.value
        now = optimizer._now(calls)._asdict()
        state = {
            "tensors": [values(slots[i]) for i in indices],
            "calls": calls,
            "product": optimizer._momentum_product.value,
            "report": optimizer._report.value if h.skip_nonfinite else None,
        }
        # Constants stay Python's floats, from which 1 - beta is computed in float64.
        constants = tuple((name, now.pop(name)) for name in ("beta1", "beta2") if not callable(getattr(h, name)))
        traits = tuple(traits_of(slots[i]) for i in indices)
        program: Callable[..., Any] = partial(_call, h, traits, constants, foreign.usable())
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, grads, now))):
            program = _compiled(h, traits, constants)
        new, norm, factor = program(state, grads, now)
        for i, tensor in zip(indices, new["tensors"], strict=True):
            assign(slots[i], tensor)
            if tensor.accumulator is not None:
                slots[i].accumulator.assign(tensor.accumulator)
        optimizer._iterations.assign(new["calls"])
        optimizer._momentum_product.assign(new["product"])
        if h.skip_nonfinite:
            optimizer._report.assign(new["report"])
        if not isinstance(new["calls"], jax.core.Tracer):
            updates = new["calls"] // (h.gradient_accumulation_steps or 1)
            skipped = self._skipped(optimizer)
            was_skipped = bool(h.skip_nonfinite and new["calls"] == calls)
            report = StepReport(updates, now["lr"], norm, factor, skipped, was_skipped)
            optimizer._runtime.note(int(new["calls"]), report)


@lru_cache(PROGRAMS_KEPT)
def _compiled(h: Hyperparameters, traits: tuple[traced.Traits, ...], constants: Any) -> Callable[..., Any]:
    # By the compiler's own loops, since here nothing is donated that a kernel could work on in place.
    compiled: Callable[..., Any] = jax.jit(partial(_call, h, traits, constants, False))
    return compiled


def _call(
    h: Hyperparameters,
    traits: Sequence[traced.Traits],
    constants: Any,
    kernels: bool,
    state: dict[str, Any],
    grads: Sequence[Any],
    now: dict[str, Any],
) -> tuple[dict[str, Any], Any, Any]:
    """One call as a pure function: the new state; norm and clip factor where norms are taken, 0 in a call without."""
    xp, steps, unscale = keras.ops, h.gradient_accumulation_steps, 1.0 / (h.loss_scale_factor or 1.0)
    calls, tensors, report = state["calls"], state["tensors"], state["report"]
    given = [i for i, grad in enumerate(grads) if grad is not None]
    clipping = traced.clips_by_norm(h)
    measuring = kernels and len(given) == len(grads)
    usable, taken = _measured(h, measuring, tensors, grads, unscale)
    updating: Any = True
    if steps is not None:
        updating = (calls + 1) % steps == 0
        accumulators = [tensors[i].accumulator for i in given]
        added = _when(
            ~updating & usable,
            lambda old, _: traced.accumulate(xp, old, [grads[i] for i in given], unscale),
            accumulators,
        )
        tensors = list(tensors)
        for i, accumulator in zip(given, added, strict=True):
            tensors[i] = tensors[i]._replace(accumulator=accumulator)

    def update(carry: Any, running: Any) -> Any:
        old, product, _ = carry
        everything = Now(**dict(constants), **now)
        updates = calls // (steps or 1)
        arguments = (xp, h, everything, updates, product, old, grads, traits)
        done: dict[int, traced.Tensor] = {}

        def one_pass(h: Hyperparameters, *given: Any) -> dict[int, traced.Tensor]:
            done.update(foreign.one_pass(*given, clipvalue=h.clipvalue) if kernels else {})
            return done

        norms = taken
        if steps and clipping and measuring:
            norms = (foreign.measure(old, grads, unscale, accumulated=True, check=Check.NOTHING) or (None,))[0]
        options = {"settle": lax.optimization_barrier, "one_pass": one_pass}
        outcome = traced.update(*arguments, unscale=unscale, norms=norms, **options)
        new = [
            tensor if i in done or not steps else _cleared(tensor, running) for i, tensor in enumerate(outcome.tensors)
        ]
        extras = [jnp.zeros_like(product) if x is None else x for x in (outcome.grad_norm, outcome.clip_factor)]
        return new, outcome.momentum_product, extras

    begin = tensors, state["product"], [jnp.zeros_like(state["product"])] * 2
    tensors, product, (norm, factor) = _when(updating & usable, update, begin)
    if report is not None:
        skipped = report[SKIPPED] + jnp.where(usable, 0, 1)
        report = jnp.stack([norm, factor, skipped]).astype(report.dtype)
    one = jnp.where(usable, 1, 0) if h.skip_nonfinite else 1
    new = {"tensors": tensors, "calls": calls + one, "product": product, "report": report}
    return new, norm if clipping else None, factor if clipping else None


def _measured(
    h: Hyperparameters, kernels: bool, tensors: Sequence[traced.Tensor], grads: Sequence[Any], unscale: float
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
    return traced.usable(keras.ops, [grads[i] for i in given], [tensors[i] for i in given], unscale, check), None


def _when(condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``function(carry, running)`` where the condition holds, else ``carry``.

    A loop of one round or none: XLA lets it work in place, where a conditional would copy all that it passes on.
    ``running`` is true inside, and not known to the compiler.
    """
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
    done = tensor.exp_avg + tensor.exp_avg_sq + tensor.param.astype(tensor.exp_avg.dtype)
    return tensor._replace(accumulator=jnp.where(running, jnp.zeros_like(done), done))


def _dense(variable: Any, grad: Any) -> Any:
    """A gradient as an array of its variable's shape; rows of a sparse one that come twice are added."""
    if hasattr(grad, "todense"):
        grad = grad.todense()
    return checked_gradient(variable, jnp.asarray(grad))
