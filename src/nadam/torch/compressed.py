"""State that was loaded or set, in the format in which an optimizer keeps it: moments of 8 bits, remainders of 8 or 16.

Between steps, by NumPy; a step's kernel takes and leaves the format (core/compressed.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.compressed import narrowed, widened

SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}


def has_codes(state: dict[str, Any]) -> bool:
    """Whether the moments of a parameter are codes of 8 bits."""
    return all(name in state for name in SCALES.values()) and state["exp_avg"].dtype == torch.int8


def convert(state: dict[str, Any], wants_codes: bool, remainder: torch.dtype) -> None:
    """Have a parameter's state in the format that is wanted of it, rounded to nearest."""
    if "exp_avg" in state and has_codes(state) != wants_codes:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        flat = [_flat(tensor) for tensor in (first, second)]
        if wants_codes:
            *made, first_scale, second_scale = narrowed(*(moment.astype(np.float32) for moment in flat))
            for name, scales in zip(SCALES.values(), (first_scale, second_scale), strict=True):
                state[name] = torch.from_numpy(scales).to(first.device)
        else:
            made = list(widened(*flat, *(_flat(state.pop(name)) for name in SCALES.values())))
        for name, like, values in zip(SCALES, (first, second), made, strict=True):
            state[name] = torch.from_numpy(values).to(like.device).as_strided(like.shape, _strides(like))
    rest = state.get("remainder")
    if rest is not None and rest.dtype != remainder:
        wide = rest.to(torch.int32)
        state["remainder"] = (wide << 8 if remainder == torch.int16 else (wide + 128 >> 8).clamp(max=127)).to(remainder)


def _flat(tensor: Tensor) -> NDArray[Any]:
    """A dense tensor's elements in their order of memory."""
    plain = tensor.detach()
    order = sorted(range(plain.dim()), key=lambda d: -plain.stride(d))
    dense = plain.permute(order).reshape(-1)
    return np.asarray((dense.float() if dense.dtype == torch.bfloat16 else dense).cpu().numpy())


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor in the same order of dimensions."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return tuple(like.stride())
