"""Nadam for PyTorch: `NAdam`, in the place of `torch.optim.NAdam`."""

try:
    import torch  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError('nadam.torch needs PyTorch: pip install "nadam[torch]"') from error

from nadam.core.step import StepReport
from nadam.torch.optimizer import NAdam

__all__ = ["NAdam", "StepReport"]
