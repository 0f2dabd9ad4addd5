"""Train a small classifier of handwritten digits with nadam.jax.fused, save it half-way, and resume.

The main job in JAX: one compiled step from a batch to new weights, with a warm-up and cosine schedule, clipping by the
global norm, decoupled weight decay that leaves the biases out, and a moving average of the weights. Weights and state
are donated, so that a step writes them where they are. Half-way both are saved by orbax. From that a second run trains
the other half, and ends where the first one ended without a break. The losses of both are drawn, beside the checkpoint.

The model is Equinox's: such a model is itself a tree of arrays, which is what `fused` takes and gives back.

    python examples/jax_mnist.py
    python examples/jax_mnist.py --epochs 10 --seed 1 --out digits
"""

import argparse
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from digits import load_digits
from matplotlib.figure import Figure
from tqdm import tqdm

import nadam.jax

PEAK_LEARNING_RATE = 0.005
HIDDEN = 128


def make_model(inputs, seed):
    """Return weights and, apart from them, all that is not an array: together they are the model."""
    model = eqx.nn.MLP(inputs, 10, HIDDEN, depth=2, key=jax.random.key(seed))
    return eqx.partition(model, eqx.is_inexact_array)


def make_optimizer(steps):
    return nadam.jax.fused(
        optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, steps // 10, steps),
        weight_decay=0.01,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        global_clipnorm=1.0,
        use_ema=True,
    )


def make_step(static, optimizer):
    """Return the compiled (params, state, batch) -> ((params, state), loss)."""

    def loss(params, images, labels):
        logits = jax.vmap(eqx.combine(params, static))(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # What is donated comes first, in the order in which it is returned: so each array is written where it was.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return optimizer.step(grads, state, params), value

    return step


def make_report(static, optimizer, images, labels):
    """Return a function of weights and state that says how many of some images they get right."""

    @jax.jit
    def accuracy(params):
        return (jax.vmap(eqx.combine(params, static))(images).argmax(axis=1) == labels).mean()

    def report(params, state):
        averages = optimizer.finalize(state, params)
        return f"held-out accuracy {accuracy(params):.1%}, of the averaged weights {accuracy(averages):.1%}"

    return report


def make_batches(images, labels, size, seed):
    """Return a function that gives the batches of an epoch, whose order the seed and the epoch alone set."""

    def batches(epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        rows = [order[start : start + size] for start in range(0, len(images) - size + 1, size)]
        return [(images[batch], labels[batch]) for batch in rows]

    return batches


def train(step, run, batches, epochs, report):
    """Return weights and state after some epochs more, and the loss of every batch."""
    curve = []
    for epoch in epochs:
        losses = []
        for batch in tqdm(batches(epoch), f"epoch {epoch + 1}", unit="step", ncols=100):
            run, loss = step(*run, batch)
            losses.append(loss)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {report(*run)}", flush=True)
        curve += map(float, losses)
    return run, curve


def draw(whole, resumed, path):
    """Draw the loss of each batch, of the run without a break and of the one that goes on half-way."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(whole) + 1), whole, linewidth=5, alpha=0.4, label="without a break")
    axes.plot(range(len(whole) - len(resumed) + 1, len(whole) + 1), resumed, "k", linewidth=1, label="resumed")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="passes over the digits (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50, help="images in a batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument(
        "--out", default="jax_mnist", help="folder for the checkpoint; the picture has its name (default %(default)s)"
    )
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: expected at least 2, to stop half-way")

    seconds = 5 + args.epochs
    print(f"JAX {jax.__version__} on {jax.default_backend()}: about {seconds} seconds on two cores")
    images, labels, *held_out = load_digits(np.random.default_rng(args.seed))
    if not 1 <= args.batch_size <= len(images):
        parser.error(f"--batch-size {args.batch_size}: expected 1 to {len(images)}")
    half, path = args.epochs // 2, Path(args.out).resolve()
    first_half, second_half = range(half), range(half, args.epochs)

    optimizer = make_optimizer(args.epochs * (len(images) // args.batch_size))
    params, static = make_model(images.shape[1], args.seed)
    run = params, optimizer.init(params)
    like = jax.eval_shape(lambda: run)  # shapes and dtypes, which is all that is needed to read a checkpoint

    step, report = make_step(static, optimizer), make_report(static, optimizer, *held_out)
    batches = make_batches(images, labels, args.batch_size, args.seed)
    with ocp.StandardCheckpointer() as checkpointer:
        run, first = train(step, run, batches, first_half, report)
        checkpointer.save(path, run, force=True)
        checkpointer.wait_until_finished()
        unbroken, second = train(step, run, batches, second_half, report)

        print(f"\n{args.out}, saved after epoch {half}, resumed")
        resumed, again = train(step, checkpointer.restore(path, like), batches, second_half, report)
        checkpointer.save(path, resumed, force=True)

    pairs = zip(jax.tree.leaves(unbroken), jax.tree.leaves(resumed), strict=True)
    same = all(np.array_equal(one, other) for one, other in pairs)
    print(f"\nthe two runs are {'equal, bit for bit' if same else 'not equal'}, in weights and state")
    picture = path.with_name(f"{path.name}.png")
    draw(first + second, again, picture)
    print(f"checkpoint: {args.out}, curves: {args.out}.png")


if __name__ == "__main__":
    main()
