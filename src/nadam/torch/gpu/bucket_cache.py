"""What a step is made of where all parameters are on GPUs: as buckets.py, without asking the device anything.

Counters, and with them the decision what a call does, are on the device (triton_prepare.py). The host looks only when
buckets are formed anew: at the first step, and when other parameters have a gradient than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from nadam.core.counters import CALLS, SKIPPED
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.cpu.pointers import Held
from nadam.torch.buckets import COUNTERS, PLACES, Groups, StateOptions, cast_state, entry, held_dicts, name_of, usable
from nadam.torch.memory import FORMATS, check_apart, watching
from nadam.torch.settings import Settings
from nadam.torch.sharding import device_combiner, is_sharded, local, local_gradient

# Where there are Triton's kernels. A test adds the CPU, with Triton's interpreter.
DEVICES = {"cuda"}
OLDEST_TRITON = (3, 6)
_grad = attrgetter("grad")


@cache
def on_gpu() -> Any:
    """The module that launches the kernels; None where there is no Triton, or one that is too old."""
    try:
        triton = import_module("triton")
        if tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON:
            return import_module("nadam.torch.gpu.step")
    except ImportError:
        pass
    return None


def can_run(params: Sequence[Tensor]) -> bool:
    """Whether the kernels can take parameters: all are on GPUs, dense and real."""
    if not params or not {param.device.type for param in params} <= DEVICES or on_gpu() is None:
        return False
    takes = import_module("nadam.torch.gpu.tables").takes
    return all(takes(local(param).detach(), {}) for param in params)


class ParamBucket:
    """Parameters of a group, on one device, that have been updated equally often."""

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
    ) -> None:
        self.index, self.names, self.params, self.states, self.grads = index, names, params, states, grads

    def written(self) -> list[tuple[str, Tensor]]:
        """What a step writes to, with the parameters' names."""
        rows = zip(self.names, self.params, self.states, strict=True)
        kept = [(name, (param, *map(state.get, PLACES))) for name, param, state in rows]
        return [(name, local(tensor)) for name, tensors in kept for tensor in tensors if tensor is not None]

    def prepare(self, h: Hyperparameters, position: int, seed: int, written: Any) -> None:
        """Make the plan; the state's counters become views of those on the device."""
        kept = [{name: local(value) for name, value in state.items()} for state in self.states]
        shares = list(map(local, self.params))
        plan = on_gpu().DevicePlan
        self.plan = plan(shares, kept, self.grads, h, position=position, seed=seed, written=written)
        for state, own in zip(self.states, kept, strict=True):
            state.update({name: own[name] for name in COUNTERS if name in own})
        tensors = [t for state in self.states for t in state.values() if isinstance(t, Tensor)]
        self._shares = [(tensor, local(tensor)) for tensor in (*self.params, *tensors) if is_sharded(tensor)]
        # What PyTorch writes to a tensor or a view of it is counted; what the kernels write is not.
        self._version, self.grads = self.plan.counters._version, ()

    def fits(self, may_miss: bool, name: str) -> bool:
        """Whether all lies as when this was made; if so, the tables hold the gradients of now."""
        if self.plan.counters._version != self._version:
            return False
        if not all(local(tensor) is share for tensor, share in self._shares):
            return False
        grads, tables = list(map(_grad, self.params)), self.plan.tables
        if not self._shares and tables.fits_at_once(grads):
            return True
        if not may_miss and any(grad is None for grad in grads):
            return False
        fits: bool = tables.fits([_gradient(param, name) for param in self.params])
        return fits


