"""Train a small convolutional net on handwritten digits with nadam.keras.Nadam, save it half-way, and resume.

The main job in Keras: `fit()` with a warm-up and cosine schedule, gradients accumulated over two batches, decoupled
weight decay, and a moving average of the weights, which `fit()` puts in place when it is done. Half-way the model is
saved. From that file a second model trains the other half, and ends where the first one ended without a break. The
losses of both are drawn, beside the model.

    python examples/keras_mnist.py
    KERAS_BACKEND=jax python examples/keras_mnist.py --epochs 10 --seed 1 --out digits.keras

KERAS_BACKEND is torch, jax or tensorflow; torch if it is not set.
"""

import argparse
import os
import sys
from math import isqrt
from pathlib import Path

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from digits import load_digits
from keras import layers
from matplotlib.figure import Figure

import nadam.keras

PEAK_LEARNING_RATE = 0.01
ACCUMULATED = 2  # batches to an update


class Batches(keras.utils.PyDataset):
    """Batches of the digits, in an order that is set by the seed and the epoch alone, so that it can be resumed."""

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.shuffle(0)

    def shuffle(self, epoch):
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        batch = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.images[batch], self.labels[batch]


def digits(seed):
    """Return (train images, train labels, held-out images, held-out labels), images as (count, side, side, 1)."""
    images, labels, held_out_images, held_out_labels = load_digits(np.random.default_rng(seed))
    side = isqrt(images.shape[1])
    return images.reshape(-1, side, side, 1), labels, held_out_images.reshape(-1, side, side, 1), held_out_labels


def make_model(shape):
    """Return a net of three convolutions, not yet compiled."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(16, 5, strides=2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def make_optimizer(steps, cls=nadam.keras.Nadam):
    """Return an optimizer for a number of batches; any class with the arguments of keras.optimizers.Nadam will do."""
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=PEAK_LEARNING_RATE, warmup_steps=warmup
    )
    return cls(schedule, weight_decay=0.01, use_ema=True, ema_momentum=0.98, gradient_accumulation_steps=ACCUMULATED)


def compile_model(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])


class Halfway(keras.callbacks.Callback):
    """Orders the batches of each epoch; after a number of epochs, saves the model with the state of its optimizer."""

    def __init__(self, batches, epochs, path):
        super().__init__()
        self.batches, self.epochs, self.path = batches, epochs, path

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.shuffle(epoch)

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == self.epochs:
            self.model.save(self.path)


def state_of(model):
    """Return every number that training has changed: of the model and of its optimizer."""
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.variables, *model.optimizer.variables]]


def draw(whole, resumed, path):
    """Draw loss and accuracy of each epoch, of the run without a break and of the one that goes on half-way."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "held out")):
            axes.plot([epoch + 1 for epoch in whole.epoch], whole.history[key], label=label)
            epochs = [epoch + 1 for epoch in resumed.epoch]
            axes.plot(epochs, resumed.history[key], "ko", fillstyle="none", label=f"{label}, resumed")
        axes.set(title=name, xlabel="epoch", xticks=[epoch + 1 for epoch in whole.epoch])
    axes.legend()
    figure.savefig(path, dpi=120)


def accuracy(model, images, labels):
    return model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="passes over the digits (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50, help="images in a batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument(
        "--out", default="keras_mnist.keras", help="model to write; the picture has its name (default %(default)s)"
    )
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: expected at least 2, to stop half-way")
    if not args.out.endswith(".keras"):
        parser.error(f"--out {args.out}: expected a name that ends in .keras")

    seconds = 10 + 8 * args.epochs
    print(f"Keras {keras.__version__} on {keras.config.backend()}: about {seconds} seconds on two cores")
    images, labels, *held_out = digits(args.seed)
    if not 1 <= args.batch_size <= len(images):
        parser.error(f"--batch-size {args.batch_size}: expected 1 to {len(images)}")
    half = args.epochs // 2
    batches = Batches(images, labels, args.batch_size, args.seed)
    settings = {
        "epochs": args.epochs,
        "validation_data": tuple(held_out),
        "shuffle": False,  # which would be Keras's own, another one in each run
        "callbacks": [Halfway(batches, half, args.out)],
        # Keras's bar redraws itself on a terminal; elsewhere each of its states would be a line.
        "verbose": 1 if sys.stdout.isatty() else 2,
    }

    keras.utils.set_random_seed(args.seed)
    model = make_model(images.shape[1:])
    compile_model(model, make_optimizer(args.epochs * len(batches)))
    history = model.fit(batches, **settings)

    print(f"\n{args.out}, saved after epoch {half}, resumed")
    resumed = keras.saving.load_model(args.out)
    history_resumed = resumed.fit(batches, initial_epoch=half, **settings)

    same = all(np.array_equal(a, b) for a, b in zip(state_of(model), state_of(resumed), strict=True))
    print(f"\nheld-out accuracy, averaged weights: {accuracy(model, *held_out):.1%}")
    print(f"held-out accuracy, averaged weights, resumed: {accuracy(resumed, *held_out):.1%}")
    print(f"the two models and their optimizers are {'equal, bit for bit' if same else 'not equal'}")

    resumed.save(args.out)
    picture = Path(args.out).with_suffix(".png")
    draw(history, history_resumed, picture)
    print(f"model: {args.out}, curves: {picture}")


if __name__ == "__main__":
    main()
