"""Train a small classifier of handwritten digits with nadam.Nadam, in NumPy alone.

Five thousand MNIST digits, one hidden layer, the forward and backward pass written out. It shows what a
training loop asks of the optimizer: a warm-up and cosine schedule, clipping by the global norm, decoupled
weight decay that leaves the biases out, a moving average of the weights, and a report on the last step. For
comparison, plain Adam and SGD with Nesterov momentum train the same network on the same batches under the
same schedule.

    python examples/mnist.py
    python examples/mnist.py --epochs 20 --seed 1 --out demo.png
"""

import argparse
import time

import numpy as np
from digits import load_digits
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import nadam

BATCH = 50
HIDDEN = 128
RECORD_EVERY = 10  # steps between two points of the curves
# From a coarse search over three seeds, at the end of which the three were level.
PEAK_LEARNING_RATE = {"Nadam": 0.01, "Adam": 0.01, "SGD + Nesterov": 0.2}


class Adam:
    """Kingma and Ba's Adam."""

    def __init__(self, learning_rate):
        self.learning_rate, self.step = learning_rate, 0

    def build(self, params):
        self.params = params
        self.mean = {name: np.zeros_like(param) for name, param in params.items()}
        self.square = {name: np.zeros_like(param) for name, param in params.items()}

    def apply(self, grads):
        lr = self.learning_rate(self.step)
        self.step += 1
        mean_scale, square_scale = 1 - 0.9**self.step, 1 - 0.999**self.step
        for name, grad in grads.items():
            mean, square = self.mean[name], self.square[name]
            mean += 0.1 * (grad - mean)
            square += 0.001 * (grad * grad - square)
            self.params[name] -= lr / mean_scale * mean / (np.sqrt(square / square_scale) + 1e-7)


class NesterovSGD:
    """Gradient descent with Nesterov momentum."""

    def __init__(self, learning_rate):
        self.learning_rate, self.step = learning_rate, 0

    def build(self, params):
        self.params = params
        self.velocity = {name: np.zeros_like(param) for name, param in params.items()}

    def apply(self, grads):
        lr = self.learning_rate(self.step)
        self.step += 1
        for name, grad in grads.items():
            velocity = self.velocity[name]
            velocity *= 0.9
            velocity -= lr * grad
            self.params[name] += 0.9 * velocity - lr * grad


def initial_params(inputs, rng):
    """Return float32 arrays by name: He-initialised kernels, zero biases."""

    def kernel(fan_in, fan_out):
        return (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / fan_in)).astype(np.float32)

    return {
        "hidden/kernel": kernel(inputs, HIDDEN),
        "hidden/bias": np.zeros(HIDDEN, np.float32),
        "output/kernel": kernel(HIDDEN, 10),
        "output/bias": np.zeros(10, np.float32),
    }


def forward(params, images):
    """Return the hidden activations and the logarithms of the class probabilities."""
    hidden = np.maximum(images @ params["hidden/kernel"] + params["hidden/bias"], 0)
    logits = hidden @ params["output/kernel"] + params["output/bias"]
    logits -= logits.max(axis=1, keepdims=True)
    return hidden, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def loss_and_grads(params, images, labels):
    """Return the mean cross-entropy, the share of right answers, and the gradient of each parameter."""
    hidden, log_probs = forward(params, images)
    rows = np.arange(len(labels))
    d_logits = np.exp(log_probs)
    d_logits[rows, labels] -= 1
    d_logits /= len(labels)
    d_hidden = (d_logits @ params["output/kernel"].T) * (hidden > 0)
    grads = {
        "hidden/kernel": images.T @ d_hidden,
        "hidden/bias": d_hidden.sum(axis=0),
        "output/kernel": hidden.T @ d_logits,
        "output/bias": d_logits.sum(axis=0),
    }
    return -log_probs[rows, labels].mean(), (log_probs.argmax(axis=1) == labels).mean(), grads


def accuracy(params, images, labels):
    return (forward(params, images)[1].argmax(axis=1) == labels).mean()


