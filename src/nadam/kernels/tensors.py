"""PyTorch tensors in the kernels' tables: on their own memory, through pointers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nadam.kernels.layouts import bounds, overlaps_itself
from nadam.kernels.plan import Plan
from nadam.kernels.rows import LARGE, SHIFT, Memory, groups
from nadam.kernels.spans import GRAD

FORMATS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
# What tables depend on besides strides and addresses.
_kind = attrgetter("dtype", "is_cpu", "shape")


class Slot(NamedTuple):
    """A parameter with its state, all of them tensors in the memory of the CPU."""

    name: str
    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    ema: torch.Tensor | None
    accumulator: torch.Tensor | None
    decays: bool
    averaged: bool  # by the pass, or by the host after it


def shifted(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """A tensor's values, contiguous, where they do not lie in step with its parameter's: shifted by ``place`` SHIFTs.

    Small ones are not shifted.
    """
    if tensor.nbytes < LARGE:
        return tensor.contiguous()
    offset = place * SHIFT // tensor.itemsize
    return torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape).copy_(tensor)


class TensorPlan:
    """The plan for a call's gradients, and what tells whether it fits others.

    Args:
        slots: The parameters that have a gradient, with their state.
        grads: Their gradients: tensors on the CPU in one of the FORMATS.
        members: Which of the optimizer's parameters they are.

    Raises:
        ValueError: A gradient of another shape, or memory that overlaps.
    """

    def __init__(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], members: Sequence[int]) -> None:
        self._names = [slot.name for slot in slots]
        tensors, written = [], []
        for slot, grad in zip(slots, grads, strict=True):
            if grad.shape != slot.param.shape:
                shapes = f"shape {tuple(grad.shape)}, expected that of its variable, {tuple(slot.param.shape)}"
                raise ValueError(f"grads[{slot.name!r}]: {shapes}")
            param = _array(slot.param)
            if overlaps_itself(param):
                raise ValueError(f"{slot.name}: elements of the variable share memory, as in one that was expanded")
            state = [None if tensor is None else _array(tensor) for tensor in slot[2:6]]
            formats = FORMATS[slot.param.dtype], FORMATS[grad.dtype]
            tensors.append(Memory._make([*formats, param, _array(grad), *state, slot.decays, slot.averaged]))
            written += [(*bounds(array), slot.name) for array in (param, *state) if array is not None and array.size]
        written.sort()
        self._lows, self._highs = (np.array([part[end] for part in written], np.int64) for end in (0, 1))
        for (_, high, first), (low, _, second) in pairwise(written):
            if high > low:
                raise ValueError(f"{first} and {second}: the variables share memory")
        made = groups(tensors, list(slots), torch.get_num_threads)
        self.plan = Plan(made, np.array(members, np.int64))
        self._params = [slot.param for slot in slots]
        self._param_addresses = _addresses(self._params)
        self._kinds, self._strides = list(map(_kind, grads)), list(map(torch.Tensor.stride, grads))
        self._contiguous = all(grad.is_contiguous() for grad in grads)
        extents = [(low - grad.data_ptr(), high - grad.data_ptr()) for grad, (low, high) in _extents(grads, tensors)]
        self._begins, self._ends = (np.array([extent[end] for extent in extents], np.int64) for end in (0, 1))
        self._widths = np.array([grad.itemsize for grad in grads], np.int64)
        self._aligned = not (_addresses(grads) % self._widths).any()
        self._check_apart(_addresses(grads))

    def fits(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether gradients lie as those that this was made for; if so, their addresses are in the tables now.

        Raises:
            ValueError: One of them shares memory with what the step writes to.
        """
        if not set(map(type, grads)) <= {torch.Tensor, torch.nn.Parameter} or list(map(_kind, grads)) != self._kinds:
            return False
        try:
            addresses = _addresses(grads)
            if self._contiguous:
                if not all(map(torch.Tensor.is_contiguous, grads)):
                    return False
            elif list(map(torch.Tensor.stride, grads)) != self._strides:
                return False
        except RuntimeError:  # a sparse tensor has no address
            return False
        if (_addresses(self._params) != self._param_addresses).any():
            return False
        if (addresses % self._widths).any() == self._aligned:
            return False
        self._check_apart(addresses)
        if len(self.plan.groups) == 1:
            self.plan.groups[0].table.rows[:, GRAD] = addresses
        else:
            for group in self.plan.groups:
                group.table.rows[:, GRAD] = addresses[group.members]
        return True

    def _check_apart(self, addresses: NDArray[np.int64]) -> None:
        if not self._lows.size:
            return
        last = np.searchsorted(self._lows, addresses + self._ends) - 1
        shared = (last >= 0) & (self._highs[last] > addresses + self._begins) & (self._ends > self._begins)
        if shared.any():
            name = self._names[int(np.flatnonzero(shared)[0])]
            raise ValueError(f"grads[{name!r}]: it shares memory with a variable or the optimizer's state")


def _addresses(tensors: Sequence[torch.Tensor]) -> NDArray[np.int64]:
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))


def _extents(grads: Sequence[torch.Tensor], tensors: Sequence[Memory]) -> Any:
    return zip(grads, [bounds(tensor.grad) for tensor in tensors], strict=True)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A NumPy array over a tensor's memory, of integers for bfloat16, which NumPy has not."""
    plain = tensor.detach()
    array: NDArray[Any] = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    return array
