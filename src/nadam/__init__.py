"""Nadam (Adam with Nesterov momentum), done completely: one update rule, compiled for every place where people train.

The optimizer for NumPy arrays is here; importing it imports no framework. The others are `nadam.keras`, `nadam.torch`
and `nadam.jax`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nadam import checkpoint, conformance, jax, keras, torch, watch  # noqa: F401
    from nadam.core import schedules
    from nadam.kernels.cpu.threads import get_num_threads, set_num_threads
    from nadam.numpy import LossScaleOptimizer, Nadam, StepReport

__version__ = "0.1.0"

__all__ = [
    "LossScaleOptimizer",
    "Nadam",
    "StepReport",
    "checkpoint",
    "get_num_threads",
    "schedules",
    "set_num_threads",
]

# Where each name is; loaded when it is first asked for, since NumPy alone takes most of a fifth of a second.
_HOMES = {
    "LossScaleOptimizer": "nadam.numpy",
    "Nadam": "nadam.numpy",
    "StepReport": "nadam.numpy",
    "get_num_threads": "nadam.kernels.cpu.threads",
    "set_num_threads": "nadam.kernels.cpu.threads",
}
# Those of frameworks are in no listing, or whoever goes through it would import them.
_MODULES = {
    "schedules": "nadam.core.schedules",
    **{name: f"nadam.{name}" for name in ("checkpoint", "conformance", "jax", "keras", "torch", "watch")},
}

if not TYPE_CHECKING:  # to which any name would be right then

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = import_module(_MODULES[name])
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module 'nadam' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
