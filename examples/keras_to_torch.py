"""Train a classifier of handwritten digits in Keras, move it to PyTorch in the middle of the run, and go on there.

`nadam.checkpoint` takes along the weights, the moments of nadam.keras.Nadam and its step count. Names differ, and
PyTorch keeps the kernel of a Dense layer transposed: `rename` and `transpose` say how. To show that it is one run,
Keras goes on as well, on the same batches: epoch by epoch the losses are the same.

    python examples/keras_to_torch.py
    KERAS_BACKEND=jax python examples/keras_to_torch.py --epochs 4 --out run.nadam

KERAS_BACKEND is torch, jax or tensorflow; torch if it is not set.
"""

import argparse
import os
from collections import OrderedDict

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import torch
from digits import load_digits

import nadam.keras
import nadam.torch

LEARNING_RATE, WEIGHT_DECAY, CLIP = 0.002, 0.01, 1.0
HIDDEN, BATCH = 64, 50


def keras_model(inputs):
    layers = keras.layers
    hidden, output = layers.Dense(HIDDEN, "relu", name="hidden"), layers.Dense(10, name="output")
    model = keras.Sequential([keras.Input((inputs,)), hidden, output], name="digits")
    optimizer = nadam.keras.Nadam(LEARNING_RATE, weight_decay=WEIGHT_DECAY, global_clipnorm=CLIP)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    return model


def torch_model(inputs):
    """Return the same model in PyTorch, and an optimizer with the same settings."""
    linear = torch.nn.Linear
    hidden, output = linear(inputs, HIDDEN, device="cpu"), linear(HIDDEN, 10, device="cpu")
    model = torch.nn.Sequential(OrderedDict(hidden=hidden, relu=torch.nn.ReLU(), output=output))
    settings = {"eps": 1e-7, "momentum_decay": 1.0, "decoupled_weight_decay": True, "weight_decay": WEIGHT_DECAY}
    return model, nadam.torch.NAdam(model.parameters(), LEARNING_RATE, global_clipnorm=CLIP, **settings)


def to_torch(path, model, optimizer):
    """Put the run of the Keras model into that of PyTorch."""
    layers = ("hidden", "output")
    rename = {f"digits/{layer}/kernel": f"{layer}.weight" for layer in layers}
    rename |= {f"digits/{layer}/bias": f"{layer}.bias" for layer in layers}
    transpose = [f"{layer}.weight" for layer in layers]
    nadam.checkpoint.load(path, optimizer, model, rename=rename, transpose=transpose)


def train_in_torch(model, optimizer, images, labels):
    for rows, targets in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(rows), targets).backward()
        optimizer.step()


def report(where, loss, accuracy):
    print(f"{where:<28} held-out loss {loss:.4f}, accuracy {accuracy:.1%}", flush=True)


def report_keras(where, model, images, labels):
    report(where, *model.evaluate(images, labels, verbose=0))


@torch.no_grad()
def report_torch(where, model, images, labels):
    outputs = model(images)
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    report(where, float(loss), float((outputs.argmax(1) == labels).float().mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2, help="in Keras, then as many in PyTorch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument("--out", default="keras_to_torch.nadam", help="checkpoint to write (default %(default)s)")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: expected at least 1")

    print(f"Keras {keras.__version__} on {keras.config.backend()}, PyTorch {torch.__version__}: less than a minute")
    images, labels, *held_out = load_digits(np.random.default_rng(args.seed))
    labels, held_out[1] = labels.astype("int64"), held_out[1].astype("int64")
    tensors = list(map(torch.from_numpy, held_out))

    def shuffled(epoch):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(images))
        return images[order], labels[order]

    keras.utils.set_random_seed(args.seed)
    model = keras_model(images.shape[1])
    for epoch in range(args.epochs):
        model.fit(*shuffled(epoch), batch_size=BATCH, shuffle=False, verbose=0)
        report_keras(f"epoch {epoch + 1}, Keras:", model, *held_out)

    nadam.checkpoint.save(args.out, model.optimizer, model)
    moved, optimizer = torch_model(images.shape[1])
    to_torch(args.out, moved, optimizer)
    report_torch("moved to PyTorch:", moved, *tensors)

    for epoch in range(args.epochs, 2 * args.epochs):
        batches = shuffled(epoch)
        train_in_torch(moved, optimizer, *map(torch.from_numpy, batches))
        report_torch(f"epoch {epoch + 1}, PyTorch:", moved, *tensors)
        model.fit(*batches, batch_size=BATCH, shuffle=False, verbose=0)
        report_keras(f"epoch {epoch + 1}, had it stayed:", model, *held_out)
    print(f"checkpoint: {args.out}")


if __name__ == "__main__":
    main()
