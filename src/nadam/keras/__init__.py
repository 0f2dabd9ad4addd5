"""Nadam for Keras 3, on its torch, JAX and TensorFlow backends."""

import os as _os
from importlib.util import find_spec as _find_spec

try:
    import keras as _keras  # noqa: F401
except (ImportError, ValueError) as error:  # the latter for a backend that Keras does not know
    if _find_spec("keras") is None:
        raise ImportError(
            'nadam.keras needs Keras 3: pip install "nadam[keras]", and one of torch, jax, tensorflow'
        ) from error
    _chosen = _os.environ.get("KERAS_BACKEND")
    _known = [name for name in ("torch", "jax", "tensorflow") if name != _chosen and _find_spec(name) is not None]
    _set = f"KERAS_BACKEND={_chosen!r}" if _chosen else "KERAS_BACKEND is not set, so that it is 'tensorflow'"
    raise ImportError(
        f"Keras cannot be imported ({error}): {_set}: expected a backend that is installed, here {_known}, set before "
        "the import"
    ) from error

from nadam.core.step import StepReport
from nadam.keras.migration import from_stock, to_stock
from nadam.keras.optimizer import Nadam

__all__ = ["Nadam", "StepReport", "from_stock", "to_stock"]
