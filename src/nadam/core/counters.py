"""The counters of a run. They lie in one array, so that they change together with what they count."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# CALLS so far, momentum product, calls SKIPPED; then per parameter whether it had a gradient in this window.
CALLS, MOMENTUM_PRODUCT, SKIPPED, SEEN = range(4)


class CounterBuffers(NamedTuple):
    """The counters before and after a step, for the kernels: they change as what they count moves."""

    current: NDArray[np.float64]
    next: NDArray[np.float64]
    shown: int  # parameters that have counters of their own, which lie at the end


class Counters:
    """Step counters: calls, momentum product, skipped calls.

    Attributes:
        current: float64: calls, momentum product, skipped calls, and per parameter 1 where its accumulator holds a
            gradient; then, with ``shown``, for a host that shows them, the updates and momentum product of each.
        next: What the step at work will make of it. The kernel writes it over ``current`` as the first chunk moves, and
            what is a parameter's own as that one moves: after an interrupt the counters tell what has moved.
        buffers: Both of them.
    """

    def __init__(self, parameters: int, shown: bool = False) -> None:
        self.current: NDArray[np.float64] = np.zeros(SEEN + parameters * (3 if shown else 1))
        self.current[MOMENTUM_PRODUCT] = 1.0
        self._has_own = shown
        self.next = self.current.copy()
        self._index()

    def _index(self) -> None:
        # The same memory, whose single elements are read and written several times as fast.
        self._current: Any = self.current.data
        self._next: Any = self.next.data
        count = (len(self.current) - SEEN) // (3 if self._has_own else 1)
        self.seen = self.current[SEEN : SEEN + count]  # per parameter: 1 where it had a gradient since the last update
        self.shown = count if self._has_own else 0  # parameters that have their own updates and momentum product
        self._next_own = self.next[SEEN + count :].reshape(2, count) if self._has_own else None
        self.buffers = CounterBuffers(self.current, self.next, self.shown)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("current", "next", "_has_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()

    @property
    def calls(self) -> int:
        """Calls so far, those skipped not counted."""
        return int(self._current[CALLS])

    @property
    def momentum_product(self) -> float:
        """Product of the momenta of all updates so far."""
        return float(self._current[MOMENTUM_PRODUCT])

    @property
    def skipped(self) -> int:
        """Calls that were skipped because a gradient was not finite."""
        return int(self._current[SKIPPED])

    def start(self, updates: int, momentum_product: float, position: int, accumulation_steps: int) -> None:
        """Set the counters, as those of a run that was resumed."""
        self.current[CALLS] = updates * accumulation_steps + position
        self.current[MOMENTUM_PRODUCT] = momentum_product
        if self._has_own:
            self.own[1], self.own[2] = updates, momentum_product

    @property
    def own(self) -> NDArray[np.float64]:
        """A view of shape (3, parameters): whether each has a gradient in this window, updates, momentum product."""
        return self.current[SEEN:].reshape(3, -1)

    def skip(self) -> None:
        """Count a call that changed nothing."""
        self._current[SKIPPED] += 1.0

    def prepare_update(self, momentum_product: float, accumulating: bool) -> None:
        """Lay out what an update makes of the counters."""
        current, after = self._current, self._next
        after[CALLS], after[MOMENTUM_PRODUCT], after[SKIPPED] = current[CALLS] + 1.0, momentum_product, current[SKIPPED]
        if accumulating:
            self.next[SEEN : SEEN + len(self.seen)] = 0.0
        if self._next_own is not None:
            self._next_own[0] = current[SEEN + len(self.seen)] + 1.0
            self._next_own[1] = momentum_product

    def prepare_accumulation(self, members: NDArray[np.int64]) -> None:
        """Lay out what a call that only accumulates gradients of these parameters makes of the counters."""
        self.next[:] = self.current
        self._next[CALLS] += 1.0
        self.next[SEEN + members] = 1.0

    def commit(self) -> None:
        """Make it so; the kernel has, unless there was nothing to move."""
        self.current[:] = self.next
