"""PyTorch tensors in the kernels' tables: on their own memory, through pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nadam.kernels import native
from nadam.kernels.layouts import Headers, bounds, expectation, lists_readable, overlaps_itself
from nadam.kernels.plan import Group, Plan
from nadam.kernels.rows import LARGE, SHIFT, Memory, groups
from nadam.kernels.spans import GRAD, PARAM, SPLIT

FORMATS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
# DLPack's codes: kind of number, bits, lanes.
_DL_DTYPES = {
    torch.float16: 2 | 16 << 8 | 1 << 16,
    torch.bfloat16: 4 | 16 << 8 | 1 << 16,
    torch.float32: 2 | 32 << 8 | 1 << 16,
    torch.float64: 2 | 64 << 8 | 1 << 16,
}
# The version of its table of functions, and the word there that points to the one that describes a tensor.
DLPACK_VERSION, DESCRIBE = 1, 5
# What tables depend on besides strides and addresses.
_kind = attrgetter("dtype", "is_cpu", "shape")


# The types that a gradient may have.
PLAIN = (torch.Tensor, torch.nn.Parameter)


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
    remainder: torch.Tensor | None = None  # int16: with the bfloat16 parameter the two halves of a float32


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
        seed: As of `Plan`.

    Raises:
        ValueError: A gradient of another shape, or memory that overlaps.
    """

    def __init__(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], members: Any, seed: int = 0) -> None:
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
            rest = None if slot.remainder is None else _array(slot.remainder)
            formats = FORMATS[slot.param.dtype] if rest is None else SPLIT, FORMATS[grad.dtype]
            rounded = slot.exp_avg.dtype == torch.bfloat16
            fields = [*formats, param, _array(grad), *state, slot.decays, slot.averaged, rest, rounded]
            tensors.append(Memory._make(fields))
            changed = [array for array in (param, *state, rest) if array is not None and array.size]
            written += [(*bounds(array), slot.name) for array in changed]
        written.sort()
        self._lows, self._highs = (np.array([part[end] for part in written], np.int64) for end in (0, 1))
        for (_, high, first), (low, _, second) in pairwise(written):
            if high > low:
                raise ValueError(f"{first} and {second}: the variables share memory")
        made = groups(tensors, list(slots), torch.get_num_threads)
        self.plan = Plan(made, np.array(members, np.int64), seed, combines=True)
        self._params = [slot.param for slot in slots]
        addresses = _addresses(grads)
        ends = [bounds(tensor.grad) for tensor in tensors]
        self._begins, self._ends = (np.array([end[i] for end in ends], np.int64) - addresses for i in (0, 1))
        self._check_apart(addresses)
        # A view that stands for its negative has strides of another tensor's, unless it has none to speak of.
        self._perhaps_negative = [i for i, grad in enumerate(grads) if grad.numel() < 2 or not grad.is_contiguous()]
        self._fits = self._alike_by_headers(made, tensors, grads) or self._alike(grads)

    def fits(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether gradients lie as those that this was made for; if so, their addresses are in the tables now."""
        if len(grads) != len(self._names):
            return False
        try:
            if not self._fits(grads if type(grads) is list else list(grads)):
                return False
            return not (self._perhaps_negative and any(grads[i].is_neg() for i in self._perhaps_negative))
        except RuntimeError:  # a sparse tensor has no address
            return False

    def _alike_by_headers(
        self, made: Sequence[Group], tensors: Sequence[Memory], grads: Sequence[torch.Tensor]
    ) -> Callable[[list[torch.Tensor]], bool] | None:
        """The check by the kernel that asks PyTorch for all gradients at once; None where it finds not even these."""
        given = list(grads)
        written = list(zip(self._lows.tolist(), self._highs.tolist(), strict=True))
        checks = []
        for group in made:
            params = [self._params[i] for i in group.members]
            expected = [_expected(tensors[i].param, self._params[i]) for i in group.members]
            expected += [_expected(tensors[i].grad, grads[i]) for i in group.members]
            group.table.rows[:, PARAM] = _addresses(params)  # 0 for one without elements
            headers = tensor_headers(params, expected, group.table.rows, written, group.members)
            if headers is None or not headers.refresh_from(given):
                return None
            checks.append(headers.refresh_from)
        if len(checks) == 1:
            return checks[0]
        return lambda grads: all(refresh(grads) for refresh in checks)

    def _alike(self, grads: Sequence[torch.Tensor]) -> Callable[[list[torch.Tensor]], bool]:
        """The check where PyTorch has no function for that, as before 2.9: by its methods, one by one."""
        kinds, strides = list(map(_kind, grads)), list(map(torch.Tensor.stride, grads))
        params = _addresses(self._params)
        widths = np.array([grad.itemsize for grad in grads], np.int64)
        aligned = not (_addresses(grads) % widths).any()

        def alike(grads: list[torch.Tensor]) -> bool:
            if not set(map(type, grads)) <= set(PLAIN):
                return False
            if list(map(_kind, grads)) != kinds or list(map(torch.Tensor.stride, grads)) != strides:
                return False
            addresses = _addresses(grads)
            if (_addresses(self._params) != params).any() or (addresses % widths).any() == aligned:
                return False
            self._check_apart(addresses)
            for group in self.plan.groups:
                group.table.rows[:, GRAD] = addresses[group.members]
            return True

        return alike

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


@cache
def exchange_function() -> int:
    """The address of the function by which PyTorch describes a tensor to C: DLPack's, borrowed and not synchronizing.

    0 where this version of PyTorch or this machine has none.
    """
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return 0
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        table = get_pointer(capsule, b"dlpack_exchange_api")
    except ValueError:  # another name, so another table
        return 0
    version = (ctypes.c_uint32 * 2).from_address(table)
    if version[0] != DLPACK_VERSION:
        return 0
    return int((ctypes.c_int64 * (DESCRIBE + 1)).from_address(table)[DESCRIBE])


def tensor_headers(
    params: Sequence[torch.Tensor],
    expected: Sequence[NDArray[np.int64]],
    rows: NDArray[np.int64],
    written: Sequence[tuple[int, int]],
    members: NDArray[np.int64],
) -> Headers | None:
    """The quick check of `Headers` by the kernel that asks PyTorch for all tensors at once; None where it cannot."""
    function = exchange_function()
    if not function or not lists_readable():
        return None
    kernel = native.kernel_holding_gil("headers", "refresh", "torch_tensor")
    return Headers(kernel, params, expected, rows, written, function, PLAIN, members)


def kind_and_device(tensor: torch.Tensor) -> tuple[int, int]:
    """The words of DLPack's that a kernel finds of a tensor."""
    device, index = tensor.__dlpack_device__()
    return tensor.dim() | _DL_DTYPES[tensor.dtype] << 32, int(device) | index << 32


def _expected(array: NDArray[Any], tensor: torch.Tensor) -> NDArray[np.int64]:
    """What the kernel is to find where it finds a tensor that lies like this one."""
    return expectation(array, *kind_and_device(tensor), tensor.stride())


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A NumPy array over a tensor's memory, of integers for bfloat16, which NumPy has not."""
    plain = tensor.detach()
    array: NDArray[Any] = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    return array
