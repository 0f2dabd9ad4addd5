"""Train three small models with the four Nadams, NadamW, Adam, AdamW and SGD, and draw what docs/convergence.md shows.

python -m benchmarks.convergence                 # some 25 minutes of one core; the record is docs/data/convergence.json
python -m benchmarks.convergence --part conv     # one part of it again
python -m benchmarks.convergence --draw          # only the pictures and the tables, from the record
python -m benchmarks.convergence --quick --docs /tmp/quick

All optimizers of a seed begin with the same weights and see the same batches, to be compared seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.convergence_report import FAMILY, ROOT, SGD_OVER_RATES, STOCK, report
from examples import quadratic_deep
from examples.digits import load_digits
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import nadam
from nadam.torch import NAdam, NAdamW

OPTIONS: dict[str, dict[str, Any]] = {
    "keras": {"momentum_decay": 1.0},
    "torch": {"momentum_decay": 0.004},
    "optax": {"momentum_decay": math.inf},
    "adam": {"momentum_decay": math.inf, "bias_correction": "adam"},
}
DECAY = 0.1
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{FAMILY[member]: partial(NAdam, **options) for member, options in OPTIONS.items()},
    "NadamW": partial(NAdamW, weight_decay=DECAY),
    "Adam": partial(torch.optim.Adam, fused=True),
    "AdamW": partial(torch.optim.AdamW, weight_decay=DECAY, fused=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
}
RATES = [1e-3 * 2**i for i in range(7)]
EPOCHS = [0, 1, 2, 3, 5, 10, 20, 30, 50, 70, 100]  # of the published run, those in the record
CHECKS = 12  # times that the held-out loss is taken


class Task(NamedTuple):
    """A model, the rows (inputs, targets) to train on and those held out, and how long to train."""

    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    steps: int
    batch: int
    warmup: int = 0


class Transformer(nn.Module):
    """From characters (batch, time) to logits of each next one (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, width: int = 48, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = partial(nn.TransformerEncoderLayer, width, heads, 4 * width, **options)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


@cache
def digits() -> list[Tensor]:
    """Images and labels to train on, and those held out, the same for every seed."""
    return list(map(torch.from_numpy, load_digits(np.random.default_rng(0))))


def digits_task(convolutional: bool) -> Task:
    images, labels, *held_out = digits()
    pixels = images.shape[1]
    side = math.isqrt(pixels)

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 10))

    def conv() -> nn.Module:
        first, second = (nn.Conv2d(*channels, 3, stride=2, padding=1) for channels in ((1, 8), (8, 16)))
        image, end = nn.Unflatten(1, (1, side, side)), nn.Linear(16 * (side // 4) ** 2, 10)
        return nn.Sequential(image, first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), end)

    return Task(conv if convolutional else mlp, (images, labels), tuple(held_out), steps=400, batch=64)


def text_task(warmup: int, context: int = 32, **sizes: int) -> Task:
    """Python's own help, the last tenth of it held out; sizes are the transformer's."""
    text = "\n".join(topics.values())
    code_of = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([code_of[character] for character in text])
    train, held_out = codes.tensor_split([len(codes) * 9 // 10])
    windows = train.unfold(0, context + 1, 1)
    spread = held_out.unfold(0, context + 1, (len(held_out) - context) // 128)
    make = partial(Transformer, len(code_of), context, **sizes)
    rows = ((of[:, :-1], of[:, 1:]) for of in (windows, spread))
    return Task(make, *rows, steps=300, batch=16, warmup=warmup)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": partial(digits_task, convolutional=False),
    "conv": partial(digits_task, convolutional=True),
    "text": partial(text_task, warmup=0),
    "text-warmup": partial(text_task, warmup=30),
}
PARTS = [*TASKS, "times", "published"]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(model(inputs).flatten(0, -2).float(), targets.flatten())


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> float:
    """Take one step of training and return the loss before it."""
    optimizer.zero_grad()
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def batches(task: Task, seed: int) -> NDArray[np.int64]:
    """The rows of each step, shape (steps, batch), all of them once before any a second time."""
    rng, rows = np.random.default_rng(seed), len(task.train[0])
    epochs = math.ceil(task.steps * task.batch / rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    return order[: task.steps * task.batch].reshape(task.steps, task.batch)


def checks(steps: int) -> list[int]:
    """The steps after which the held-out loss is taken, closer at the beginning."""
    return sorted({max(1, round(steps * (i / CHECKS) ** 2)) for i in range(1, CHECKS + 1)})


def share_of_rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, if any, and a cosine down to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / steps)) / 2


def significant(number: float) -> float | None:
    """Five digits, for the record, in which a loss that is not finite is null."""
    return float(f"{number:.5g}") if math.isfinite(number) else None


def run(task: Task, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once with one of the optimizers."""
    return train(task, partial(OPTIMIZERS[optimizer], lr=rate), seed)


def train(task: Task, optimizer: Callable[..., torch.optim.Optimizer], seed: int) -> dict[str, Any]:
    """Train once; return held-out losses at the checks, held-out accuracy, mean loss of the last tenth of batches.

    What is held out is computed in float32, whatever the parameters are.
    """
    torch.manual_seed(seed)
    model = task.make()
    stepping = optimizer(model.parameters())
    schedule = LambdaLR(stepping, partial(share_of_rate, warmup=task.warmup, steps=task.steps))
    losses, found, accuracy = [], [], 0.0
    for step, rows in enumerate(torch.from_numpy(batches(task, seed)), 1):
        losses.append(advance(model, stepping, task.train[0][rows], task.train[1][rows]))
        schedule.step()
        if step in checks(task.steps):
            inputs, targets = task.held_out
            with torch.no_grad():
                logits = copy.deepcopy(model).float()(inputs)
            found.append(significant(cross_entropy(logits.flatten(0, -2), targets.flatten()).item()))
            accuracy = (logits.argmax(-1) == targets).double().mean().item()
    last = float(np.mean(losses[-max(1, task.steps // 10) :]))
    return {"held_out": found, "accuracy": significant(accuracy), "train": significant(last)}


def milliseconds(task: Task, rounds: int) -> dict[str, float | None]:
    """Median time of a whole step of training, forward and backward included, of all optimizers in turns."""
    inputs, targets = (rows[torch.from_numpy(batches(task, 0)[0])] for rows in task.train)
    ready, times = {}, {}
    for name, make in {**OPTIMIZERS, STOCK: torch.optim.NAdam}.items():
        model = task.make()
        ready[name], times[name] = (model, make(model.parameters(), lr=RATES[0])), []
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(ready)):  # none always behind the same one
            model, optimizer = ready[name]
            begin = time.perf_counter()
            advance(model, optimizer, inputs, targets)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: significant(float(np.median(taken[len(taken) // 5 :]))) for name, taken in times.items()}


def rates_of(optimizer: str, rates: list[float]) -> list[float]:
    return [rate * (SGD_OVER_RATES if optimizer == "SGD" else 1) for rate in rates]


def study(task: Task, rates: list[float], seeds: int) -> dict[str, Any]:
    """Train with every optimizer at every rate from every seed."""
    parameters = sum(param.numel() for param in task.make().parameters())
    found: dict[str, Any] = {"parameters": parameters, "batch": task.batch, "steps": checks(task.steps), "runs": {}}
    found["rows"] = [len(task.train[0]), len(task.held_out[0])]
    for name in OPTIMIZERS:
        found["runs"][name] = {}
        for rate in rates_of(name, rates):
            runs = [run(task, name, rate, seed) for seed in range(seeds)]
            found["runs"][name][f"{rate:g}"] = {what: [of[what] for of in runs] for what in runs[0]}
            print(f"{name:20} {rate:<8g}", *(of["held_out"][-1] for of in runs), flush=True)
    return found


def published(epochs: int, orders: int) -> dict[str, Any]:
    """The loss of each member after each epoch of DeepOBS's quadratic_deep, in several orders of its rows."""
    names = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
    settings = {names[name]: value for name, value in quadratic_deep.SETTINGS.items()}

    def step_of(options: dict[str, Any]) -> Callable[..., NDArray[np.float64]]:
        optimizer = nadam.Nadam(**settings, **options)
        kept: list[NDArray[np.float64]] = []

        def step(param: NDArray[np.float64], grad: NDArray[np.float64]) -> NDArray[np.float64]:
            kept.extend([param] if not kept else [])
            optimizer.apply([grad], kept)
            return kept[0]

        return step

    found: dict[str, Any] = {"epochs": [epoch for epoch in EPOCHS if epoch <= epochs]}
    for member, options in OPTIONS.items():
        runs = [list(quadratic_deep.losses(step_of(options), epochs, order)) for order in range(orders)]
        found[member] = [[round(losses[epoch], 4) for epoch in found["epochs"]] for losses in runs]
    return found


def save(path: Path, part: str, found: dict[str, Any]) -> None:
    """Put one part into the record, which keeps the others."""
    record = json.loads(path.read_text()) if path.exists() else {}
    versions = {"nadam": nadam.__version__, "PyTorch": torch.__version__, "Python": platform.python_version()}
    record = {"versions": versions, "parts": {**record.get("parts", {}), part: found}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def arguments(what: str, parts: list[str]) -> argparse.Namespace:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--part", choices=parts, action="append", help="only this one; may be repeated")
    parser.add_argument("--draw", action="store_true", help="train nothing, draw the record and print its tables")
    parser.add_argument("--quick", action="store_true", help="a few steps of two seeds, to see that all of it runs")
    parser.add_argument("--docs", type=Path, help="folder of data/ and images/ (default: docs)")
    args = parser.parse_args()
    if args.quick and args.docs is None:
        parser.error("--quick: expected --docs FOLDER too, since docs/ has the record of the whole study")
    args.docs = args.docs or ROOT / "docs"
    return args


def main() -> None:
    args = arguments(__doc__.splitlines()[0], PARTS)
    docs, path = args.docs, args.docs / "data" / "convergence.json"
    torch.set_num_threads(1)
    for part in [] if args.draw else args.part or PARTS:
        print(part)
        if part == "published":
            found = published(*((3, 2) if args.quick else (100, 5)))
        elif part == "times":
            found = {name: milliseconds(make(), 5 if args.quick else 300) for name, make in TASKS.items()}
        elif args.quick:
            found = study(TASKS[part]()._replace(steps=4), RATES[3:4], seeds=2)
        else:
            found = study(TASKS[part](), RATES, seeds=5)
        save(path, part, found)
    record = json.loads(path.read_text())
    if {*PARTS} <= record["parts"].keys():
        report(record, docs / "images")


if __name__ == "__main__":
    main()
