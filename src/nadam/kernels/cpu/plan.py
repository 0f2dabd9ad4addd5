"""The tensors of one call, sorted into groups by their number formats; the passes over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from sys import float_info
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import CounterBuffers
from nadam.core.dtypes import SHRINK
from nadam.core.element import Flags
from nadam.core.gradient import Check
from nadam.core.scalars import Scalars
from nadam.core.step import Bucket, Factors
from nadam.kernels import layout as at
from nadam.kernels.cpu import machine_code
from nadam.kernels.cpu.fused_step import FusedStep
from nadam.kernels.cpu.group import TensorGroup, TensorMemory
from nadam.kernels.strides import address


class KernelPlan:
    """The tensors of one call, as `core.step.Plan` has it."""

    def __init__(
        self,
        tensors: Sequence[TensorMemory],
        members: NDArray[np.int64],
        seed: int = 0,
        fuses: bool = False,
        keep: Any = None,
        default_threads: Callable[[], int] | None = None,
    ) -> None:
        alike: dict[Any, list[int]] = {}
        for i, tensor in enumerate(tensors):
            alike.setdefault(tensor.kind, []).append(i)
        self.groups = [TensorGroup([tensors[i] for i in own], own, keep, default_threads) for own in alike.values()]
        self.members, self.seed = members, seed
        self._uses = 0 if fuses and self._can_fuse() else -1
        self._fused: FusedStep | None = None

    def _can_fuse(self) -> bool:
        if len(self.groups) != 1 or not machine_code.mathematical_functions():
            return False
        group = self.groups[0]
        return bool(group.averaged and len(group.chunks) and not group.rounded and not group.worth_sharing)

    def gradient_cells(self) -> list[int]:
        """Where the descriptors keep the address of each gradient, in the order of the call."""
        found: dict[int, int] = {}
        for group in self.groups:
            first = address(group.rows) + 8 * at.GRAD
            found.update((int(i), first + 8 * at.COLUMNS * row) for row, i in enumerate(group.members))
        return [found[i] for i in range(len(found))]

    def measure(self, inv_scale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
        """The norm of each gradient, finite where its values are, and whether all values pass a check."""
        if self._fused is not None and check is Check.NOTHING and not accumulated:
            known = self._fused.norms(inv_scale)
            if known is not None:
                return known, True
        norms = np.empty(len(self.members))
        for group in self.groups:
            largest = sqrt(group.largest) if check is Check.SQUARES_FINITE else group.largest
            counting = check is not Check.NOTHING and accumulated
            sums, outside = group.measure(inv_scale, accumulated, largest if counting else None)
            # A value that is too large makes the sum of squares so. So may many that are not: then they are counted.
            bound = min(largest, sqrt(float_info.max)) ** 2
            if check is not Check.NOTHING and not accumulated and not (sums <= bound).all():
                outside = group.measure(inv_scale, accumulated, largest)[1]
            if outside:
                return [], False
            norms[group.members] = np.sqrt(sums)
            overflowed = np.isinf(sums)
            if overflowed.any():
                shrink = SHRINK["float64"]
                sums, _ = group.measure(inv_scale, accumulated, largest, shrink)
                norms[group.members[overflowed]] = [sqrt(total) / shrink for total in sums[overflowed]]
        return norms.tolist(), True

    def update_at_once(self, bucket: Bucket, grad_factor: float) -> bool:
        """An update of a small group in one native call; gives whether it was done."""
        if self._fused is None:
            if self._uses < 0:
                return False
            self._uses += 1  # gradients that never come the same way twice are not worth the arguments
            if self._uses < 2:
                return False
            self._fused = FusedStep(self.groups[0])
        self._fused.update(bucket, grad_factor)
        return True

    def accumulate(self, inv_scale: float, buffers: CounterBuffers) -> None:
        """Add the unscaled gradients to the accumulators."""
        for group in self.groups:
            group.accumulate(inv_scale, buffers)

    def update(
        self, s: Scalars, flags: Flags, *, grad_factors: Factors, buffers: CounterBuffers, step: int = 0
    ) -> None:
        """The one pass, for each group."""
        if self._fused is not None:
            self._fused.forget()
        for group in self.groups:
            if group.rounded:
                group.keys[:] = keys(self.seed, step, self.members[group.members])
            same = isinstance(grad_factors, float)
            group.set_multipliers(grad_factors if same else np.take(grad_factors, group.members).tolist(), s.decay)
            group.update(s, flags._replace(averaged=flags.averaged and group.averaged), buffers)


def hash32(index: NDArray[np.uint32], key: int | NDArray[np.uint32]) -> NDArray[np.uint32]:
    """32 bits that look like chance, of an index and a key: Wellons's lowbias32, a finalizer of murmur3's kind.

    Example:
        >>> hash32(np.arange(2, dtype=np.uint32), 7).tolist()
        [2492178918, 2803216774]
    """
    x = index * np.uint32(0x9E3779B9) ^ np.asarray(key, np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    made: NDArray[np.uint32] = x ^ x >> np.uint32(16)
    return made


def keys(seed: int, step: int, members: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The keys of stochastic rounding: ``hash32(tensor, hash32(step, seed))``.

    Element i of a tensor is then rounded by the upper 16 bits of ``hash32(i, key)``.
    """
    return hash32(members.astype(np.uint32), hash32(np.array([step & 0xFFFFFFFF], np.uint32), seed))
