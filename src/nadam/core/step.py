"""What one call does, top to bottom, in the order in which the data flows.

gradient -> unscale -> accumulate -> clip factor -> ONE pass: decay, moments, step, average -> parameter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nadam.core.clock import Clock
from nadam.core.coefficients import SMALLEST_NORMAL
from nadam.core.gradient import Check, clip_factor, global_clip_factor, total_norm
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.scalars import scalars

if TYPE_CHECKING:
    from nadam.kernels.plan import Plan


class StepReport(NamedTuple):
    """What the last call did; nothing in it cost a pass of its own.

    Attributes:
        step: Updates so far, this call's included.
        learning_rate: Used by this call.
        grad_norm: Norm of all gradients together, unscaled, before clipping; None where nothing asked for it.
        clip_factor: What clipping by norm multiplied the gradients by (the smallest factor, with ``clipnorm``); None
            where it is off.
        skipped_steps: Calls so far that changed nothing because a gradient was not finite.
        skipped: Whether this call was one.
    """

    step: int
    learning_rate: float
    grad_norm: float | None
    clip_factor: float | None
    skipped_steps: int
    skipped: bool = False


class Part(NamedTuple):
    """Parameters with settings and counters in common.

    Attributes:
        h: What the user set; clipping, accumulation, averaging and skipping are the same for all parts of a step.
        now: What of it this call uses.
        clock: How far they are; advanced.
        plan: The tensors that have a gradient, and the passes over them.
    """

    h: Hyperparameters
    now: Now
    clock: Clock
    plan: Plan


Combine = Callable[[list[float], bool], tuple[list[float], bool]]


def step(
    parts: Sequence[Part], *, loss_scale: float, must_be_finite: bool = False, combine: Combine | None = None
) -> StepReport:
    """Do one call: an update, or one more gradient for the accumulators.

    Args:
        parts: What is to move; at least one.
        loss_scale: What the gradients are divided by.
        must_be_finite: Whether NaN or infinity skips the call even without ``skip_nonfinite``.
        combine: Where other processes hold the rest of the tensors: (norms, whether all values passed) of this one's
            share -> of the whole.

    Returns:
        What it did.
    """
    h, now, clock, _ = parts[0]
    accumulation_steps = h.gradient_accumulation_steps or 1
    accumulating = accumulation_steps > 1
    updates, position = divmod(clock.calls, accumulation_steps)
    updating = position == accumulation_steps - 1
    unscale = 1.0 / loss_scale

    clipping = updating and (h.clipnorm is not None or h.global_clipnorm is not None)
    check = Check.SQUARES_FINITE if h.skip_nonfinite else Check.FINITE if must_be_finite else Check.NOTHING
    norms: list[float] = []
    if clipping or check is not Check.NOTHING:
        norms, passed = _measure(parts, unscale, accumulating and updating, check)
        if combine is not None:
            norms, passed = combine(norms, passed)
        if not passed:
            for part in parts:
                part.clock.skip()
            return StepReport(updates, now.lr, None, None, clock.skipped, skipped=True)

    if not updating:
        for part in parts:
            part.clock.prepare_accumulation(part.plan.members)
            part.plan.accumulate(unscale, part.clock.commitment)
            part.clock.commit()
        return StepReport(updates, now.lr, None, None, clock.skipped)

    spread = 1.0 / accumulation_steps if accumulating else unscale
    grad_norm = total_norm(norms) / accumulation_steps if norms else None
    grad_factors: float | list[float] = spread
    factor = None
    if h.clipnorm is not None:
        factors = [clip_factor(norm / accumulation_steps, h.clipnorm) for norm in norms]
        grad_factors, factor = [spread * each for each in factors], min(factors)
    elif h.global_clipnorm is not None and grad_norm is not None:
        factor = global_clip_factor(grad_norm, h.global_clipnorm)
        grad_factors = spread * factor
    done = 0
    for part in parts:
        own = grad_factors
        if isinstance(own, list):
            own, done = own[done : done + len(part.plan.members)], done + len(part.plan.members)
        _update(part, own, unscale if accumulating else None)
    return StepReport(updates + 1, now.lr, grad_norm, factor, clock.skipped)


def _measure(parts: Sequence[Part], unscale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
    if len(parts) == 1:
        return parts[0].plan.measure(unscale, accumulated, check)
    norms, all_passed = [], True
    for part in parts:
        own, passed = part.plan.measure(unscale, accumulated, check)
        norms += own
        all_passed = all_passed and passed
    return norms, all_passed


def _update(part: Part, grad_factors: list[float] | float, unscale: float | None) -> None:
    """One update of one part; ``unscale`` is for a gradient that an accumulator is added to."""
    h, now, clock, plan = part
    if h.maximize:
        grad_factors = -grad_factors if isinstance(grad_factors, float) else [-factor for factor in grad_factors]
    if unscale is None and isinstance(grad_factors, float) and plan.update_at_once(part, grad_factors):
        return
    step = clock.calls // (h.gradient_accumulation_steps or 1) + 1
    given = clock.momentum_product, 1.0 if unscale is None else unscale, SMALLEST_NORMAL["float64"]
    s, momentum_product = scalars(h.settings(now), step, step, *given)
    clock.prepare_update(momentum_product, unscale is not None)
    plan.update(s, h.flags, grad_factors=grad_factors, commit=clock.commitment, step=step)
    clock.commit()
