"""PyTorch tensors in the kernels' tables, by their addresses: nothing is copied or converted for a step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nadam.core.dtypes import SPLIT, SPLIT8
from nadam.kernels.cpu.group import TensorMemory
from nadam.kernels.cpu.plan import KernelPlan
from nadam.kernels.cpu.pointers import Held, Look, Pointers, tensor_wanted, tensor_words
from nadam.kernels.strides import LARGE, SHIFT, overlapping, overlaps_itself

Array = NDArray[Any]

FORMATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
_ALL_FORMATS = {**FORMATS, torch.complex64: "float32", torch.complex128: "float64"}  # of pairs of reals


class Slot(NamedTuple):
    """A parameter with its state, all of them tensors in the memory of the CPU."""

    name: str
    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    ema: torch.Tensor | None
    accumulator: torch.Tensor | None
    remainder: torch.Tensor | None  # int16: with the bfloat16 parameter the two halves of a float32; or its upper int8
    exp_avg_scale: torch.Tensor | None  # of moments of 8 bits, like the next
    exp_avg_sq_scale: torch.Tensor | None
    decays: bool
    averaged: bool  # by the pass, or by the host after it


def shifted(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """A tensor's values, contiguous; large ones are shifted in memory against the parameter, by ``place`` SHIFTs."""
    if tensor.nbytes < LARGE:
        return tensor.contiguous()
    offset = place * SHIFT // tensor.itemsize
    return torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape).copy_(tensor)


def param_format(param: torch.Tensor, remainder: torch.Tensor | None) -> str:
    """The number format of a parameter, with its remainder."""
    if remainder is None:
        return _ALL_FORMATS[param.dtype]
    return SPLIT if remainder.dtype == torch.int16 else SPLIT8


class TensorPlan:
    """The kernel's plan for some slots and their gradients, and these themselves."""

    def __init__(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], members: Any, seed: int = 0) -> None:
        tensors = []
        for slot, grad in zip(slots, grads, strict=True):
            if grad.shape != slot.param.shape:
                shapes = f"shape {tuple(grad.shape)}, expected that of its variable, {tuple(slot.param.shape)}"
                raise ValueError(f"grads[{slot.name!r}]: {shapes}")
            param = footprint(real(slot.param))
            state = [None if tensor is None else footprint(real(tensor)) for tensor in slot[2:9]]
            if overlaps_itself(param):
                raise ValueError(f"{slot.name}: elements of the variable share memory, as in one that was expanded")
            formats = param_format(slot.param, slot.remainder), _ALL_FORMATS[grad.dtype]
            fields = [*formats, param, footprint(real(grad)), *state, slot.decays, slot.averaged]
            tensors.append(TensorMemory._make(fields))
        self.slots, self.grads = slots, grads
        self.plan = KernelPlan(tensors, np.array(members, np.int64), seed, list(slots), torch.get_num_threads)


Named = Sequence[tuple[str, torch.Tensor]]


def check_apart(written: Named, grads: Named) -> list[Array]:
    """That no tensor that a step writes to shares memory with another, and no gradient with one of them."""
    arrays = [footprint(tensor) for _, tensor in written]
    found = overlapping(arrays, [footprint(grad) for _, grad in grads])
    if found is not None:
        first, second = found[0], found[1] - len(arrays)
        if second >= 0:
            raise ValueError(f"grads[{grads[second][0]!r}]: it shares memory with a variable or the optimizer's state")
        raise ValueError(f"{written[first][0]} and {written[found[1]][0]}: the variables share memory")
    return arrays


def named(slots: Sequence[Slot]) -> Named:
    """The tensors of some slots, as `check_apart` takes them."""
    return [(slot.name, tensor) for slot in slots for tensor in slot[1:9] if tensor is not None]


