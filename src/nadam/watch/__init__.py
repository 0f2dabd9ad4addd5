"""Watching a run: what each step did, as rows of numbers for CSV files, TensorBoard or any function.

All of it is what ``last_step`` of an optimizer reports. Importing this imports no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nadam.watch.rows import Row, Watch, Writer, row
from nadam.watch.writers import CSV, TensorBoard

if TYPE_CHECKING:
    from nadam.watch.on_keras import KerasCallback
    from nadam.watch.on_lightning import LightningCallback
    from nadam.watch.on_transformers import TransformersCallback

__all__ = [
    "CSV",
    "KerasCallback",
    "LightningCallback",
    "Row",
    "TensorBoard",
    "TransformersCallback",
    "Watch",
    "Writer",
    "row",
]

# Where each callback is; loaded with its framework when it is first asked for.
_HOMES = {
    "KerasCallback": "nadam.watch.on_keras",
    "LightningCallback": "nadam.watch.on_lightning",
    "TransformersCallback": "nadam.watch.on_transformers",
}

if not TYPE_CHECKING:  # to which any name would be right then

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'nadam.watch' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
