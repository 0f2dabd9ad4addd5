"""Nadam for Keras 3, on its torch, JAX and TensorFlow backends."""

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    raise ImportError(
        'nadam.keras needs Keras 3: pip install "nadam[keras]", and one of torch, jax, tensorflow'
    ) from error

from nadam.core.step import StepReport
from nadam.keras.migration import from_stock, to_stock
from nadam.keras.optimizer import Nadam

__all__ = ["Nadam", "StepReport", "from_stock", "to_stock"]
