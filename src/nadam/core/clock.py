"""The counters of a run. They lie in one array, so that they change together with what they count."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# CALLS so far, momentum product, calls SKIPPED; then per parameter whether it had a gradient in this window.
CALLS, MOMENTUM_PRODUCT, SKIPPED, SEEN = range(4)


class Clock:
    """How far a run is.

    Args:
        parameters: How many parameters there are.

    Attributes:
        now: float64: calls, momentum product, skipped calls, and per parameter 1 where its accumulator holds a
            gradient.
        advanced: What the step at work will make of it; the kernel writes it over ``now`` as the first chunk moves, so
            that an interrupt at any point finds the counters telling whether anything has moved.
        commitment: Both of them.
    """

    def __init__(self, parameters: int) -> None:
        self.now: NDArray[np.float64] = np.zeros(SEEN + parameters)
        self.now[MOMENTUM_PRODUCT] = 1.0
        self.advanced = self.now.copy()
        self._index()

    def _index(self) -> None:
        self.commitment = (self.now, self.advanced)
        # The same memory, whose single elements are read and written several times as fast.
        self._now: Any = self.now.data
        self._advanced: Any = self.advanced.data

    def __getstate__(self) -> dict[str, NDArray[np.float64]]:
        return {"now": self.now, "advanced": self.advanced}

    def __setstate__(self, state: dict[str, NDArray[np.float64]]) -> None:
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
        return self.now[SEEN:]

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
            self.advanced[SEEN:] = 0.0

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
