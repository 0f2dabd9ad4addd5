"""The callback for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from nadam.watch.rows import Watch, Writer, checked_every, writers_of


class TransformersCallback(TrainerCallback):  # type: ignore[misc]
    """Writes rows while a Trainer trains with `nadam.torch.NAdam` or `NAdamW`.

    Only the first process writes.

    Args:
        write: Called with each row: a `CSV`, a `TensorBoard`, any function of a dict; or a list of these.
        every: Of how many steps of the optimizer one is written, besides those that were skipped.
        tensors: Whether rows have norms of each parameter, its gradient and its update, for a copy of all parameters
            and several passes over them at each row.

    Raises:
        TypeError: At the first step: the optimizer is not of this package.
        ValueError: ``every`` is no integer >= 1.
    """

    def __init__(self, write: Writer | Sequence[Writer], *, every: int = 1, tensors: bool = False) -> None:
        self._write, self._every, self._tensors = writers_of(write), checked_every(every), tensors
        self._watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at another optimizer."""
        self._watch = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Find the optimizer; keep the parameters as they are, where norms of updates are asked for."""
        if self._watch is None:
            params = given["model"].named_parameters() if self._tensors else ()
            write = self._write if state.is_world_process_zero else []
            self._watch = Watch(given["optimizer"], write, every=self._every, params=params)
        self._watch.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write a row, if it is time for one."""
        if self._watch is not None:
            self._watch.after_step()
