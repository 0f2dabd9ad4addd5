"""The counters of a run. They lie in one array, so that they change together with what they count."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# CALLS so far, momentum product, calls SKIPPED; then per parameter whether it had a gradient in this window.
CALLS, MOMENTUM_PRODUCT, SKIPPED, SEEN = range(4)


class Commit(NamedTuple):
    """The counters of a step, for the kernels: they change as what they count moves."""

    now: NDArray[np.float64]
    advanced: NDArray[np.float64]  # what they become
    shown: int  # parameters that have counters of their own, which lie at the end


class Clock:
    """Step counters: calls, momentum product, skipped calls.

    Args:
        parameters: How many parameters there are.
        shown: Whether each parameter has its own number of updates and momentum product, for a host that shows them.

    Attributes:
        now: float64: calls, momentum product, skipped calls, and per parameter 1 where its accumulator holds a
            gradient; then, where they are shown, the updates of each and the momentum product of each.
        advanced: What the step at work will make of it; the kernel writes it over ``now`` as the first chunk moves, and
            what is a parameter's own as that parameter moves, so that an interrupt at any point finds the counters
            telling what has moved.
        commitment: Both of them.
    """

    def __init__(self, parameters: int, shown: bool = False) -> None:
        self.now: NDArray[np.float64] = np.zeros(SEEN + parameters * (3 if shown else 1))
        self.now[MOMENTUM_PRODUCT] = 1.0
        self._has_own = shown
        self.advanced = self.now.copy()
        self._index()

    def _index(self) -> None:
        # The same memory, whose single elements are read and written several times as fast.
        self._now: Any = self.now.data
        self._advanced: Any = self.advanced.data
        count = (len(self.now) - SEEN) // (3 if self._has_own else 1)
        self._seen_now, self._seen_next = self.now[SEEN : SEEN + count], self.advanced[SEEN : SEEN + count]
        self._next = self.advanced[SEEN + count :].reshape(-1, count) if self._has_own else None
        self.commitment = Commit(self.now, self.advanced, self.shown)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("now", "advanced", "_has_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()

    @property
    def calls(self) -> int:
        """Calls so far, those skipped not counted."""
        return int(self._now[CALLS])

    @property
    def momentum_product(self) -> float:
        """Product of the momenta of all updates so far."""
        return float(self._now[MOMENTUM_PRODUCT])

    @property
    def skipped(self) -> int:
        """Calls that were skipped because a gradient was not finite."""
        return int(self._now[SKIPPED])

    @property
    def seen(self) -> NDArray[np.float64]:
        """Per parameter: 1 where it had a gradient since the last update."""
        return self._seen_now

    @property
    def shown(self) -> int:
        """Parameters that have their own number of updates and momentum product."""
        return len(self._seen_now) if self._has_own else 0

    def start(self, updates: int, momentum_product: float, position: int, accumulation_steps: int) -> None:
        """Set the counters, as those of a run that was resumed."""
        self.now[CALLS] = updates * accumulation_steps + position
        self.now[MOMENTUM_PRODUCT] = momentum_product
        if self._has_own:
            self.own[1], self.own[2] = updates, momentum_product

    @property
    def own(self) -> NDArray[np.float64]:
        """What the parameters show, in memory that changes with the counters.

        Of shape (3, parameters): whether they have a gradient in this window, updates, momentum product.
        """
        return self.now[SEEN:].reshape(3, -1)

    def skip(self) -> None:
        """Count a call that changed nothing."""
        self._now[SKIPPED] += 1.0

    def prepare_update(self, momentum_product: float, accumulating: bool) -> None:
        """Lay out what an update makes of the counters."""
        now, advanced = self._now, self._advanced
        advanced[CALLS], advanced[MOMENTUM_PRODUCT], advanced[SKIPPED] = (
            now[CALLS] + 1.0,
            momentum_product,
            now[SKIPPED],
        )
        if accumulating:
            self._seen_next[:] = 0.0
        if self._next is not None:
            self._next[0] = now[SEEN + len(self._seen_now)] + 1.0
            self._next[1] = momentum_product

    def prepare_accumulation(self, seen: NDArray[np.int64]) -> None:
        """Lay out what a call that only accumulates makes of the counters.

        Args:
            seen: Which parameters it has a gradient for.
        """
        self.advanced[:] = self.now
        self._advanced[CALLS] += 1.0
        self.advanced[SEEN + seen] = 1.0

    def commit(self) -> None:
        """Make it so; the kernel has, unless there was nothing to move."""
        self.now[:] = self.advanced
