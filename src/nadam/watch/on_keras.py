"""The callback for `keras.Model.fit`, on all of Keras's backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from nadam.watch.rows import Watch, Writer, checked_every, unwrapped, writers_of


class KerasCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes rows while `fit` trains with `nadam.keras.Nadam`.

    On JAX and TensorFlow, whose steps are compiled, rows have a gradient norm with ``track_grad_norm``, a clip factor
    with that or ``skip_nonfinite``, and never the name of the parameter that was not finite.

    Args:
        write: Called with each row: a `CSV`, a `TensorBoard`, any function of a dict; or a list of these.
        every: Of how many batches one is written; nothing is looked at in between.
        tensors: Whether rows have norms of each variable and its update, and on the torch backend of its gradient, for
            a copy of all variables and several passes over them at each row.

    Raises:
        TypeError: When training begins: the optimizer is not of this package.
        ValueError: ``every`` is no integer >= 1.
    """

    def __init__(self, write: Writer | Sequence[Writer], *, every: int = 1, tensors: bool = False) -> None:
        super().__init__()
        self._write, self._every, self._tensors = writers_of(write), checked_every(every), tensors
        self._watch: Watch | None = None
        self._batches = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """See that the optimizer is one that tells what it does."""
        unwrapped(self.model.optimizer)
        self._watch, self._batches = None, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Keep the variables as they are, where norms of updates are asked for."""
        self._batches += 1
        if self._tensors and self._batches % self._every == 0:
            self._now().before_step()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a row, if it is time for one."""
        if self._batches % self._every == 0:
            self._now().after_step()

    def _now(self) -> Watch:
        # On JAX, asking for the model brings the variables here from the compiled step: so not at every batch.
        model = self.model
        if self._watch is None:
            variables = model.trainable_variables if self._tensors else ()
            params = {getattr(variable, "path", variable.name): variable for variable in variables}
            self._watch = Watch(model.optimizer, self._write, params=params)
        return self._watch