class GpuBucketCache:
    """The buckets of the steps of an optimizer whose parameters are all on GPUs.

    Attributes:
        buckets: Those of the last step.
    """

    def __init__(self, settings: Settings, options: StateOptions, accumulation_steps: int | None, name: str) -> None:
        self._settings, self._options, self._name = settings, options, name
        self._accumulation_steps = accumulation_steps
        self.buckets: list[ParamBucket] = []
        self._source: tuple[Any, list[Any]] = (None, [])
        self._combine: Any = None

    def forget(self) -> None:
        """Form the buckets anew at the next step."""
        self.buckets = []

    def position(self, otherwise: int) -> int:
        """Calls since the last update; whoever asks waits for the device."""
        if not self.buckets:
            return otherwise
        return int(self.buckets[0].plan.counters[CALLS]) % (self._accumulation_steps or 1)

    def skipped(self) -> int:
        """Calls that were skipped since the buckets were formed, likewise."""
        return int(self.buckets[0].plan.counters[SKIPPED]) if self.buckets else 0

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        state: Any,
        position: int,
        skipped: int,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> Any:
        """Do one call."""
        now = [self._settings.on_device(index, group) for index, group in enumerate(groups)]
        if not self._fits(groups, state):
            present = [
                p for group in groups for p in group["params"] if p.grad is not None or self._goes_on(state.get(p))
            ]
            if present and not can_run(present):
                return NotImplemented
            position, skipped = self.position(position), skipped + self.skipped()
            self._form(groups, state, present, [h for h, *_ in now], position)
        if not self.buckets:
            return None
        module = on_gpu()
        moving = [module.Bucket(bucket.plan, *now[bucket.index]) for bucket in self.buckets]
        report = module.step_on_devices(moving, scale=scale, found=found, combine=self._combine, skipped=skipped)
        return report, [p for bucket in self.buckets for p in bucket.params], position, skipped

    def _goes_on(self, entry: Any) -> bool:
        """Whether a parameter takes bucket without a gradient, which may have had one in this window."""
        return self._accumulation_steps is not None and bool(entry)

    def _fits(self, groups: Sequence[dict[str, Any]], state: Any) -> bool:
        """Whether the buckets are those of this call, with its gradients."""
        known, sources = self._source
        now = [group["params"] for group in groups]
        if not (self.buckets and state is known and len(now) == len(sources) and all(map(is_, now, sources))):
            return False
        if not self._watch.fits([]):
            return False
        if any(p.grad is not None or self._goes_on(state.get(p)) for p in self._absent):
            return False
        may_miss = self._accumulation_steps is not None
        return all(bucket.fits(may_miss, self._name) for bucket in self.buckets)

    @torch.no_grad()
    def _form(
        self,
        groups: Groups,
        state: Any,
        present: list[Tensor],
        settings: Sequence[Hyperparameters],
        position: int,
    ) -> None:
        wanted, buckets = set(map(id, present)), []
        for param in present:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(f"{self._name} does not support sparse gradients")
        for index, (group, h) in enumerate(zip(groups, settings, strict=True)):
            alike: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
            for i, param in enumerate(group["params"]):
                if id(param) in wanted:
                    own = entry(state, param, h, self._options)
                    cast_state(param, own, self._options)
                    key = (float(own["step"]), float(own["mu_product"]), param.device)
                    row = name_of(groups, index, i), param, own, _gradient(param, self._name)
                    alike.setdefault(key, []).append(row)
            for rows in alike.values():
                names, params, states, given = zip(*rows, strict=True)
                buckets.append(ParamBucket(index, names, params, states, given))
        grads = [each for bucket in buckets for each in zip(bucket.names, bucket.grads, strict=True)]
        written = [each for bucket in buckets for each in bucket.written()]
        arrays = check_apart(written, [(name, grad) for name, grad in grads if grad is not None])
        for bucket in buckets:
            bucket.prepare(settings[bucket.index], position, self._options.seed, arrays)
        self.buckets, self._source = buckets, (state, [group["params"] for group in groups])
        self._absent = [param for source in self._source[1] for param in source if id(param) not in wanted]
        counters = [state[param][name] for param in present for name in COUNTERS if name in state[param]]
        self._watch = watching(counters, held=Held(held_dicts(state, present), self._source[1]))
        rows = [bucket.params[i] for bucket in buckets for i in bucket.plan.tables.order]
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
