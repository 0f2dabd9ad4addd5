"""Nadam for NumPy arrays: the embedded default, which needs no framework."""

from nadam.core.step import StepReport
from nadam.numpy.loss_scale import LossScaleOptimizer
from nadam.numpy.optimizer import Nadam

__all__ = ["LossScaleOptimizer", "Nadam", "StepReport"]
