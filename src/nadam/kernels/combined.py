"""A pass and what goes before or after it in one foreign call, for tables so small that Python would take longer.

The kernels are in scalars.py; here are their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.scalars import Settings
from nadam.kernels import native, threads
from nadam.kernels.spans import TICKET
from nadam.kernels.table import Table, address

if TYPE_CHECKING:
    from nadam.core.step import Part

# Words of the arguments of both kernels: where the pass is, where its own arguments are, number of tensors.
PASS, ARGUMENTS, NUM_TENSORS = range(3)
# Of `norms`: where to write them, and whether all are finite; float64: the square of what multiplies the gradients.
NORMS, FINITE, SQUARE = range(3, 6)
# Of `update`: parameters that show their own number of steps; where it is kept which tensors decay; then float64, from
# SETTINGS on the fields of `scalars.Settings`.
SHOWN, DECAYS, GRAD_FACTOR, SMALLEST, SETTINGS = range(3, 8)
NEVER = math.inf  # as the frequency of overwriting: the remainder is then the step itself


class Combined:
    """The passes over a table with what Python would do around them: the same numbers, bit for bit.

    Args:
        table: Not so large that threads share it, and not rounded by chance.
        decays: As of `Group`.
    """

    def __init__(self, table: Table, decays: NDArray[np.float64]) -> None:
        self._table, self._decays = table, decays
        self._norms = np.zeros(len(table.sizes))
        measuring, updating = (np.zeros(SETTINGS + len(Settings._fields), np.int64) for _ in range(2))
        # Their words as integers and as float64: such a view is read and written faster than an array.
        self._measured: Any = measuring.data
        self._updated: Any = updating.data
        self._square: Any = measuring.view(np.float64).data
        self._inputs: Any = updating.view(np.float64).data
        self._addresses = address(measuring), address(updating)
        self._measured[NUM_TENSORS] = self._updated[NUM_TENSORS] = len(table.sizes)
        self._measured[NORMS], self._updated[DECAYS] = address(self._norms), address(decays)
        self._norms_kernel: Callable[[int, int], None] | None = None
        self._update_kernel = native.kernel("scalars", "update", table.compute)
        self._pass, self._arguments = self._update_kernel, 0
        self._known: tuple[Any, ...] = (None, None, None)
        self._has_empty = 0 in table.sizes

    def norms(self, unscale: float) -> list[float] | None:
        """The norm of each tensor's gradient; None where a square has overflowed, and they are to be measured again."""
        if self._norms_kernel is None:
            measure, self._measured[ARGUMENTS] = self._table.ready("measure", None, False, False)
            self._measured[PASS] = native.address_of(measure)
            self._norms_kernel = native.kernel("scalars", "norms")
        self._square[SQUARE] = unscale**2
        self._norms_kernel(self._addresses[0], threads.UNTIL_DONE)
        return self._norms.tolist() if self._measured[FINITE] else None

    def update(self, part: Part, grad_factor: float) -> None:
        """The one pass, and the counters."""
        h, now, clock, _ = part
        known = self._known
        if known[0] is not h or known[1] is not now or known[2] is not clock:
            self._settle(part)
        table = self._table
        self._inputs[GRAD_FACTOR] = grad_factor
        self._update_kernel(self._addresses[1], threads.SLICE)
        while table.shared[TICKET] < len(table.chunks):
            self._pass(self._arguments, threads.SLICE)
        if self._has_empty:  # no chunk of theirs has written their counters
            clock.commit()

    def forget(self) -> None:
        """Lay everything out anew: the table's passes have run otherwise meanwhile."""
        self._known = (None, None, None)

    def _settle(self, part: Part) -> None:
        """Lay out what stays as it is for as long as the settings do."""
        self.forget()
        self._table.forget_multipliers()
        h, now, clock, _ = part
        self._pass, self._arguments = self._table.ready("one_pass", clock.commitment, *h.flags, False)
        words = self._updated
        words[PASS], words[ARGUMENTS], words[SHOWN] = native.address_of(self._pass), self._arguments, clock.shown
        settings = h.settings(now)
        settings = settings._replace(ema_overwrite_frequency=settings.ema_overwrite_frequency or NEVER)
        for place, number in enumerate((self._table.smallest, *settings), SMALLEST):
            self._inputs[place] = float(number)
        self._known = part[:3]
