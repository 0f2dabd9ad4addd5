"""The tensors of one call, sorted into tables by their number formats; the passes over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from sys import float_info
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.core.clock import Commit
from nadam.core.element import Flags
from nadam.core.gradient import Check
from nadam.core.scalars import Scalars
from nadam.kernels import native
from nadam.kernels.combined import Combined
from nadam.kernels.table import Table

if TYPE_CHECKING:
    from nadam.core.step import Part

# Float64 gradients whose squares overflow are measured again times this: no square of theirs overflows then.
SHRINK = 2.0**-600


class Group(NamedTuple):
    """A table, and which of the call's tensors are in it."""

    table: Table
    members: NDArray[np.int64]
    decays: NDArray[np.float64]  # 1, or 0 for a tensor that is excluded from weight decay
    averaged: bool = True  # whether the pass keeps the moving average, or the host does after it


def keys(seed: int, step: int, members: NDArray[np.int64]) -> NDArray[np.uint32]:
    """A key for each tensor and step, from which the rounding by chance of each of its elements follows."""
    state = np.random.SeedSequence([seed, step]).generate_state(2)
    made: NDArray[np.uint32] = state[0] + members.astype(np.uint32) * (state[1] | np.uint32(1))
    return made


class Plan:
    """The tensors of one call.

    Args:
        groups: Their tables; each tensor is in one.
        members: Which of the optimizer's parameters they are.
        seed: Of the rounding by chance, where there is any.
        combines: Whether to combine passes with what is around them from the second update on, where that can be.
    """

    def __init__(
        self, groups: Sequence[Group], members: NDArray[np.int64], seed: int = 0, combines: bool = False
    ) -> None:
        self.groups, self.members, self.seed = groups, members, seed
        self._uses = 0 if combines and self._can_combine() else -1
        self._combined: Combined | None = None

    def _can_combine(self) -> bool:
        if len(self.groups) != 1 or not native.mathematical_functions():
            return False
        table, _, _, averaged = self.groups[0]
        return bool(averaged and len(table.chunks) and not table.rounded and not table.worth_sharing)

    def measure(self, unscale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
        """Read the gradients once.

        Args:
            unscale: Multiplies each gradient.
            accumulated: Whether the accumulator is then added, for the norms.
            check: What is asked of the values of the gradients themselves.

        Returns:
            The norm of each tensor, finite where its values are; and whether all values pass the check.
        """
        if self._combined is not None and check is Check.NOTHING and not accumulated:
            known = self._combined.norms(unscale)
            if known is not None:
                return known, True
        norms = np.empty(len(self.members))
        for table, members, *_ in self.groups:
            largest = sqrt(table.largest) if check is Check.SQUARES_FINITE else table.largest
            counting = check is not Check.NOTHING and accumulated
            sums, outside = table.measure(unscale, accumulated, largest if counting else None)
            # A value that is too large makes the sum of squares so. So may many that are not: then they are counted.
            bound = min(largest, sqrt(float_info.max)) ** 2
            if check is not Check.NOTHING and not accumulated and not (sums <= bound).all():
                outside = table.measure(unscale, accumulated, largest)[1]
            if outside:
                return [], False
            norms[members] = np.sqrt(sums)
            overflowed = np.isinf(sums)
            if overflowed.any():
                sums, _ = table.measure(unscale, accumulated, largest, SHRINK)
                norms[members[overflowed]] = [sqrt(total) / SHRINK for total in sums[overflowed]]
        return norms.tolist(), True

    def update_at_once(self, part: Part, grad_factor: float) -> bool:
        """An update without accumulation, the counters and all, in one foreign call.

        Args:
            part: Whose plan this is.
            grad_factor: What multiplies all gradients.

        Returns:
            Whether it was done; if not, nothing has changed.
        """
        if self._combined is None:
            if self._uses < 0:
                return False
            self._uses += 1  # gradients that never come the same way twice are not worth the arguments
            if self._uses < 2:
                return False
            table, _, decays, _ = self.groups[0]
            self._combined = Combined(table, decays)
        self._combined.update(part, grad_factor)
        return True

    def accumulate(self, unscale: float, commit: Commit) -> None:
        """Add the unscaled gradients to the accumulators."""
        for table, *_ in self.groups:
            table.accumulate(unscale, commit)

    def update(
        self,
        s: Scalars,
        flags: Flags,
        *,
        grad_factors: Sequence[float] | float,
        commit: Commit,
        step: int = 0,
    ) -> None:
        """The one pass.

        Args:
            s: This update's scalars.
            flags: What it does besides the rule.
            grad_factors: What multiplies the gradient of each tensor, or one factor for all.
            commit: The counters before and after.
            step: Number of this update; what is rounded by chance depends on it.
        """
        if self._combined is not None:
            self._combined.forget()
        for table, members, decays, averaged in self.groups:
            if table.rounded:
                table.keys[:] = keys(self.seed, step, self.members[members])
            same = isinstance(grad_factors, float)
            table.set_multipliers(grad_factors if same else np.take(grad_factors, members).tolist(), s.decay, decays)
            table.update(s, flags._replace(averaged=flags.averaged and averaged), commit)
