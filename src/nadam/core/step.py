"""What one call does, top to bottom, in the order in which the data flows.

gradient -> unscale -> accumulate -> clip factor -> ONE pass: decay, moments, step, average -> parameter
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple

from nadam.core.average import averaging
from nadam.core.clock import Clock
from nadam.core.coefficients import coefficients
from nadam.core.gradient import Check, clip_factor, global_clip_factor, total_norm
from nadam.core.hyperparameters import Hyperparameters, Now

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


def step(
    h: Hyperparameters, now: Now, clock: Clock, plan: Plan, *, loss_scale: float, must_be_finite: bool = False
) -> StepReport:
    """Do one call: an update, or one more gradient for the accumulators.

    Args:
        h: What the user set.
        now: What of it this call uses.
        clock: How far the run is; advanced.
        plan: The tensors that have a gradient, and the passes over them.
        loss_scale: What the gradients are divided by.
        must_be_finite: Whether NaN or infinity skips the call even without ``skip_nonfinite``.

    Returns:
        What it did.
    """
    calls, commit = clock.calls, clock.commitment
    accumulation_steps = h.gradient_accumulation_steps or 1
    accumulating = accumulation_steps > 1
    updates, position = divmod(calls, accumulation_steps)
    updating = position == accumulation_steps - 1
    unscale = 1.0 / loss_scale

    clipping = updating and (h.clipnorm is not None or h.global_clipnorm is not None)
    check = Check.SQUARES_FINITE if h.skip_nonfinite else Check.FINITE if must_be_finite else Check.NOTHING
    norms: list[float] = []
    if clipping or check is not Check.NOTHING:
        norms, passed = plan.measure(unscale, accumulating and updating, check)
        if not passed:
            clock.skip()
            return StepReport(updates, now.lr, None, None, clock.skipped, skipped=True)

    if not updating:
        clock.prepare_accumulation(plan.members)
        plan.accumulate(unscale, commit)
        clock.commit()
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
    c, momentum_product = coefficients(
        updates + 1,
        lr=now.lr,
        beta1=now.beta1,
        beta2=now.beta2,
        eps=h.eps,
        momentum_decay=h.momentum_decay,
        momentum_product=clock.momentum_product,
    )
    clock.prepare_update(momentum_product, accumulating)
    plan.update(
        c,
        grad_factors=grad_factors,
        decay=now.lr * (h.weight_decay or 0.0),
        unscale=unscale if accumulating else None,
        clipvalue=h.clipvalue if h.clipvalue is not None else inf,
        averaging=averaging(h.ema_momentum, h.ema_overwrite_frequency, updates + 1) if h.use_ema else None,
        commit=commit,
    )
    clock.commit()
    return StepReport(updates + 1, now.lr, grad_norm, factor, clock.skipped)
