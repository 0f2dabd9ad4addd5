"""What watching costs in a training loop of an MLP: `python -m benchmarks.watching`.

Steps of all variants in turns, in one process; medians of whole training steps, over that of the same loop unwatched.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

import nadam
from nadam import watch

SIZES, BATCH = (784, 256, 256, 10), 64
# Settings of the optimizer, and every how many steps a row is written; None for none.
VARIANTS = {
    "plain": ({}, None),
    "plain again": ({}, None),
    "a row at every step": ({}, 1),
    "a row every 100 steps": ({}, 100),
    "track_grad_norm": ({"track_grad_norm": True}, None),
    "track_grad_norm, a row at every step": ({"track_grad_norm": True}, 1),
}


def on_numpy(settings):
    """A training step of the MLP, and its optimizer."""
    rng = np.random.default_rng(0)
    params = {}
    for i, (n, m) in enumerate(pairwise(SIZES)):
        params[f"w{i}"] = rng.normal(size=(n, m), scale=n**-0.5).astype(np.float32)
        params[f"b{i}"] = np.zeros(m, np.float32)
    x, y = (rng.normal(size=(BATCH, n)).astype(np.float32) for n in (SIZES[0], SIZES[-1]))
    optimizer = nadam.Nadam(1e-4, **settings)
    optimizer.build(params)
    layers = len(SIZES) - 1

    def step():
        seen = [x]
        for i in range(layers):
            out = seen[-1] @ params[f"w{i}"] + params[f"b{i}"]
            seen.append(np.maximum(out, 0) if i < layers - 1 else out)
        grad, grads = (seen[-1] - y) / BATCH, {}
        for i in reversed(range(layers)):
            grads[f"w{i}"], grads[f"b{i}"] = seen[i].T @ grad, grad.sum(0)
            grad = (grad @ params[f"w{i}"].T) * (seen[i] > 0)
        optimizer.apply(grads)

    return step, optimizer


def on_torch(settings):
    """A training step of the MLP, and its optimizer."""
    import torch

    from nadam.torch import NAdam

    torch.manual_seed(0)
    layers = []
    for n, m in pairwise(SIZES):
        layers += [torch.nn.Linear(n, m), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    x, y = torch.randn(BATCH, SIZES[0]), torch.randn(BATCH, SIZES[-1])
    optimizer = NAdam(model.parameters(), lr=1e-4, **settings)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    return step, optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    for name, make in (("NumPy", on_numpy), ("torch", on_torch)):
        runs, times = [], {variant: [] for variant in VARIANTS}
        with tempfile.TemporaryDirectory() as folder:
            for i, (settings, every) in enumerate(VARIANTS.values()):
                step, optimizer = make(settings)
                write = watch.CSV(Path(folder) / f"{i}.csv")
                runs.append((step, None if every is None else watch.Watch(optimizer, write, every=every).after_step))
            for number in range(steps):
                turn = number % len(runs)  # who comes first
                for place in (*range(turn, len(runs)), *range(turn)):
                    step, after = runs[place]
                    start = time.perf_counter()
                    step()
                    if after is not None:
                        after()
                    if number >= steps // 10:
                        times[list(VARIANTS)[place]].append(time.perf_counter() - start)
        plain = statistics.median(times["plain"])
        for variant, each in times.items():
            median = statistics.median(each)
            print(f"{name:6} {variant:38} {median * 1e3:7.3f} ms  {100 * (median / plain - 1):+5.1f}%")


if __name__ == "__main__":
    main()
