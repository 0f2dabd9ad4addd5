"""Keras on JAX: the step as one pure function, which XLA compiles; eagerly in a jit of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import keras
import numpy as np
from jax import numpy as jnp
from jax.experimental import io_callback

from nadam.core import traced
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.step import StepReport
from nadam.core.traced import Progress
from nadam.jax.step import XP, is_traced, means
from nadam.keras.backends import SKIPPED, Backend, Optimizer, infos_of, nonfinite, with_absent
from nadam.keras.slots import checked_gradient
from nadam.kernels.xla import ffi

# Eager programs that are kept: of as many settings and sets of variables.
PROGRAMS_KEPT = 64


class JaxBackend(Backend):
    """Pure functions on values; the variables are set at the end, in a StatelessScope or outside of one."""

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, jax.core.Tracer)

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
        before = self._progress(optimizer, indices)
        report = None if optimizer._report is None else optimizer._report.value
        # Constants stay Python's floats, from which 1 - beta is computed in float64.
        constants = tuple((name, now.pop(name)) for name in ("beta1", "beta2") if not callable(getattr(h, name)))
        infos = tuple(infos_of([slots[i] for i in indices]))
        traced_step = is_traced((before, report, grads, now))
        program = _program(h, infos, constants, ffi.usable()) if traced_step else _compiled(h, infos, constants)
        after, report, norm, factor = program(before, report, grads, now)
        self._assign(optimizer, indices, before, after)
        if report is not None:
            optimizer._report.assign(report)
        if not is_traced(after.calls):
            updates = after.calls // (h.gradient_accumulation_steps or 1)
            was_skipped = bool(h.skip_nonfinite and after.calls == calls)
            name = nonfinite(h, slots, indices, grads) if was_skipped else None
            seen = StepReport(updates, now["lr"], norm, factor, self._skipped(optimizer), was_skipped, name)
            optimizer._runtime.note(int(after.calls), seen)


def _program(h: Hyperparameters, infos: traced.Infos, constants: Any, kernels: bool) -> Callable[..., Any]:
    def call(before: Progress, report: Any, grads: traced.Grads, now: dict[str, Any]) -> tuple[Progress, Any, Any, Any]:
        """The new state and report; norm and clip factor where there are any."""
        whole, inv_scale = Now(**dict(constants), **now), 1.0 / (h.loss_scale_factor or 1.0)
        after, seen = traced.call(XP, h, infos, means(kernels), before, grads, whole, inv_scale)
        norm, factor, skipped = seen
        if report is not None:
            numbers = [jnp.zeros_like(after.product) if value is None else value for value in (norm, factor)]
            report = jnp.stack([*numbers, report[SKIPPED] + jnp.where(skipped, 1, 0)]).astype(report.dtype)
        return after, report, norm, factor

    return call


@lru_cache(PROGRAMS_KEPT)
def _compiled(h: Hyperparameters, infos: tuple[traced.ParamInfo, ...], constants: Any) -> Callable[..., Any]:
    # By the compiler's own loops, since here nothing is donated that a kernel could work on in place.
    compiled: Callable[..., Any] = jax.jit(_program(h, infos, constants, kernels=False))
    return compiled


def _dense(variable: Any, grad: Any) -> Any:
    """A gradient as an array of its variable's shape; rows of a sparse one that come twice are added."""
    if hasattr(grad, "todense"):
        grad = grad.todense()
    return checked_gradient(variable, jnp.asarray(grad))
