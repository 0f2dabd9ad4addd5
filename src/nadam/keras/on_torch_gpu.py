"""Keras on PyTorch with all variables on one GPU: the kernels of `nadam.torch.NAdam`, without asking the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.autograd.graph import increment_version

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SKIPPED
from nadam.keras.backends import SKIPPED as SKIPPED_STEPS
from nadam.keras.backends import Optimizer, with_absent
from nadam.keras.slots import checked_gradient
from nadam.torch.buckets import usable
from nadam.torch.gpu.bucket_cache import can_run, on_gpu

CLIP_FACTOR = 1  # its place in the report
PLANS_KEPT = 8  # for different sets of variables


class Reported:
    """When a step was reported: equal to the counters that tell the same; whoever compares waits for the device."""

    def __init__(self, counters: torch.Tensor) -> None:
        self._counters = counters

    def __eq__(self, other: object) -> bool:
        return (int(self._counters[CALLS]), int(self._counters[SKIPPED])) == other

    __hash__ = None  # type: ignore[assignment]


@torch.no_grad()
def step(optimizer: Optimizer, members: Sequence[int], grads: Sequence[Any]) -> bool:
    """Do one call; False where the kernels cannot."""
    h, runtime = optimizer._hyper, optimizer._runtime
    indices, given = with_absent(h, runtime.slots, members, grads)
    slots = [runtime.slots[i] for i in indices]
    params = [slot.variable._value for slot in slots]
    if any(slot.variable.constraint is not None or slot.exp_avg is None for slot in slots):
        return False
    given_tensors = all(isinstance(grad, (torch.Tensor, type(None))) for grad in given)
    if not given_tensors or len({param.device for param in params}) != 1 or not can_run(params):
        return False
    tensors = [None if grad is None else _checked(slot.variable, grad) for slot, grad in zip(slots, given, strict=True)]
    plan = _plan(optimizer, tuple(indices), params, tensors)
    counters, iterations, product = plan.counters, optimizer._iterations._value, optimizer._momentum_product._value
    rate, beta1, beta2 = _now(optimizer)
    counters[CALLS].copy_(iterations)
    counters[MOMENTUM_PRODUCT].copy_(product)
    if optimizer._report is not None:
        counters[SKIPPED].copy_(optimizer._report._value[SKIPPED_STEPS])
    bucket = on_gpu().Bucket(plan, h, rate, beta1, beta2)
    report = on_gpu().step([bucket], loss_scale=h.loss_scale_factor or 1.0)
    increment_version([param.detach() for param in params])
    iterations.copy_(counters[CALLS])
    product.copy_(counters[MOMENTUM_PRODUCT])
    if optimizer._report is not None:
        optimizer._report._value.copy_(report.numbers())
        if not h.clips_by_norm:
            optimizer._report._value[CLIP_FACTOR].zero_()
    runtime.report, runtime.reported_at = report, Reported(counters)
    return True


def _checked(variable: Any, grad: torch.Tensor) -> torch.Tensor:
    if grad.device != variable._value.device:
        expected = variable._value.device
        raise RuntimeError(f"grads[{variable.path!r}]: on {grad.device}, expected that of its variable, {expected}")
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    return usable(checked_gradient(variable, dense), "Nadam")


def _now(optimizer: Optimizer) -> tuple[Any, float, float]:
    """Learning rate, where it is, and betas; what is computed from the number of calls asks the device for it."""
    h, rate = optimizer._hyper, optimizer._learning_rate
    if isinstance(rate, keras.Variable) and not (callable(h.beta1) or callable(h.beta2)):
        return rate.value.detach(), h.beta1, h.beta2
    now = optimizer._now(int(optimizer._iterations._value))
    return float(now.lr), float(now.beta1), float(now.beta2)


def _plan(optimizer: Optimizer, key: tuple[int, ...], params: Sequence[Any], grads: Sequence[Any]) -> Any:
    runtime = optimizer._runtime
    own = [runtime.slots[i] for i in key]
    held = [variable._value for slot in own for variable in slot[:5] if variable is not None]
    known = runtime.plans.get(key)
    if known is not None and all(map(lambda one, two: one is two, known[1], held)) and known[0].fits(grads):
        return known[0]
    if len(runtime.plans) >= PLANS_KEPT:
        runtime.plans.clear()
    states = []
    for slot in own:
        fields = zip(("exp_avg", "exp_avg_sq", "ema", "grad_accumulator"), slot[1:5], strict=True)
        state = {name: variable._value for name, variable in fields if variable is not None}
        # Of these Keras has one for all variables.
        zero = torch.zeros((), dtype=torch.float64, device=slot.variable._value.device)
        states.append({**state, "step": zero, "mu_product": zero})
    plan = on_gpu().DevicePlan(params, states, grads, optimizer._hyper, decays=[slot.decays for slot in own])
    runtime.plans[key] = plan, held
    return plan
