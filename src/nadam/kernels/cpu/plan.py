"""The tensors of one call, sorted into groups by their number formats; the passes over all of them.

Scalars, counters, norms and keys of rounding are made in the same native calls as the passes (prepare.py), but where a
call accumulates or clips each gradient by its own norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, sqrt
from sys import float_info
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import CounterBuffers
from nadam.core.dtypes import SHRINK
from nadam.core.element import Flags
from nadam.core.gradient import Check
from nadam.core.rounding import keys
from nadam.core.scalars import Scalars, Settings
from nadam.core.step import Bucket, Factors
from nadam.kernels import layout as at
from nadam.kernels.cpu import machine_code, threads
from nadam.kernels.cpu.group import TensorGroup, TensorMemory
from nadam.kernels.cpu.machine_code import Kernel
from nadam.kernels.strides import address

# Words of the arguments of both kernels: where the pass is, where its own arguments are, number of tensors.
PASS, ARGUMENTS, NUM_TENSORS = range(3)
# Of `norms`: where to write them, and whether all are finite; float64: the square of what multiplies the gradients.
NORMS, FINITE, SQUARE = range(3, 6)
# Of `update`: parameters that show their own number of steps; where it is kept which tensors decay and which streams of
# stochastic rounding they have; its seed; then float64, from SETTINGS on the fields of `scalars.Settings`.
SHOWN, DECAYS, STREAMS, SEED, GRAD_FACTOR, SMALLEST, SETTINGS = range(3, 10)
NEVER = inf  # as the frequency of overwriting: the remainder is then the step itself


class FusedStep:
    """The passes over a group with what Python would do around them: the same numbers, bit for bit.

    In training loops, before and after, two runs: an MLP of 0.27M takes 0.86 and 0.88 of the time for it in NumPy, a
    transformer of 0.8M with moments of 8 bits 0.73 and 0.69 in PyTorch.
    """

    def __init__(self, group: TensorGroup, streams: NDArray[np.int64], seed: int) -> None:
        self._group, self._streams = group, streams
        self._norms = np.zeros(len(group.sizes))
        measuring, updating = (np.zeros(SETTINGS + len(Settings._fields), np.int64) for _ in range(2))
        # Their words as integers and as float64: such a view is read and written faster than an array.
        self._measured: Any = measuring.data
        self._updated: Any = updating.data
        self._square: Any = measuring.view(np.float64).data
        self._inputs: Any = updating.view(np.float64).data
        self._addresses = address(measuring), address(updating)
        self._measured[NUM_TENSORS] = self._updated[NUM_TENSORS] = len(group.sizes)
        self._measured[NORMS], self._updated[DECAYS] = address(self._norms), address(group.decays)
        self._updated[STREAMS], self._updated[SEED] = address(streams), seed
        self._norms_kernel: Kernel | None = None
        self._update_kernel = machine_code.kernel("prepare", "update", group.compute, group.rounds)
        self._pass, self._arguments = self._update_kernel, 0
        self._known: tuple[Any, ...] = (None, None, None)

    def norms(self, inv_scale: float) -> NDArray[np.float64] | None:
        """The norm of each tensor's gradient; None where a square has overflowed, and they are to be measured again."""
        if self._norms_kernel is None:
            self._measure, self._measured[ARGUMENTS] = self._group.ready("measure", None, False, False)
            self._measured[PASS] = self._measure.address
            self._norms_kernel = machine_code.kernel("prepare", "norms")
        self._square[SQUARE] = inv_scale**2
        sharing = self._group.sharing["measure"]
        if sharing.worth_it:
            self._norms_kernel(self._addresses[0], 0)
            sharing.run(self._measure, self._measured[ARGUMENTS], self._group.shared)
            self._norms_kernel(self._addresses[0], -1)
        else:
            self._norms_kernel(self._addresses[0], threads.UNTIL_DONE)
        return self._norms if self._measured[FINITE] else None

    def begin(self, bucket: Bucket, grad_factor: float, alone: bool) -> None:
        """Make the scalars and counters; where no other group has to do so before anything moves, the first slice."""
        h, now, counters, _ = bucket
        known = self._known
        if known[0] is not h or known[1] is not now or known[2] is not counters:
            self._bind_arguments(bucket)
        self._inputs[GRAD_FACTOR] = grad_factor
        at_once = alone and not self._group.sharing["one_pass"].worth_it
        self._update_kernel(self._addresses[1], threads.SLICE if at_once else 0)

    def finish(self) -> None:
        """What is left of the one pass."""
        group, sharing = self._group, self._group.sharing["one_pass"]
        if sharing.worth_it:
            sharing.run(self._pass, self._arguments, group.shared)
        while group.shared[at.TICKET] < len(group.chunks):
            self._pass(self._arguments, threads.SLICE)

    def forget(self) -> None:
        """Lay everything out anew: the group's passes have run otherwise meanwhile."""
        self._known = (None, None, None)

    def _bind_arguments(self, bucket: Bucket) -> None:
        """Lay out what stays as it is for as long as the settings do."""
        self.forget()
        self._group.forget_multipliers()
        h, now, counters, _ = bucket
        self._pass, self._arguments = self._group.ready("one_pass", counters.buffers, *h.flags, self._group.kept)
        words = self._updated
        words[PASS], words[ARGUMENTS], words[SHOWN] = self._pass.address, self._arguments, counters.shown
        settings = h.settings(now)
        settings = settings._replace(ema_overwrite_frequency=settings.ema_overwrite_frequency or NEVER)
        for place, number in enumerate((self._group.smallest, *settings), SMALLEST):
            self._inputs[place] = float(number)
        self._known = bucket[:3]


