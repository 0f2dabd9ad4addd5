"""Time `step()` of PyTorch's optimizers inside a training loop: forward and backward between the steps, in turns.

"8 bits" is ours with bfloat16 parameters, 8 bits of remainder and moments of 8 bits, and the peer with float32.
"Full" is global-norm clipping, decoupled decay and a moving average: in ours by its arguments, around PyTorch's by
clip_grad_norm_ and a foreach average. The floor moves the same bytes at the same place, on the same threads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from nadam.bench.loops import (
    BIG,
    CONVOLUTIONS,
    DENSE,
    FLOAT32,
    MLP,
    MODELS,
    TRANSFORMER,
    Sample,
    floor_step,
    full_settings,
)
from nadam.bench.records import COMPRESSED, FLOOR, OURS
from nadam.torch import NAdam

WANTED = {
    (BIG, "plain"): {"fused Adam": 1.05, "NAdam": 6.0, FLOOR: 0.93},
    (BIG, "full"): {"fused Adam": 1.6, "NAdam": 4.5, FLOOR: 0.93},
    (TRANSFORMER, "plain"): {"fused Adam": 1.6, "NAdam": 5.0},
    (TRANSFORMER, "full"): {"fused Adam": 2.0, "NAdam": 5.0},
    (MLP, "plain"): {"fused Adam": 1.15, "NAdam": 2.5},
    (MLP, "full"): {"fused Adam": 2.0, "NAdam": 3.0},
    (BIG, COMPRESSED): {"fused Adam": 1.4, FLOOR: 0.85},
}
LESS = None
QUICK_MODELS = (MLP, TRANSFORMER)
COMPRESSED_MODELS = (TRANSFORMER, BIG)
LR, DECAY = 1e-4, 1e-4
__all__ = ["LESS", "MODELS", "QUICK_MODELS", "WANTED", "loops"]


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with what goes in."""
    torch.manual_seed(0)
    if name == TRANSFORMER:
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), torch.randn(4, 32, 128)
    if name == CONVOLUTIONS:
        blocks = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1600, 128), nn.Linear(128, 10)), torch.randn(
            16, 1, 28, 28
        )
    units, batch = DENSE[name]
    layers = [each for i, o in pairwise(units) for each in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, units[0])


def plain(make: Callable[..., Any], params: list[nn.Parameter]) -> Callable[[], Any]:
    """A step of a peer."""
    step: Callable[[], Any] = make(params).step
    return step


def with_recipe(make: Callable[..., Any], params: list[nn.Parameter]) -> Callable[[], None]:
    """A step of a peer with clipping and a moving average around it."""
    optimizer, averages = make(params), [param.detach().clone() for param in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [param.detach() for param in params], 0.01)

    return step


def peers(kind: str) -> dict[str, Callable[..., Any]]:
    """PyTorch's optimizers, each a function of the parameters."""
    if kind == COMPRESSED:
        return {"fused Adam": lambda p: torch.optim.Adam(p, LR, fused=True), FLOAT32: lambda p: NAdam(p, LR)}
    if kind == "plain":
        fused = torch.optim.Adam
        return {"fused Adam": lambda p: fused(p, LR, fused=True), "NAdam": lambda p: torch.optim.NAdam(p, LR)}
    decoupled = {"weight_decay": DECAY, "decoupled_weight_decay": True}
    return {
        "fused Adam": lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY, fused=True),
        "NAdam": lambda p: torch.optim.NAdam(p, LR, **decoupled),
    }


def loops(name: str, kind: str, quick: bool = False) -> dict[str, Sample]:
    """A sample of each, on a model of its own."""
    model, given = model_of(name)

    def loop(step_of: Callable[[list[nn.Parameter]], Callable[[], Any]], dtype: torch.dtype = torch.float32) -> Sample:
        own, batch = copy.deepcopy(model).to(dtype), given.to(dtype)
        params = list(own.parameters())
        step = step_of(params)

        def sample() -> float:
            for param in params:
                param.grad = None
            own(batch).pow(2).mean().backward()
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin

        return sample

    options = {**full_settings(), "decoupled_weight_decay": True} if kind == "full" else {}
    dtype = torch.float32
    if kind == COMPRESSED:
        options, dtype = {"remainder": 8, "state_bits": 8}, torch.bfloat16
    made = {OURS: loop(lambda params: NAdam(params, LR, **options).step, dtype)}
    for who, make in peers(kind).items():
        made[who] = loop(partial(with_recipe if kind == "full" else plain, make))
    made[FLOOR] = loop(lambda params: floor(params, kind), dtype)
    return made


def floor(params: list[nn.Parameter], kind: str) -> Callable[[], None]:
    """What moves the bytes of a step."""

    def arrays(tensors: list[Any]) -> list[Any]:
        return [(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy() for tensor in tensors]

    move = floor_step(arrays([param.detach() for param in params]), kind, torch.get_num_threads)
    return lambda: move(arrays([param.grad for param in params]))
