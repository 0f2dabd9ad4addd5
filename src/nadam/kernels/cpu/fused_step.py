"""A whole step of a small tensor group, scalars and counters and norms too, in one native call each.

The kernels are in prepare.py; here are their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nadam.core.scalars import Settings
from nadam.core.step import Bucket
from nadam.kernels.cpu import machine_code, threads
from nadam.kernels.cpu.group import TensorGroup
from nadam.kernels.layout import TICKET
from nadam.kernels.strides import address

# Words of the arguments of both kernels: where the pass is, where its own arguments are, number of tensors.
PASS, ARGUMENTS, NUM_TENSORS = range(3)
# Of `norms`: where to write them, and whether all are finite; float64: the square of what multiplies the gradients.
NORMS, FINITE, SQUARE = range(3, 6)
# Of `update`: parameters that show their own number of steps; where it is kept which tensors decay; then float64, from
# SETTINGS on the fields of `scalars.Settings`.
SHOWN, DECAYS, GRAD_FACTOR, SMALLEST, SETTINGS = range(3, 8)
NEVER = math.inf  # as the frequency of overwriting: the remainder is then the step itself


class FusedStep:
    """The passes over a group with what Python would do around them: the same numbers, bit for bit.

    Not for a group so large that threads share it, or one that is rounded stochastically.
    """

    def __init__(self, group: TensorGroup) -> None:
        self._group = group
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
        self._norms_kernel: Callable[[int, int], None] | None = None
        self._update_kernel = machine_code.kernel("prepare", "update", group.compute)
        self._pass, self._arguments = self._update_kernel, 0
        self._known: tuple[Any, ...] = (None, None, None)
        self._has_empty = 0 in group.sizes

    def norms(self, inv_scale: float) -> list[float] | None:
        """The norm of each tensor's gradient; None where a square has overflowed, and they are to be measured again."""
        if self._norms_kernel is None:
            measure, self._measured[ARGUMENTS] = self._group.ready("measure", None, False, False)
            self._measured[PASS] = machine_code.address_of(measure)
            self._norms_kernel = machine_code.kernel("prepare", "norms")
        self._square[SQUARE] = inv_scale**2
        self._norms_kernel(self._addresses[0], threads.UNTIL_DONE)
        return self._norms.tolist() if self._measured[FINITE] else None

    def update(self, bucket: Bucket, grad_factor: float) -> None:
        """The one pass, and the counters."""
        h, now, counters, _ = bucket
        known = self._known
        if known[0] is not h or known[1] is not now or known[2] is not counters:
            self._bind_arguments(bucket)
        group = self._group
        self._inputs[GRAD_FACTOR] = grad_factor
        self._update_kernel(self._addresses[1], threads.SLICE)
        while group.shared[TICKET] < len(group.chunks):
            self._pass(self._arguments, threads.SLICE)
        if self._has_empty:  # no chunk of theirs has written their counters
            counters.commit()

    def forget(self) -> None:
        """Lay everything out anew: the group's passes have run otherwise meanwhile."""
        self._known = (None, None, None)

    def _bind_arguments(self, bucket: Bucket) -> None:
        """Lay out what stays as it is for as long as the settings do."""
        self.forget()
        self._group.forget_multipliers()
        h, now, counters, _ = bucket
        self._pass, self._arguments = self._group.ready("one_pass", counters.buffers, *h.flags, False)
        words = self._updated
        words[PASS], words[ARGUMENTS], words[SHOWN] = (
            machine_code.address_of(self._pass),
            self._arguments,
            counters.shown,
        )
        settings = h.settings(now)
        settings = settings._replace(ema_overwrite_frequency=settings.ema_overwrite_frequency or NEVER)
        for place, number in enumerate((self._group.smallest, *settings), SMALLEST):
            self._inputs[place] = float(number)
        self._known = bucket[:3]
