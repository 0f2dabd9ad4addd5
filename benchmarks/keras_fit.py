"""Seconds of a batch in `fit()`: the model, the optimizer and the digits of examples/keras_mnist.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import keras
import keras_mnist as example

BATCH, EPOCHS = 50, 2  # images in a batch, as in the example; epochs of one call of fit()


def in_turns(classes: Sequence[Callable[..., Any]], repeats: int) -> list[list[float]]:
    """Of a whole call of `fit()` with each class of optimizer in turn, round by round, after one that compiles."""
    images, labels, *_ = example.digits(seed=0)
    batches = example.Batches(images, labels, BATCH, seed=0)
    models, samples = [], []
    for cls in classes:
        keras.utils.set_random_seed(0)
        model = example.make_model(images.shape[1:])
        example.compile_model(model, example.make_optimizer((1 + repeats * EPOCHS) * len(batches), cls))
        model.fit(batches, shuffle=False, verbose=0)
        models.append(model)
        samples.append([])
    for _ in range(repeats):
        for model, seen in zip(models, samples, strict=True):
            start = time.perf_counter()
            model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0)
            seen.append((time.perf_counter() - start) / (EPOCHS * len(batches)))
    return samples
