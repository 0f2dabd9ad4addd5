"""Train with every parameter split over the processes (FSDP2), clipped by the norm of all gradients together.

    torchrun --nproc-per-node 2 examples/torch_fsdp.py
    torchrun --nproc-per-node 2 examples/torch_fsdp.py --checkpoint run   # and again, with any number of processes

Each process holds and updates its share of parameters, moments and averages. With ``--checkpoint`` the run is saved at
its end and goes on from there next time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from nadam.torch import NAdam

WIDTH, CLASSES, PIXELS = 256, 10, 64


def make_model() -> nn.Sequential:
    """A small network; each of its layers and the rest are gathered only while they are needed."""
    layers = [nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images that are recognized."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, save, resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="images of each process in a step")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to and to go on from")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = make_model()
    optimizer = NAdam(
        model.parameters(), lr=2e-3, weight_decay=0.01, decoupled_weight_decay=True, global_clipnorm=1.0, use_ema=True
    )
    if args.checkpoint is not None and args.checkpoint.exists():
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=args.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    held_out = len(images) // 5
    for epoch in range(1, args.epochs + 1):
        order = torch.randperm(len(images) - held_out, generator=torch.Generator().manual_seed(epoch)) + held_out
        together = args.batch * processes
        for start in range(0, len(order) - together + 1, together):
            mine = order[start + rank * args.batch :][: args.batch]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
        with optimizer.swap_ema():
            averaged = accuracy(model, images[:held_out], labels[:held_out])
        if rank == 0:
            report = optimizer.last_step
            print(f"epoch {epoch}: step {report.step}, gradient norm {report.grad_norm:.3f}, accuracy {averaged:.3f}")
    if args.checkpoint is not None:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(parts, checkpoint_id=args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
