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
        steps: Whether each parameter has its own number of updates and momentum product, for a host that shows them.

    Attributes:
        now: float64: calls, momentum product, skipped calls, and per parameter 1 where its accumulator holds a
            gradient.
        advanced: What the step at work will make of it; the kernel writes it over ``now`` as the first chunk moves, so
            that an interrupt at any point finds the counters telling whether anything has moved.
        commitment: Both of them.
    """

    def __init__(self, parameters: int, steps: bool = False) -> None:
        self.now: NDArray[np.float64] = np.zeros(SEEN + parameters * (3 if steps else 1))
        self.now[MOMENTUM_PRODUCT] = 1.0
        self._has_steps = steps
        self.advanced = self.now.copy()
        self._index()

    def _index(self) -> None:
        self.commitment = (self.now, self.advanced)
        # The same memory, whose single elements are read and written several times as fast.
        self._now: Any = self.now.data
        self._advanced: Any = self.advanced.data
        count = (len(self.now) - SEEN) // (3 if self._has_steps else 1)
        self._seen_now, self._seen_next = self.now[SEEN : SEEN + count], self.advanced[SEEN : SEEN + count]
        parts = [slice(SEEN + i * count, SEEN + (i + 1) * count) for i in (1, 2)]
        self._own = tuple(self.advanced[part] for part in parts) if self._has_steps else None
        self._shown = tuple(self.now[part] for part in parts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("now", "advanced", "_has_steps")}

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
        return len(self._seen_now) if self._has_steps else 0

    def start(self, updates: int, momentum_product: float, position: int, accumulation_steps: int) -> None:
        """Set the counters, as those of a run that was resumed."""
        self.now[CALLS] = updates * accumulation_steps + position
        self.now[MOMENTUM_PRODUCT] = momentum_product
        if self._has_steps:
            steps, products = self._shown
            steps[:], products[:] = updates, momentum_product

    @property
    def steps(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per parameter the number of updates and the momentum product: memory that changes with the counters."""
        steps, products = self._shown
        return steps, products

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
        if self._own is not None:
            steps, products = self._own
            steps.fill(self._now[SEEN + len(self._seen_now)] + 1.0)
            products.fill(momentum_product)

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
