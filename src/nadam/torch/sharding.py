"""Parameters that are split over processes (DTensors, as of FSDP2 and tensor parallelism): each does its own share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor


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

    The shares of a tensor are spread along some dimensions of its device mesh; one all-reduce along each of them, for
    all tensors on that mesh together, also tells whether a value somewhere did not pass.
    """
    alike = _alike(params)
    if not alike:
        return None

    def combine(norms: list[float], passed: bool) -> tuple[list[float], bool]:
        squares = [norm * norm for norm in norms] or [0.0] * len(params)
        for (mesh, spread), members in alike.items():
            own = [*(squares[i] for i in members), float(not passed)]
            shares = torch.tensor(own, dtype=torch.float64, device=mesh.device_type)
            for dim in spread:
                torch.distributed.all_reduce(shares, group=mesh.get_group(dim))
            *sums, failed = shares.tolist()
            passed = passed and not failed
            for i, total in zip(members, sums, strict=True):
                squares[i] = total
        return [sqrt(total) for total in squares], passed

    return combine


@torch.no_grad()
def device_combiner(params: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The same for sums that stay on the device: a row for each parameter, in which everything may be added up."""
    alike = _alike(params)
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


def _alike(params: Sequence[Tensor]) -> dict[tuple[Any, ...], list[int]]:
    """Which parameters are split along which dimensions of which mesh."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, param in enumerate(params):
        if is_sharded(param):
            spread = tuple(dim for dim, placement in enumerate(param.placements) if placement.is_shard())
            if spread:
                alike.setdefault((param.device_mesh, spread), []).append(i)
    return alike
