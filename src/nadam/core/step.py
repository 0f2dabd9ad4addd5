"""What one call does, top to bottom, in the order in which the data flows.

gradient -> unscale -> accumulate -> clip factor -> ONE pass: decay, moments, step, average -> parameter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import CounterBuffers, Counters
from nadam.core.dtypes import SMALLEST_NORMAL
from nadam.core.element import Flags
from nadam.core.gradient import Check, clip_factor, global_clip_factor, total_norm
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.scalars import Scalars, scalars

Factors = Sequence[float] | float  # what multiplies the gradient of each tensor, or of all


class StepReport(NamedTuple):
    """What the last call did; before the first, where a run stands.

    Attributes:
        step: Updates so far, this call's included.
        learning_rate: Used by this call; before the first, that of the next.
        grad_norm: Norm of all gradients together, unscaled, before clipping; None where nothing asked for it
            (``track_grad_norm`` does, and whatever else reads the gradients before the step).
        clip_factor: What clipping by norm multiplied the gradients by (the smallest factor, with ``clipnorm``); None
            where it is off.
        skipped_steps: Calls so far that changed nothing because a gradient was not finite.
        skipped: Whether this call was one.
        nonfinite_param: Name of the first parameter whose gradient was the reason; None where the step is compiled as
            a whole (JAX, TensorFlow) or runs on a GPU.

    Example:
        >>> StepReport(100, 1e-3, 1.23456789, 0.81, 0)
        StepReport(step=100, learning_rate=0.001, grad_norm=1.23457, clip_factor=0.81, skipped_steps=0)
    """

    step: int
    learning_rate: float
    grad_norm: float | None
    clip_factor: float | None
    skipped_steps: int
    skipped: bool = False
    nonfinite_param: str | None = None

    def __repr__(self) -> str:
        """Without what there is not, numbers to six digits."""
        shown = {name: _shown(value) for name, value in self._asdict().items()}
        given = (f"{name}={text}" for name, text in shown.items() if text not in ("None", "False"))
        return f"{type(self).__name__}({', '.join(given)})"


def _shown(value: Any) -> str:
    """A number, or an array of one, to six digits; what has no value (traced, donated) as it shows itself."""
    try:
        value = value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):
        return repr(value)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


class Plan(Protocol):
    """The tensors that have a gradient in this call, and the passes over them."""

    members: NDArray[np.int64]  # which of the optimizer's parameters they are

    def measure(self, inv_scale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
        """The norm of each gradient, finite where its values are, and whether all values pass a check.

        The check is of the gradients themselves, times ``inv_scale``; for the norms accumulators are added, if asked.
        """

    def accumulate(self, inv_scale: float, buffers: CounterBuffers) -> None:
        """Add the unscaled gradients to the accumulators."""

    def update_at_once(self, bucket: Any, grad_factor: float) -> bool:
        """An update without accumulation, scalars and counters and all, where that is quicker; whether it was done."""

    def update(
        self, s: Scalars, flags: Flags, *, grad_factors: Factors, buffers: CounterBuffers, step: int = 0
    ) -> None:
        """The one pass; ``step``, the number of this update, is for stochastic rounding."""


class Bucket(NamedTuple):
    """Parameters that share hyperparameters and step counters."""

    h: Hyperparameters  # clipping, accumulation, averaging and skipping are the same for all buckets of a step
    now: Now  # what of it this call uses
    counters: Counters
    plan: Plan


Combine = Callable[[list[float], bool], tuple[list[float], bool]]


def step(
    buckets: Sequence[Bucket],
    *,
    loss_scale: float,
    must_be_finite: bool = False,
    combine: Combine | None = None,
    lagged_norm: float | None = None,
) -> StepReport:
    """Do one call: an update, or one more gradient for the accumulators.

    Args:
        buckets: What is to move; at least one.
        loss_scale: What the gradients are divided by.
        must_be_finite: Whether NaN or infinity skips the call even without ``skip_nonfinite``.
        combine: Where other processes hold the rest of the tensors: (norms, whether all values passed) of this one's
            share -> of the whole.
        lagged_norm: What ``global_clipnorm`` clips by instead of the norm of these gradients.
    """
    h, now, counters, _ = buckets[0]
    accumulation_steps = h.gradient_accumulation_steps or 1
    accumulating = accumulation_steps > 1
    updates, position = divmod(counters.calls, accumulation_steps)
    updating = position == accumulation_steps - 1
    inv_scale = 1.0 / loss_scale

    check = h.check(must_be_finite)
    norms: list[float] = []
    if (updating and h.measures_norm) or check is not Check.NOTHING:
        norms, passed = _measure(buckets, inv_scale, accumulating and updating, check)
        if combine is not None:
            norms, passed = combine(norms, passed)
        if not passed:
            for bucket in buckets:
                bucket.counters.skip()
            return StepReport(updates, now.lr, None, None, counters.skipped, skipped=True)

    if not updating:
        for bucket in buckets:
            bucket.counters.prepare_accumulation(bucket.plan.members)
            bucket.plan.accumulate(inv_scale, bucket.counters.buffers)
            bucket.counters.commit()
        return StepReport(updates, now.lr, None, None, counters.skipped)

    spread = 1.0 / accumulation_steps if accumulating else inv_scale
    grad_norm = total_norm(norms) / accumulation_steps if norms else None
    grad_factors: float | list[float] = spread
    factor = None
    if h.clipnorm is not None:
        factors = [clip_factor(norm / accumulation_steps, h.clipnorm) for norm in norms]
        grad_factors, factor = [spread * each for each in factors], min(factors)
    elif h.global_clipnorm is not None and grad_norm is not None:
        factor = global_clip_factor(grad_norm if lagged_norm is None else lagged_norm, h.global_clipnorm)
        grad_factors = spread * factor
    done = 0
    for bucket in buckets:
        own = grad_factors
        if isinstance(own, list):
            own, done = own[done : done + len(bucket.plan.members)], done + len(bucket.plan.members)
        _update(bucket, own, inv_scale if accumulating else None)
    return StepReport(updates + 1, now.lr, grad_norm, factor, counters.skipped)


def _measure(buckets: Sequence[Bucket], inv_scale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
    if len(buckets) == 1:
        return buckets[0].plan.measure(inv_scale, accumulated, check)
    norms, all_passed = [], True
    for bucket in buckets:
        own, passed = bucket.plan.measure(inv_scale, accumulated, check)
        norms += own
        all_passed = all_passed and passed
    return norms, all_passed


def _update(bucket: Bucket, grad_factors: list[float] | float, inv_scale: float | None) -> None:
    """One update of one bucket; ``inv_scale`` is for a gradient that an accumulator is added to."""
    h, now, counters, plan = bucket
    if h.maximize:
        grad_factors = -grad_factors if isinstance(grad_factors, float) else [-factor for factor in grad_factors]
    if inv_scale is None and isinstance(grad_factors, float) and plan.update_at_once(bucket, grad_factors):
        return
    step = counters.calls // (h.gradient_accumulation_steps or 1) + 1
    given = counters.momentum_product, 1.0 if inv_scale is None else inv_scale, SMALLEST_NORMAL["float64"]
    s, momentum_product = scalars(h.settings(now), step, step, *given)
    counters.prepare_update(momentum_product, inv_scale is not None)
    plan.update(s, h.flags, grad_factors=grad_factors, buffers=counters.buffers, step=step)
    counters.commit()