def train(name, optimizer, params, data, epochs, rng):
    """Train params in place; return rows (step, loss, held-out accuracy) and seconds (all, in optimizer)."""
    images, labels, held_out_images, held_out_labels = data
    optimizer.build(params)
    losses, curve = [], []
    seconds = np.zeros(2)
    starts = range(0, len(images) - BATCH + 1, BATCH)
    for epoch in range(epochs):
        order, right = rng.permutation(len(images)), 0
        with tqdm(starts, f"{name} {epoch + 1}/{epochs}", unit="step", ncols=100) as bar:
            for seen, start in enumerate(bar, 1):
                batch = order[start : start + BATCH]
                begin = time.perf_counter()
                loss, batch_right, grads = loss_and_grads(params, images[batch], labels[batch])
                ready = time.perf_counter()
                optimizer.apply(grads)
                end = time.perf_counter()
                if losses:  # not in the first step, which compiles Nadam's kernel or loads it from disk
                    seconds += end - begin, end - ready
                losses.append(loss)
                right += batch_right
                mean = np.mean(losses[-seen:])
                bar.set_postfix(loss=f"{mean:.3f}", accuracy=f"{right / seen:.1%}", refresh=False)
                if len(losses) % RECORD_EVERY == 0:
                    held_out = accuracy(params, held_out_images, held_out_labels)
                    curve.append((len(losses), np.mean(losses[-RECORD_EVERY:]), held_out))
    return np.array(curve), seconds


def draw(curves, path):
    """Draw loss and held-out accuracy over steps, one line for each optimizer."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, curve in curves.items():
        loss_axes.plot(curve[:, 0], curve[:, 1], label=name)
        accuracy_axes.plot(curve[:, 0], 100 * curve[:, 2], label=name)
    loss_axes.set(title="training loss", xlabel="step", yscale="log")
    accuracy_axes.set(title="held-out accuracy, %", xlabel="step", ylim=(80, 100))
    loss_axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="passes over the digits (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument("--out", default="demo.png", help="picture to draw (default %(default)s)")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: expected at least 1")

    print(f"3 optimizers, {args.epochs} epochs each: about {5 + args.epochs} seconds on two cores")
    # Matrices this small gain nothing from more threads, and one adds up in the same order every time.
    threadpool_limits(1, user_api="blas")
    data = load_digits(np.random.default_rng(args.seed))
    steps = args.epochs * (len(data[0]) // BATCH)
    warmup = steps // 10
    schedules = {
        name: nadam.schedules.CosineDecay(0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup)
        for name, peak in PEAK_LEARNING_RATE.items()
    }

    schedule = schedules["Nadam"]
    optimizer = nadam.Nadam(schedule, weight_decay=0.01, global_clipnorm=1.0, use_ema=True, ema_momentum=0.99)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizers = {
        "Nadam": optimizer,
        "Adam": Adam(schedules["Adam"]),
        "SGD + Nesterov": NesterovSGD(schedules["SGD + Nesterov"]),
    }

    params, curves, seconds = {}, {}, {}
    for name in optimizers:
        rng = np.random.default_rng(args.seed)  # the same weights and the same batches for each
        params[name] = initial_params(data[0].shape[1], rng)
        curves[name], seconds[name] = train(name, optimizers[name], params[name], data, args.epochs, rng)

    print("\nheld-out accuracy")
    for name, trained in params.items():
        print(f"{name:<24}{accuracy(trained, *data[2:]):.1%}")
    optimizer.finalize_variable_values(params["Nadam"])  # from here on these are the averages
    print(f"{'Nadam, averaged weights':<24}{accuracy(params['Nadam'], *data[2:]):.1%}")

    last = optimizer.last_step
    print(f"\nNadam, step {last.step}: gradient norm {last.grad_norm:.3g}, clipped by {last.clip_factor:.3g}")
    for name, (total, in_optimizer) in seconds.items():
        rate, share = (steps - 1) / total, in_optimizer / total
        print(f"{name}: {rate:.0f} steps/s, {share:.1%} of the time in the optimizer")
    draw(curves, args.out)
    print(f"curves: {args.out}")


if __name__ == "__main__":
    main()
