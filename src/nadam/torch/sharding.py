"""Parameters that are split over processes (DTensors, as of FSDP2 and tensor parallelism): each does its own share.

So no process gathers anything but the norms, where clipping asks for them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

# Wrappers of a model that deal with gradients themselves.
WRAPPERS = {
    "DistributedDataParallel": "it averages gradients after they are released, and keeps all of them in its buckets",
    "FullyShardedDataParallel": "it keeps gradients of its own",
}


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; a tensor that is not split, itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


@torch.no_grad()
def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The share of a gradient that belongs to the parameter's share."""
    if not is_sharded(grad):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return grad._local_tensor


def combiner(params: Sequence[Tensor]) -> Callable[[list[float], bool], tuple[list[float], bool]] | None:
    """What makes norms of whole gradients from those of this process's shares; None where nothing is split.

    It also tells whether a value did not pass in any of the processes.
    """
    combine_rows = device_combiner(params)
    if combine_rows is None:
        return None

    def combine(norms: list[float], passed: bool) -> tuple[list[float], bool]:
        squares = [norm * norm for norm in norms] or [0.0] * len(params)
        rows = [(square, float(not passed)) for square in squares]
        device = next(local(param).device for param in params if is_sharded(param))
        sums, failed = combine_rows(torch.tensor(rows, dtype=torch.float64, device=device)).T.tolist()
        return [sqrt(total) for total in sums], not any(failed)

    return combine


@torch.no_grad()
def device_combiner(params: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """What adds up a row for each parameter over the processes that have shares of it; None where nothing is split.

    One all-reduce does all parameters that are split along the same dimension of the same device mesh.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, param in enumerate(params):
        spread = tuple(d for d, kind in enumerate(param.placements) if kind.is_shard()) if is_sharded(param) else ()
        if spread:
            alike.setdefault((param.device_mesh, spread), []).append(i)
    if not alike:
        return None
    # All rows without an index, which would have to be brought to the device.
    chosen = [
        (mesh, spread, None if len(members) == len(params) else torch.tensor(members, device=local(params[0]).device))
        for (mesh, spread), members in alike.items()
    ]

    def combine(entries: Tensor) -> Tensor:
        for mesh, spread, members in chosen:
            shares = entries if members is None else entries[members]
            for dim in spread:
                torch.distributed.all_reduce(shares, group=mesh.get_group(dim))
            if members is not None:
                entries[members] = shares
        return entries

    return combine


def check_unwrapped(params: Container[int]) -> None:
    """That no wrapper has parameters of these ids whose gradients are to be released.

    Parameters do not show it, so all objects are looked through, in some 40 ms, and only in a distributed run.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for each in gc.get_objects():
        reason = WRAPPERS.get(type(each).__name__)
        if reason and isinstance(each, torch.nn.Module) and any(id(param) in params for param in each.parameters()):
            raise ValueError(f"release: a {type(each).__name__} has the parameters: {reason}; fully_shard does not")
