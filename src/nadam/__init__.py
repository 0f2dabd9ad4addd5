"""Nadam (Adam with Nesterov momentum), done completely: one update rule, compiled for every place where people train.

The optimizer for NumPy arrays is here; importing it imports no framework. The others are `nadam.keras`, `nadam.torch`
and `nadam.jax`.
"""

from nadam import checkpoint
from nadam.core import schedules
from nadam.kernels.threads import get_num_threads, set_num_threads
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