class KernelPlan:
    """The tensors of one call, as `core.step.Plan` has it."""

    def __init__(
        self,
        tensors: Sequence[TensorMemory],
        members: NDArray[np.int64],
        seed: int = 0,
        keep: Any = None,
        default_threads: Callable[[], int] | None = None,
    ) -> None:
        alike: dict[Any, list[int]] = {}
        for i, tensor in enumerate(tensors):
            alike.setdefault(tensor.kind, []).append(i)
        self.groups = [TensorGroup([tensors[i] for i in own], own, keep, default_threads) for own in alike.values()]
        self.members, self.seed = members, seed
        self.streams = members  # which stream of stochastic rounding each tensor has
        self._uses = 0 if self._can_fuse() else -1
        self._fused: list[FusedStep] = []  # of each group
        self._has_empty = any(0 in group.sizes for group in self.groups)

    def _can_fuse(self) -> bool:
        return bool(machine_code.mathematical_functions()) and all(group.averaged for group in self.groups)

    def gradient_cells(self) -> list[int]:
        """Where the descriptors keep the address of each gradient, in the order of the call."""
        found: dict[int, int] = {}
        for group in self.groups:
            first = address(group.rows) + 8 * at.GRAD
            found.update((int(i), first + 8 * at.COLUMNS * row) for row, i in enumerate(group.members))
        return [found[i] for i in range(len(found))]

    def measure(self, inv_scale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
        """The norm of each gradient, finite where its values are, and whether all values pass a check."""
        norms = np.empty(len(self.members))
        if self._fused and check is Check.NOTHING and not accumulated:
            for fused, group in zip(self._fused, self.groups, strict=True):
                known = fused.norms(inv_scale)
                if known is None:
                    break
                norms[group.members] = known
            else:
                return norms.tolist(), True
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
        """An update with its scalars and counters, in a few native calls; gives whether it was done."""
        if not self._fused:
            if self._uses < 0:
                return False
            self._uses += 1  # gradients that never come the same way twice are not worth the arguments
            if self._uses < 2:
                return False
            self._fused = [FusedStep(group, self.streams[group.members], self.seed) for group in self.groups]
        for fused in self._fused:  # all before the first pass, with which the counters change
            fused.begin(bucket, grad_factor, len(self._fused) == 1)
        for fused in self._fused:
            fused.finish()
        if self._has_empty:  # no chunk of theirs has written their counters
            bucket.counters.commit()
        return True

    def accumulate(self, inv_scale: float, buffers: CounterBuffers) -> None:
        """Add the unscaled gradients to the accumulators."""
        for group in self.groups:
            group.accumulate(inv_scale, buffers)

    def update(
        self, s: Scalars, flags: Flags, *, grad_factors: Factors, buffers: CounterBuffers, step: int = 0
    ) -> None:
        """The one pass, for each group."""
        for fused in self._fused:
            fused.forget()
        for group in self.groups:
            if group.rounds:
                group.keys[:] = keys(self.seed, step, self.streams[group.members])
            same = isinstance(grad_factors, float)
            group.set_multipliers(grad_factors if same else np.take(grad_factors, group.members).tolist(), s.decay)
            group.update(s, flags._replace(averaged=flags.averaged and group.averaged), buffers)
