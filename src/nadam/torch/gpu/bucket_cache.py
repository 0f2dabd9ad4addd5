"""The buckets of steps whose parameters are all on GPUs, which never wait for the device.

Counters, and with them the decision what a call does, are on the device (kernels/gpu/prepare.py). The host looks only
when buckets are formed: at the first step, and when other parameters have a gradient than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from nadam.core.counters import CALLS, SKIPPED
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.cpu.pointers import Held
from nadam.kernels.gpu import OLDEST_TRITON
from nadam.torch.bucket_cache import BucketCache, gradient_of
from nadam.torch.buckets import COUNTERS, Groups, ParamBucket, usable
from nadam.torch.memory import Array, watching
from nadam.torch.sharding import device_combiner, local, local_gradient

# Where there are Triton's kernels. A test adds the CPU, with Triton's interpreter.
DEVICES = {"cuda"}


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


class GpuBucketCache(BucketCache):
    """The buckets of one optimizer whose parameters are all on GPUs."""

    def position(self, otherwise: int) -> int:
        """Calls since the last update; whoever asks waits for the device."""
        if not self.buckets:
            return otherwise
        return int(self.buckets[0].plan.counters[CALLS]) % (self._accumulation_steps or 1)

    def skipped(self) -> int:
        """Calls that were skipped since the buckets were formed; whoever asks waits for the device."""
        return int(self.buckets[0].plan.counters[SKIPPED]) if self.buckets else 0

    def step(
        self, groups: Groups, state: Any, position: int, skipped: int, scale: Tensor | None, found: Tensor | None
    ) -> tuple[Any, list[Tensor], int, int] | None:
        """Do one call; gives its report, the parameters, and position and skipped calls as the buckets were formed.

        None where the kernels cannot do it. The report is None where no parameter takes part.
        """
        now = [self._settings.on_device(index, group) for index, group in enumerate(groups)]
        accumulates = self._accumulation_steps is not None
        if not self._fits(groups, state, position, accumulates):
            present = [param for _, _, param in self._present(groups, state, accumulates)]
            if present and not can_run(present):
                if self._options.needs_kernel is not None:
                    wanted = "expected dense parameters of real numbers, all on GPUs, and Triton 3.6 or later"
                    raise RuntimeError(f"{self._options.needs_kernel}: {wanted}")
                return None
            position, skipped = self.position(position), skipped + self.skipped()
            self._form(groups, state, [h for h, *_ in now], position, accumulates)
        if not self.buckets:
            return None, [], position, skipped
        module = on_gpu()
        moving = [module.Bucket(bucket.plan, *now[bucket.index]) for bucket in self.buckets]
        report = module.step_on_devices(moving, scale=scale, found=found, combine=self.combine, skipped=skipped)
        return report, self._params, position, skipped

    def _fits(self, groups: Groups, state: Any, position: int, updating: bool) -> bool:
        if not (self.buckets and self._watch is not None and self._same_groups(groups, state, updating)):
            return False
        return self._watch.fits([]) and self._same_shares() and all(map(self._bucket_fits, self.buckets))

    def _bucket_fits(self, bucket: ParamBucket) -> bool:
        if bucket.plan.counters._version != bucket.version:
            return False
        grads, tables = list(map(gradient_of, bucket.params)), bucket.plan.tables
        if not self._shares and tables.fits_at_once(grads):
            return True
        if self._accumulation_steps is None and any(grad is None for grad in grads):
            return False
        local_ones = map(self._gradient, bucket.params)
        fits: bool = tables.fits([None if grad is None else usable(grad, self._name) for grad in local_ones])
        return fits

    @staticmethod
    def _owes(entry: Any) -> bool:
        return bool(entry)  # it may have had a gradient in this window: the device knows

    def _gradient(self, param: Tensor) -> Tensor | None:
        return None if param.grad is None else local_gradient(param, param.grad)

    def _plan(self, bucket: ParamBucket, h: Hyperparameters, position: int, written: Sequence[Array]) -> None:
        how = {"position": position, "seed": self._options.seed, "written": written}
        bucket.plan = on_gpu().DevicePlan(bucket.shares, bucket.kept, bucket.grads, h, **how)
        for state, own in zip(bucket.states, bucket.kept, strict=True):
            state.update({name: own[name] for name in COUNTERS if name in own})
        # What PyTorch writes to a tensor or a view of it is counted; what the kernels write is not.
        bucket.version, bucket.given, bucket.grads = bucket.plan.counters._version, (), ()

    def _prepare_watch(self, written: Sequence[Array], counters: Sequence[Tensor], held: Held) -> None:
        self._watch = watching(counters, held=held)
        self.combine = device_combiner([b.params[i] for b in self.buckets for i in b.plan.tables.order])
