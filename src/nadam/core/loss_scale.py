"""Dynamic loss scaling: how large the factor is from step to step."""

from dataclasses import dataclass

# A float32 loss times the largest does not overflow for want of a smaller scale, and 1 / the smallest is finite.
SMALLEST, LARGEST = 2.0**-126, 2.0**127


@dataclass
class DynamicLossScale:
    """A factor that is halved when a gradient is not finite, and doubled after a run of steps in which all were.

    Attributes:
        scale: What the loss is multiplied by.
        growth_steps: Length of the run after which it doubles.
        good_steps: Length of the present run.

    Example:
        >>> scale = DynamicLossScale(scale=8.0, growth_steps=2)
        >>> for finite in (True, True, False):
        ...     scale.update(finite)
        ...     print(scale.scale)
        8.0
        16.0
        8.0
    """

    scale: float
    growth_steps: int
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Move on by one step."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2.0, SMALLEST)
        elif self.good_steps >= self.growth_steps:
            self.scale, self.good_steps = min(self.scale * 2.0, LARGEST), 0
