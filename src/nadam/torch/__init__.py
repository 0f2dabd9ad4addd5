"""Nadam for PyTorch: `NAdam`, in the place of `torch.optim.NAdam`, and `NAdamW`, in that of timm's."""

try:
    import torch  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError('nadam.torch needs PyTorch: pip install "nadam[torch]"') from error

from nadam.core.step import StepReport
from nadam.torch.nadamw import NAdamW
from nadam.torch.optimizer import NAdam

__all__ = ["NAdam", "NAdamW", "StepReport"]