def watch(
    plans: Sequence[TensorPlan], arrays: Sequence[Array], fixed: Sequence[torch.Tensor] = (), held: Held | None = None
) -> Pointers | Methods:
    """What tells at later steps whether plans still hold, and puts the addresses of new gradients into them."""
    tensors = [tensor for plan in plans for _, tensor in named(plan.slots)]
    grads = [each for plan in plans for each in zip(plan.grads, plan.plan.gradient_cells(), strict=True)]
    return watching([*tensors, *fixed], grads, arrays, held)


def watching(
    fixed: Sequence[torch.Tensor],
    grads: Sequence[tuple[torch.Tensor, int]] = (),
    arrays: Sequence[Array] = (),
    held: Held | None = None,
) -> Pointers | Methods:
    """What tells whether tensors lie as they did, and puts gradients' addresses into the words given with them."""
    known: dict[Any, Any] = {}  # of tensors that lie alike in their storages what is wanted is the same
    readable = tensor_words() is not None

    def look(tensor: torch.Tensor, where: int) -> Look:
        key = kind_of(tensor), tensor.is_inference()
        if key not in known:
            known[key] = tensor_wanted(tensor, footprint(tensor)) if readable else None
        return Look(tensor, known[key], where)

    stay, new = [look(tensor, tensor.data_ptr()) for tensor in fixed], [look(*each) for each in grads]
    return (Pointers if readable else Methods)("torch_tensor", stay, new, arrays, held)


class Methods:
    """What `Pointers` does, by PyTorch's methods: for a PyTorch that keeps its tensors otherwise than is known here."""

    def __init__(
        self, source: str, fixed: Sequence[Look], grads: Sequence[Look], arrays: Sequence[Array], held: Held | None
    ) -> None:
        self._fixed, self._held = [look.array for look in fixed], held or Held()
        self._lie, self._grads = list(map(lie, self._fixed)), [kind_of(look.array) for look in grads]
        self._cells, self._arrays = [look.where for look in grads], arrays
        self._members = self._now()

    def _now(self) -> list[Any]:
        dicts, lists, _ = self._held
        return [*(d.get(key) for d, keys in dicts for key in keys), *(item for one in lists for item in one)]

    def fits(self, grads: list[Any], position: int = 0) -> bool:
        """Whether all is as it was; if so, the addresses of these gradients are in the tables."""
        if list(map(kind_of, grads)) != self._grads:
            return False
        now = self._now()
        if len(now) != len(self._members) or not all(map(is_, now, self._members)):
            return False
        for counters, count, calls in self._held.counters:
            steps, products = counters[-2 * count : -count], counters[-count:]
            if (steps * calls + position != counters[0]).any() or (products != counters[1]).any():
                return False
        if list(map(lie, self._fixed)) != self._lie or overlapping(self._arrays, list(map(footprint, grads))):
            return False
        for grad, cell in zip(grads, self._cells, strict=True):
            ctypes.c_int64.from_address(cell).value = grad.data_ptr()
        return True


def lie(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory: where, and all else."""
    if tensor.layout != torch.strided:
        return (0,)
    kind = tensor.dtype, tensor.device, tensor.is_neg(), tensor.is_conj()
    return (tensor.data_ptr(), *kind, tensor.storage_offset(), tensor.shape, tensor.stride())


def kind_of(tensor: Any) -> tuple[Any, ...] | None:
    """All that two tensors in the same words of a table have in common, but for their addresses."""
    return (type(tensor), *lie(tensor)[1:]) if isinstance(tensor, torch.Tensor) else None


class _Interface:
    def __init__(self, **words: Any) -> None:
        self.__array_interface__ = {"version": 3, **words}


def footprint(tensor: torch.Tensor) -> Array:
    """An array that lies where a tensor does, on whatever device: to ask where, not what.

    Not Tensor.numpy, after which PyTorch resizes the tensor's storage no more.
    """
    width = tensor.itemsize
    strides = tuple(stride * width for stride in tensor.stride())
    return np.asarray(
        _Interface(shape=tuple(tensor.shape), strides=strides, typestr=f"|V{width}", data=(tensor.data_ptr(), False))
    )


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as one of reals, with one more dimension; any other as it is."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
