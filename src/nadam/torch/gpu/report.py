"""What a step on GPUs did: read only when somebody asks, so that a step need not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nadam.core.step import StepReport
from nadam.kernels.gpu.passes import SKIP, UPDATE


class DeviceReport:
    """The attributes of `StepReport`, read from the device; of a step in a CUDA graph, what its last replay did."""

    def __init__(self, values: Sequence[Tensor], measured: bool, clipped: bool, skipped: int = 0) -> None:
        self._values, self._measured, self._clipped, self._skipped = values, measured, clipped, skipped

    def and_of(self, others: Sequence[DeviceReport]) -> DeviceReport:
        """The report of a step on this device and others."""
        values = [value for report in (self, *others) for value in report._values]
        return DeviceReport(values, self._measured, self._clipped, self._skipped)

    def read(self) -> StepReport:
        """The report as it is now; waits for the device."""
        rows = [row for values in self._values for row in values.tolist()]
        mode, step, lr, norm, _, skipped = rows[0]
        factor = min((row[4] for row in rows), key=lambda value: (value == value, value))  # a NaN before all others
        updated = mode == UPDATE
        return StepReport(
            step=int(step),
            learning_rate=lr,
            grad_norm=norm if self._measured and updated else None,
            clip_factor=factor if self._clipped and updated else None,
            skipped_steps=self._skipped + int(skipped),
            skipped=mode == SKIP,
        )

    def numbers(self) -> Tensor:
        """Norm, clip factor and skipped calls, on the (first) device."""
        return self._values[0][0, 3:6]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __repr__(self) -> str:
        return repr(self.read())
