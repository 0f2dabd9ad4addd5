"""Keras on PyTorch: on the CPU one pass over the variables' own memory; its plan is kept while all lies as it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from keras.ops import convert_to_tensor
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch.autograd.graph import increment_version

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SKIPPED, Counters
from nadam.core.library import mathematics
from nadam.core.scalars import averaging
from nadam.core.step import Bucket, StepReport, step
from nadam.keras import on_torch_gpu
from nadam.keras.backends import SKIPPED as SKIPPED_STEPS
from nadam.keras.backends import Backend, Optimizer, nonfinite
from nadam.keras.slots import check_unmasked, checked_gradient
from nadam.torch import memory

# Plans for different sets of variables that are kept, as for a model whose halves are trained in turn.
PLANS_KEPT = 8


class Call:
    """The plan for one set of variables, and what of them Python has to do after the pass."""

    def __init__(self, optimizer: Optimizer, members: Sequence[int], grads: Sequence[torch.Tensor]) -> None:
        slots = [optimizer._runtime.slots[i] for i in members]
        self.constrained = [slot for slot in slots if slot.variable.constraint is not None]
        rows = []
        for slot in slots:
            for variable in slot[1:5]:
                if variable is not None and not variable._value.is_contiguous():
                    variable._value.data = variable._value.data.contiguous()
            state = [None if v is None else v._value for v in slot[:5]]
            averaged = slot.variable.constraint is None
            scales = [None if v is None else v._value for v in slot[6:8]]
            rows.append(memory.Slot._make([slot.variable.path, *state, None, *scales, slot.decays, averaged]))
        self.values = [row.param for row in rows]
        made = memory.TensorPlan(rows, grads, members, optimizer.seed)
        named = [(row.name, grad) for row, grad in zip(rows, grads, strict=True)]
        self._watch = memory.watch([made], memory.check_apart(memory.named(rows), named))
        self.plan, made.grads = made.plan, ()
        self.kept: Any = None  # gradients that are copies of the caller's

    def fits(self, grads: Sequence[Any]) -> bool:
        """Whether all lies as it did; if so, the addresses of these gradients are in the tables."""
        return self._watch.fits(grads if type(grads) is list else list(grads))


class TorchBackend(Backend):
    """The kernel wherever everything lies in the CPU's memory; else arrays."""

    keeps_codes = True

    def check_devices(self, optimizer: Optimizer, variables: Sequence[Any]) -> None:
        devices = {str(v._value.device) for v in variables if not v._value.is_cpu}
        if devices and optimizer.state_bits is not None:
            raise ValueError(f"state_bits={optimizer.state_bits}: expected None with variables on {min(devices)}")

    def built(self, optimizer: Optimizer) -> None:
        slots = optimizer._runtime.slots
        for slot in slots:
            for place, variable in enumerate(slot[1:5], 1):
                if variable is not None and variable._value.is_cpu:
                    variable._value.data = memory.shifted(variable._value.data, place)
        self._renew(optimizer)

    @staticmethod
    def _renew(optimizer: Optimizer) -> None:
        runtime = optimizer._runtime
        runtime.counters = Counters(len(runtime.slots))
        everything = [v for slot in runtime.slots for v in slot[:5] if v is not None]
        runtime.on_cpu = all(v._value.is_cpu for v in everything)

    def finish(self, cls: type) -> None:
        cls.apply = torch.compiler.disable(cls.apply)  # type: ignore[attr-defined]

    def step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        runtime = optimizer._runtime
        with torch.no_grad():
            if runtime.counters is None:
                self._renew(optimizer)
            stateless = in_stateless_scope()  # there a variable's value is not its own
            if optimizer.state_bits is not None and (stateless or not runtime.on_cpu):
                where = "in stateless_apply" if stateless else "with variables that are not on the CPU"
                raise RuntimeError(f"state_bits={optimizer.state_bits}: expected None {where}")
            if stateless:
                self.eager_step(optimizer, members, grads)
            elif runtime.on_cpu:
                self._kernel_step(optimizer, members, grads)
            elif not on_torch_gpu.step(optimizer, members, grads):
                self.eager_step(optimizer, members, grads)

    def sync_counters(self, optimizer: Optimizer) -> None:
        """Bring the counters among the variables up to those which the kernel itself advances.

        Where an interrupt keeps a step from doing so, whoever looks at the variables next does it.
        """
        runtime = optimizer._runtime
        if runtime.unsynced and runtime.counters is not None:
            with torch.no_grad():
                optimizer._iterations._value.fill_(runtime.counters.calls)
                optimizer._momentum_product._value.fill_(runtime.counters.momentum_product)
                if optimizer._report is not None:
                    optimizer._report._value[SKIPPED_STEPS] = runtime.counters.skipped
            runtime.unsynced = False

    def _kernel_step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        h, runtime = optimizer._hyper, optimizer._runtime
        self.sync_counters(optimizer)
        counters, count = runtime.counters, int(optimizer._iterations._value)
        now = optimizer._now(count)
        product = float(optimizer._momentum_product._value)
        current, skipped = counters.current, self._skipped(optimizer)
        current[CALLS], current[MOMENTUM_PRODUCT], current[SKIPPED] = count, product, skipped
        steps = h.gradient_accumulation_steps
        if steps is not None and (count + 1) % steps == 0 and len(members) < len(runtime.slots):
            members, grads = _with_owed(runtime.slots, runtime.seen(count), members, grads)
        call = _call_for(optimizer, members, grads)
        runtime.unsynced = True
        try:
            report = step([Bucket(h, now, counters, call.plan)], loss_scale=h.loss_scale_factor or 1.0)
        finally:
            self.sync_counters(optimizer)
            increment_version(call.values)
        if report.skipped:
            report = report._replace(nonfinite_param=nonfinite(h, runtime.slots, members, grads))
        updated = not report.skipped and (steps is None or (count + 1) % steps == 0)
        if steps is not None and not report.skipped:
            runtime.note_seen(count, members, updated)
        if updated:
            _constrain(optimizer, call, report)
        if optimizer._report is not None:
            optimizer._report.assign([report.grad_norm or 0.0, report.clip_factor or 0.0, report.skipped_steps])
        runtime.note(counters.calls, report)


