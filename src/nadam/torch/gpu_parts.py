"""What a step is made of where all parameters are on GPUs: as parts.py, without asking the device anything.

Counters, and with them the decision what a call does, are on the device (triton_prepare.py). The host looks only when
cohorts are formed anew: at the first step, and when other parameters have a gradient than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from nadam.core.clock import CALLS, SKIPPED
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.tensors import FORMATS
from nadam.torch.batches import Keeping, new_state, settle, usable
from nadam.torch.settings import Settings
from nadam.torch.sharding import device_combiner, is_sharded, local, local_gradient

# Where there are Triton's kernels. A test adds the CPU, with Triton's interpreter.
DEVICES = {"cuda"}
OLDEST_TRITON = (3, 6)
_grad, _step, _exp_avg = attrgetter("grad"), itemgetter("step"), itemgetter("exp_avg")


@cache
def on_gpu() -> Any:
    """The module that launches the kernels; None where there is no Triton, or one that is too old."""
    try:
        triton = import_module("triton")
        if tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON:
            return import_module("nadam.torch.on_gpu")
    except ImportError:
        pass
    return None


def can_run(params: Sequence[Tensor]) -> bool:
    """Whether the kernels can take parameters: all are on GPUs, dense and real."""
    if not params or not {param.device.type for param in params} <= DEVICES or on_gpu() is None:
        return False
    takes = import_module("nadam.torch.gpu_tables").takes
    return all(takes(local(param).detach(), {}) for param in params)


class Cohort:
    """Parameters of a group, on one device, that have been updated equally often."""

    def __init__(
        self,
        index: int,
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
        h: Hyperparameters,
        position: int,
        keeping: Keeping,
    ) -> None:
        self.index, self.params, self.states = index, list(params), list(states)
        for param, state in zip(params, states, strict=True):
            settle(param, state, keeping)
        self._locals = [local(param) for param in params]
        kept = [{name: local(value) for name, value in state.items()} for state in states]
        self.plan = on_gpu().DevicePlan(self._locals, kept, grads, h, position=position, seed=keeping.seed)
        for state, own in zip(states, kept, strict=True):
            state["step"], state["mu_product"] = own["step"], own["mu_product"]
        self._steps, self._moments = list(map(_step, states)), list(map(_exp_avg, states))
        self._sharded = any(map(is_sharded, params))

    def fits(self, state: Any, may_miss: bool, name: str) -> bool:
        """Whether all is as when this was made; if so, the tables hold the gradients of now."""
        if state.get(self.params[0]) is not self.states[0]:
            return False
        same = all(map(is_, map(_step, self.states), self._steps))
        if not (same and all(map(is_, map(_exp_avg, self.states), self._moments))):
            return False
        if self._sharded and not all(map(is_, map(local, self.params), self._locals)):
            return False
        grads, tables = list(map(_grad, self.params)), self.plan.tables
        if not self._sharded and tables.fits_at_once(grads):
            return True
        if not may_miss and any(grad is None for grad in grads):
            return False
        fits: bool = tables.fits([_gradient(param, name) for param in self.params])
        return fits


class GpuParts:
    """The parts of the steps of an optimizer whose parameters are all on GPUs.

    Args:
        settings: Of its groups.
        keeping: How its state is kept.
        accumulation_steps: Calls per update, or None.
        name: What it is called in messages.

    Attributes:
        cohorts: Those of the last step.
    """

    def __init__(self, settings: Settings, keeping: Keeping, accumulation_steps: int | None, name: str) -> None:
        self._settings, self._keeping, self._name = settings, keeping, name
        self._accumulation_steps = accumulation_steps
        self.cohorts: list[Cohort] = []
        self._sources: list[list[Tensor]] = []
        self._combine: Any = None

    def forget(self) -> None:
        """Form the cohorts anew at the next step."""
        self.cohorts = []

    def position(self, otherwise: int) -> int:
        """Calls since the last update; whoever asks waits for the device."""
        if not self.cohorts:
            return otherwise
        return int(self.cohorts[0].plan.counters[CALLS]) % (self._accumulation_steps or 1)

    def skipped(self) -> int:
        """Calls that were skipped since the cohorts were formed, likewise."""
        return int(self.cohorts[0].plan.counters[SKIPPED]) if self.cohorts else 0

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        state: Any,
        position: int,
        skipped: int,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> Any:
        """Do one call.

        Args:
            groups: The optimizer's.
            state: The optimizer's; that of new parameters is added.
            position: Calls since the last update before the cohorts were formed.
            skipped: Calls that had been skipped by then.
            scale: What the gradients are divided by: one element on the device.
            found: One element on the device, not 0 if nothing is to change.

        Returns:
            What it did, the parameters, position and skipped calls by when the cohorts were formed; None where there is
            no gradient, NotImplemented where the kernels cannot run. Then nothing has changed.
        """
        now = [self._settings.on_device(index, group) for index, group in enumerate(groups)]
        if not self._fits(groups, state):
            present = [
                p for group in groups for p in group["params"] if p.grad is not None or self._goes_on(state.get(p))
            ]
            if present and not can_run(present):
                return NotImplemented
            position, skipped = self.position(position), skipped + self.skipped()
            self._form(groups, state, present, [h for h, *_ in now], position)
        if not self.cohorts:
            return None
        module = on_gpu()
        parts = [module.Part(cohort.plan, *now[cohort.index]) for cohort in self.cohorts]
        report = module.step_on_devices(parts, scale=scale, found=found, combine=self._combine, skipped=skipped)
        return report, [p for cohort in self.cohorts for p in cohort.params], position, skipped

    def _goes_on(self, entry: Any) -> bool:
        """Whether a parameter takes part without a gradient, which may have had one in this window."""
        return self._accumulation_steps is not None and bool(entry)

    def _fits(self, groups: Sequence[dict[str, Any]], state: Any) -> bool:
        """Whether the cohorts are those of this call, with its gradients."""
        sources = [group["params"] for group in groups]
        if not (self.cohorts and len(sources) == len(self._sources) and all(map(is_, sources, self._sources))):
            return False
        if list(map(len, sources)) != self._counts:
            return False
        if any(p.grad is not None or self._goes_on(state.get(p)) for p in self._absent):
            return False
        may_miss = self._accumulation_steps is not None
        return all(cohort.fits(state, may_miss, self._name) for cohort in self.cohorts)

    @torch.no_grad()
    def _form(
        self,
        groups: Sequence[dict[str, Any]],
        state: Any,
        present: list[Tensor],
        settings: Sequence[Hyperparameters],
        position: int,
    ) -> None:
        wanted, cohorts = set(map(id, present)), []
        for index, (group, h) in enumerate(zip(groups, settings, strict=True)):
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in group["params"]:
                if id(param) in wanted:
                    if param.grad is not None and param.grad.layout != torch.strided:
                        raise RuntimeError(f"{self._name} does not support sparse gradients")
                    if not state[param]:
                        state[param] = new_state(param, h, self._keeping)
                    key = (float(state[param]["step"]), float(state[param]["mu_product"]), param.device)
                    alike.setdefault(key, []).append(param)
            for params in alike.values():
                states = [state[param] for param in params]
                grads = [_gradient(param, self._name) for param in params]
                cohorts.append(Cohort(index, params, states, grads, h, position, self._keeping))
        self.cohorts, self._sources = cohorts, [group["params"] for group in groups]
        self._counts = list(map(len, self._sources))
        self._absent = [param for source in self._sources for param in source if id(param) not in wanted]
        rows = [cohort.params[i] for cohort in cohorts for i in cohort.plan.tables.order]
        self._combine = device_combiner(rows)


def _gradient(param: Tensor, name: str) -> Tensor | None:
    """A parameter's gradient as the kernels take it: itself wherever it can be."""
    grad = param.grad
    # Most are: asked for in this order it takes a fraction of what making another view would.
    if type(grad) is Tensor and grad.dtype in FORMATS and grad.layout is torch.strided and not grad.is_neg():
        return grad
    if grad is None:
        return None
    return usable(local_gradient(param, grad) if is_sharded(param) else grad, name)
