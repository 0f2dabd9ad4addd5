"""Train a small transformer on English text with nadam.torch.NAdam, character by character; kill it and it goes on.

The text is Python's own help, which comes with Python. The program shows clipping by the norm of all gradients,
decoupled weight decay that leaves biases and norms out, a warm-up and cosine schedule, a moving average of the
weights, and checkpoints from which a killed run goes on, to end with the same weights bit for bit. Then
torch.optim.NAdam trains the same model on the same batches, and the picture has the losses of both.

    python examples/torch_char_lm.py
    python examples/torch_char_lm.py --steps 2000 --seed 1 --checkpoint run.pt   # kill it, and start it again
"""

from __future__ import annotations

import argparse
import os
from math import log
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from zlib import crc32

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from nadam.torch import NAdam, param_groups

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 96, 4, 96, 24
PEAK_LEARNING_RATE = 4e-3


class Block(nn.Module):
    """Attention to the characters before, then two dense layers; each is added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dense = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.dense(self.norms[1](x)))


class Transformer(nn.Module):
    """From characters (batch, time) to logits of each next one (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.blocks(self.characters(codes) + self.places.weight[: codes.shape[1]]))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in bits, of each character but the first of each window."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()) / log(2)


def batch_at(codes: Tensor, seed: int, step: int) -> Tensor:
    """The windows of one step, set by the seed and the step alone, so that a run can go on in the middle."""
    starts = np.random.default_rng([seed, step]).integers(len(codes) - CONTEXT, size=BATCH)
    return codes[torch.from_numpy(starts)[:, None] + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def evaluate(model: nn.Module, codes: Tensor, batches: int = 10) -> float:
    """Bits per character over the same windows each time, spread over the text."""
    starts = torch.linspace(0, len(codes) - CONTEXT - 1, batches * BATCH).long()
    windows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    model.eval()
    mean = sum(float(loss_of(model, some)) for some in windows.split(BATCH)) / batches
    model.train()
    return mean


@torch.no_grad()
def sample(model: nn.Module, code: int, length: int, seed: int) -> list[int]:
    """Go on from one character, each next one drawn by its probability, the unlikely ones made rarer."""
    generator = torch.Generator().manual_seed(seed)
    codes = [code]
    model.eval()
    for _ in range(length):
        logits = model(torch.tensor([codes[-CONTEXT:]]))[0, -1]
        codes.append(int(torch.multinomial(functional.softmax(logits / 0.7, 0), 1, generator=generator)))
    model.train()
    return codes


def make_optimizer(model: nn.Module) -> NAdam:
    groups = param_groups(model, weight_decay=0.1)
    return NAdam(groups, decoupled_weight_decay=True, global_clipnorm=1.0, use_ema=True, ema_momentum=0.98)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps, pct_start=0.1, cycle_momentum=False)


def losses_of_stock(vocabulary: int, codes: Tensor, steps: int, seed: int) -> list[float]:
    """Train another time with torch.optim.NAdam, whose clipping is a call of its own and which keeps no averages."""
    torch.manual_seed(seed)
    model = Transformer(vocabulary)
    optimizer = torch.optim.NAdam(param_groups(model, weight_decay=0.1), decoupled_weight_decay=True)
    schedule = make_schedule(optimizer, steps)
    losses = []
    for step in tqdm(range(steps), "torch.optim.NAdam", unit="step", ncols=100):
        optimizer.zero_grad()
        loss = loss_of(model, batch_at(codes, seed, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write to another file first, so that a kill leaves the old checkpoint or the new one, never half of one."""
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, path)


def draw(losses: list[float], stock: list[float], measured: list[tuple[int, float, float]], path: str) -> None:
    """Draw the loss of each batch, ours and stock, and the validation loss with and without averaging."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    every = range(1, len(losses) + 1)
    axes.plot(every, losses, linewidth=5, alpha=0.4, label="batch, nadam.torch.NAdam")
    axes.plot(every, stock, linewidth=1, color="black", label="batch, torch.optim.NAdam")
    steps, plain, averaged = zip(*measured, strict=True)
    axes.plot(steps, plain, marker=".", label="validation")
    axes.plot(steps, averaged, marker=".", label="validation, averaged weights")
    axes.set(xlabel="step", ylabel="bits per character", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of the whole run (default %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to go on from (default none)")
    parser.add_argument("--out", default="torch_char_lm.png", help="picture to draw (default %(default)s)")
    args = parser.parse_args()
    for name, least in (("steps", 20), ("every", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")

    text = "\n".join(topics.values())
    vocabulary = sorted(set(text))
    code_of = {character: code for code, character in enumerate(vocabulary)}
    train, validation = torch.tensor([code_of[character] for character in text]).tensor_split([len(text) * 9 // 10])
    print(f"twice {args.steps} steps: about {10 + args.steps // 5} seconds on two cores")
    print(f"{len(train)} characters to train on, {len(validation)} held out, {len(vocabulary)} different ones")

    torch.manual_seed(args.seed)
    model = Transformer(len(vocabulary))
    optimizer = make_optimizer(model)
    schedule = make_schedule(optimizer, args.steps)
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run = {"steps": args.steps, "seed": args.seed, "text": crc32(text.encode())}
    losses, measured = [], []  # of each step; of each checkpoint, as (step, validation loss, that of the averages)

    if args.checkpoint is not None and args.checkpoint.exists():
        found = torch.load(args.checkpoint, weights_only=True)
        if found["run"] != run:
            parser.error(f"--checkpoint {args.checkpoint}: of a run with other steps, another seed or another text")
        for name, part in stateful.items():
            part.load_state_dict(found[name])
        torch.set_rng_state(found["random"])  # which dropout draws from
        losses, measured = found["losses"], found["measured"]
        print(f"{args.checkpoint}: goes on from step {len(losses)}")

    with tqdm(
        range(len(losses), args.steps),
        "nadam.torch.NAdam",
        initial=len(losses),
        total=args.steps,
        unit="step",
        ncols=100,
    ) as bar:
        for step in bar:
            optimizer.zero_grad()
            loss = loss_of(model, batch_at(train, args.seed, step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{schedule.get_last_lr()[0]:.1e}", refresh=False)
            schedule.step()
            if len(losses) % args.every == 0 or len(losses) == args.steps:
                plain = evaluate(model, validation)
                with optimizer.swap_ema():
                    measured.append((len(losses), plain, evaluate(model, validation)))
                if args.checkpoint is not None:
                    parts = {name: part.state_dict() for name, part in stateful.items()}
                    progress = {"random": torch.get_rng_state(), "losses": losses, "measured": measured, "run": run}
                    save(parts | progress, args.checkpoint)

    print("\nbits per character      train  validation")
    print(f"weights                 {evaluate(model, train):5.3f}  {measured[-1][1]:10.3f}")
    with optimizer.swap_ema():
        print(f"averaged weights        {evaluate(model, train):5.3f}  {measured[-1][2]:10.3f}")
        written = sample(model, code_of["\n"], 300, args.seed)
    print("\n" + "".join(vocabulary[code] for code in written).strip())
    print()
    stock = losses_of_stock(len(vocabulary), train, args.steps, args.seed)
    last = min(len(losses), 20)
    ours, theirs = sum(losses[-last:]) / last, sum(stock[-last:]) / last
    print(f"loss of the last {last} batches: {ours:.3f}, with torch.optim.NAdam {theirs:.3f}")
    draw(losses, stock, measured, args.out)
    print(f"loss curves: {args.out}")


if __name__ == "__main__":
    main()
