"""Nadam for JAX: `nadam` and `nadamw` in the place of optax's, and `fused`, the whole step as one function."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nadam.core.step import StepReport
    from nadam.jax.fused_state import FusedState
    from nadam.jax.fused_step import Fused, fused
    from nadam.jax.state import from_optax, to_optax
    from nadam.jax.transforms import NadamState, nadam, nadamw

__all__ = ["Fused", "FusedState", "NadamState", "StepReport", "from_optax", "fused", "nadam", "nadamw", "to_optax"]

# Where each name is. Keras on JAX comes through here too, and has no need of optax.
_HOMES = {
    "StepReport": "nadam.core.step",
    "FusedState": "nadam.jax.fused_state",
    **dict.fromkeys(("Fused", "fused"), "nadam.jax.fused_step"),
    **dict.fromkeys(("NadamState", "nadam", "nadamw"), "nadam.jax.transforms"),
    **dict.fromkeys(("from_optax", "to_optax"), "nadam.jax.state"),
}


if not TYPE_CHECKING:  # to which any name would be right then

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'nadam.jax' has no attribute {name!r}")
        try:
            value = getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError('nadam.jax needs JAX and optax: pip install "nadam[jax]"') from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
