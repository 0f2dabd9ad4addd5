"""Seconds of a batch in `fit()`: the model, the optimizer and the digits of examples/keras_mnist.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import keras
import keras_mnist as example

BATCH, EPOCHS = 50, 4  # images in a batch, as in the example; epochs of a call of fit(), the first of which compiles


class Stopwatch(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(time.perf_counter() - self._start)


def in_turns(classes: Sequence[Callable[..., Any]], repeats: int) -> list[list[float]]:
    """Of a call of `fit()` with each class of optimizer in turn, on a new model; without the epoch that compiles.

    One call each, since on JAX a second one with keras.optimizers.Nadam and a moving average fails.
    """
    images, labels, *_ = example.digits(seed=0)
    batches = example.Batches(images, labels, BATCH, seed=0)
    samples: list[list[float]] = [[] for _ in classes]
    for _ in range(repeats):
        for cls, seen in zip(classes, samples, strict=True):
            keras.utils.set_random_seed(0)
            model, watch = example.make_model(images.shape[1:]), Stopwatch()
            example.compile_model(model, example.make_optimizer(EPOCHS * len(batches), cls))
            model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[watch])
            seen.append(median(watch.epochs[1:]) / len(batches))
    return samples
