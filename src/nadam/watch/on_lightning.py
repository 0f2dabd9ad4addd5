"""The callback for Lightning's Trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from nadam.watch.rows import Watch, Writer, checked_every, unwrapped, writers_of

# Lightning has two names; the one in use, else the one that is there.
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_name = next((name for name in _NAMES if name in sys.modules), None)
_name = _name or next((name for name in _NAMES if find_spec(name.partition(".")[0])), _NAMES[0])
Callback: Any = import_module(_name).Callback


class LightningCallback(Callback):  # type: ignore[misc]
    """Writes rows while a Trainer trains with `nadam.torch.NAdam` or `NAdamW`; with several, of the first.

    Only the process of global rank zero writes.

    Args:
        write: Called with each row: a `CSV`, a `TensorBoard`, any function of a dict; or a list of these.
        every: Of how many steps of the optimizer one is written, besides those that were skipped.
        tensors: Whether rows have norms of each parameter, its gradient and its update, for a copy of all parameters
            and several passes over them at each row.

    Raises:
        TypeError: When training begins: no optimizer is of this package.
        ValueError: ``every`` is no integer >= 1.
    """

    def __init__(self, write: Writer | Sequence[Writer], *, every: int = 1, tensors: bool = False) -> None:
        super().__init__()
        self._write, self._every, self._tensors = writers_of(write), checked_every(every), tensors
        self._watch: Watch | None = None
        self._stepped = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer."""
        ours = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "last_step")]
        self._optimizer = unwrapped((ours or trainer.optimizers)[0])
        params = pl_module.named_parameters() if self._tensors else ()
        write = self._write if trainer.is_global_zero else []
        self._watch, self._stepped = Watch(self._optimizer, write, every=self._every, params=params), False

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the parameters as they are, where norms of updates are asked for."""
        if self._watch is not None and unwrapped(optimizer) is self._optimizer:
            self._watch.before_step()
            self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Write a row, if there was a step and it is time for one."""
        if self._watch is not None and self._stepped:
            self._watch.after_step()
            self._stepped = False
