"""The optimizers by name, in libraries that keep a list of the names that they know."""

from __future__ import annotations

from typing import Any

from nadam.torch.nadamw import NAdamW
from nadam.torch.optimizer import NAdam


def register_timm(registry: Any = None) -> None:
    """Have timm know `NAdam` as ``nadam.nadam`` and `NAdamW` as ``nadam.nadamw``; its own stay what they are.

    Args:
        registry: A `timm.optim.OptimizerRegistry`; None for the one that `timm.optim.create_optimizer_v2` looks in.

    Raises:
        ImportError: There is no timm, or one older than 1.0.12, which has no registry.
    """
    from timm.optim import OptimInfo

    if registry is None:
        from timm.optim._optim_factory import default_registry

        registry = default_registry
    for cls in (NAdam, NAdamW):
        name, described = f"nadam.{cls.__name__.lower()}", (cls.__doc__ or "").partition("\n")[0]
        registry.register(OptimInfo(name, cls, described, has_betas=True))
