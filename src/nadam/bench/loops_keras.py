"""Time whole steps of Keras's `fit()` with ours and Keras's own optimizers in turns, on one backend.

"Full" is global_clipnorm, weight_decay and use_ema, which Keras's own have as well. SGD is there to see what a step
takes without an optimizer to speak of.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import keras
import numpy as np

import nadam.keras
from nadam.bench import loops as shared
from nadam.bench.loops import BIG, CONVOLUTIONS, DENSE, MLP, SMALL, TRANSFORMER, Sample, full_settings
from nadam.bench.records import OURS

# Whole steps of Keras's Nadam over ours: plain and full.
OVER_NADAM = {
    "torch": {BIG: (3.0, 3.5), SMALL: (1.5, 2.3), MLP: (1.7, 2.0)},
    "jax": {BIG: (1.1, 1.2), SMALL: (1.3, 1.3), MLP: (1.05, 1.05)},
    "tensorflow": {BIG: (1.15, 1.4), SMALL: (1.15, 1.3), MLP: (1.25, 1.7)},
}
WANTED = {
    (model, kind): {"Nadam": bound}
    for model, bounds in OVER_NADAM[keras.config.backend()].items()
    for kind, bound in zip(shared.KINDS, bounds, strict=True)
}
MODELS, LESS = tuple(name for name in shared.MODELS if name != TRANSFORMER), None
QUICK_MODELS = (MLP,)
LR = 1e-4


def model_of(name: str) -> tuple[Any, tuple[int, ...], int]:
    """A model, the shape of what goes in, and the batch."""
    # Drawn by NumPy: JAX compiles Keras's own drawing for a second.
    layers, dense = keras.layers, partial(keras.layers.Dense, kernel_initializer="zeros")
    if name == CONVOLUTIONS:
        convolution = partial(layers.Conv2D, kernel_size=3, activation="relu", kernel_initializer="zeros")
        blocks = [convolution(32), layers.MaxPooling2D(), convolution(64), layers.MaxPooling2D(), layers.Flatten()]
        hidden, outputs, batch = [*blocks, dense(128, activation="relu")], 10, 16
        shape: tuple[int, ...] = (28, 28, 1)
    else:
        (inputs, *units, outputs), batch = DENSE[name]
        hidden, shape = [dense(n, activation="relu") for n in units], (inputs,)
    model = keras.Sequential([keras.Input(shape), *hidden, dense(outputs)])
    rng = np.random.default_rng(0)
    drawn = (rng.normal(0, np.prod(w.shape[:-1]) ** -0.5, w.shape) * (w.ndim > 1) for w in model.get_weights())
    model.set_weights(list(drawn))
    return model, shape, batch


def loops(name: str, kind: str, quick: bool = False) -> dict[str, Sample]:
    """A sample of each: seconds of a training step within fit()."""
    settings: dict[str, Any] = full_settings() if kind == "full" else {}
    made = {
        OURS: nadam.keras.Nadam(LR, **settings),
        "Nadam": keras.optimizers.Nadam(LR, **settings),
        "Adam": keras.optimizers.Adam(LR, **settings),
        "SGD": keras.optimizers.SGD(LR),
    }

    def loop(optimizer: Any) -> Sample:
        model, shape, batch = model_of(name)
        model.compile(optimizer, loss="mse", jit_compile="auto")
        batches = 10 if quick else 8 if name == BIG else 40  # of a sample, one call of fit()
        inputs = np.random.default_rng(0).normal(size=(batch * batches, *shape)).astype(np.float32)
        targets = np.zeros((len(inputs), *model.output_shape[1:]), np.float32)
        ends: list[float] = []
        # Not when fit() returns: tf.data's autotuning may first sleep until its period (10 ms, 20, 40, ...) is over,
        # which made 83 ms a step of ours with 21M parameters where it takes 59, in 6 fits of 20 on an idle machine.
        ended = keras.callbacks.LambdaCallback(on_train_end=lambda _: ends.append(time.perf_counter()))

        def sample() -> float:
            begin = time.perf_counter()
            model.fit(inputs, targets, batch_size=batch, verbose=0, shuffle=False, callbacks=[ended])
            return (ends.pop() - begin) / batches

        return sample

    samples = {}
    for who, optimizer in made.items():
        sample = loop(optimizer)
        try:
            for _ in range(0 if quick else 2):
                sample()
        except Exception as error:  # Keras's own with use_ema donate the same buffer twice on JAX
            print(f"{who}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        else:
            samples[who] = sample
    return samples
