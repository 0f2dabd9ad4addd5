"""State that was loaded or set, in the format in which an optimizer keeps it: moments of 8 bits, remainders of 8 or 16.

Between steps, by NumPy; a step's kernel takes and leaves the format (core/compressed.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.compressed import SCALES
from nadam.core.portable_formats import kept_moments, wide_moments


def has_codes(state: Mapping[str, Any]) -> bool:
    """Whether the moments of a parameter are codes of 8 bits."""
    return all(name in state for name in SCALES.values()) and state["exp_avg"].dtype == torch.int8


def wide(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with float32 moments in the place of codes."""
    made = dict(state)
    convert(made, False, made["remainder"].dtype if "remainder" in made else torch.int16)
    return made


def in_c_order(state: Any) -> Any:
    """A parameter's state as it is saved: itself, or wide where it has codes of another order of memory than C's."""
    if not isinstance(state, dict) or not has_codes(state) or state["exp_avg"].is_contiguous():
        return state
    return wide(state)


def fits_order(state: Mapping[str, Any], param: Tensor) -> bool:
    """Whether codes, which belong to the order of memory in which they lie, are in that of a parameter."""
    return all(_strides(state[name]) == _strides(param) for name in SCALES)


def memory_order(param: Tensor) -> list[int] | None:
    """The dimensions of a dense tensor in memory, outermost first; None where they are in their order."""
    like = torch.empty_like(param.detach(), device="meta", memory_format=torch.preserve_format)
    return None if like.is_contiguous() else sorted(range(like.dim()), key=lambda d: -like.stride(d))


def convert(state: dict[str, Any], wants_codes: bool, remainder: torch.dtype) -> bool:
    """Have state in the format that is wanted, rounded to nearest; gives whether moments have the values of before."""
    rest, exact = state.get("remainder"), True
    if "exp_avg" in state and has_codes(state) != wants_codes:
        like = state["exp_avg"]
        order, names = memory_order(like), (*SCALES, *(() if wants_codes else SCALES.values()))
        arrays = {name: _array(state[name]) for name in names}
        made, exact = kept_moments(wide_moments(arrays, order), wants_codes, order)
        for name in SCALES.values():
            state.pop(name, None)
        state.update({name: torch.from_numpy(array).to(like.device, copy=True) for name, array in made.items()})
    if rest is not None and rest.dtype != remainder:
        bits = rest.to(torch.int32)
        state["remainder"] = (bits << 8 if remainder == torch.int16 else (bits + 128 >> 8).clamp(max=127)).to(remainder)
    return exact


def _array(tensor: Tensor) -> NDArray[Any]:
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor in the same order of dimensions."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return tuple(like.stride())