def _call_for(optimizer: Optimizer, members: Sequence[int], grads: Sequence[Any]) -> Call:
    plans = optimizer._runtime.plans
    key = len(members) if isinstance(members, range) else tuple(members)
    known: Call | None = plans.get(key)
    if known is not None and known.fits(grads):
        return known
    slots = optimizer._runtime.slots
    kept = [_checked(slots[i].variable, grad) for i, grad in zip(members, grads, strict=True)]
    if len(plans) >= PLANS_KEPT:
        plans.clear()
    made = Call(optimizer, members, kept)
    if all(k is g for k, g in zip(kept, grads, strict=True)):
        plans[key] = made
    else:
        made.kept = kept
    return made


def _checked(variable: Any, given: Any) -> torch.Tensor:
    """A gradient as the kernels take it: itself wherever it can be, else a copy."""
    if isinstance(given, np.ndarray):
        check_unmasked(variable, given)
        given = given.copy()  # PyTorch takes no memory that is read-only or has negative strides
    grad = given if isinstance(given, torch.Tensor) else convert_to_tensor(given)
    if not grad.is_cpu:
        raise RuntimeError(f"grads[{variable.path!r}]: on {grad.device}, expected that of its variable, cpu")
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    checked_gradient(variable, grad)
    return grad.resolve_neg() if grad.dtype in memory.FORMATS else grad.to(torch.float32)


def _with_owed(slots: Any, seen: set[int], members: Sequence[int], grads: list[Any]) -> tuple[list[int], list[Any]]:
    """With those variables that had a gradient earlier in this window: it counts as zero now.

    Which those are is known, but not after a file was loaded: then one that is not zero tells.
    """
    members, grads = list(members), list(grads)
    for i in sorted(set(range(len(slots))) - set(members)):
        accumulator = slots[i].accumulator
        if slots[i].exp_avg is not None and (i in seen or bool(accumulator._value.any())):
            members.append(i)
            grads.append(accumulator._value.new_zeros(()).expand(accumulator._value.shape))
    return members, grads


def _constrain(optimizer: Optimizer, call: Call, report: StepReport) -> None:
    """Constraints, then the moving average of what they leave."""
    h = optimizer._hyper
    m = mathematics(torch)
    for slot in call.constrained:
        slot.variable.assign(slot.variable.constraint(slot.variable.value))
        if slot.ema is not None:
            momentum, overwrite = averaging(h.ema_momentum, h.ema_overwrite_frequency, report.step)
            ema, param = slot.ema._value, slot.variable._value
            ema.copy_(m.average(ema, param.to(ema.dtype), momentum, 1.0 - momentum))
            if overwrite:
                param.copy_(ema)
