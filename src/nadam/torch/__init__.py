"""Nadam for PyTorch: `NAdam`, in the place of `torch.optim.NAdam`, `NAdamW`, in that of timm's.

`param_groups` makes their groups, `release` frees gradients within the backward pass.
"""

try:
    import torch  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError('nadam.torch needs PyTorch: pip install "nadam[torch]"') from error

from nadam.core.step import StepReport
from nadam.torch.gradient_release import Release, release
from nadam.torch.groups import param_groups
from nadam.torch.nadamw import NAdamW
from nadam.torch.optimizer import NAdam

__all__ = ["NAdam", "NAdamW", "Release", "StepReport", "param_groups", "release"]
