"""Launches of Triton's kernels, without finding the machine code anew, which takes Triton several times a launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Not left to Triton's default: the rule in float32 is the CPU kernel's up to how products and sums are fused.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
# What a kernel was compiled to for arguments of these kinds, and its constants in the order of its signature.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, args: Sequence[Any], *, warps: int, **constants: Any) -> None:
    """Launch a kernel on PyTorch's current device and stream, as it was compiled for arguments of the same dtypes.

    So a pointer whose alignment may differ has to be named in the kernel's ``do_not_specialize_on_alignment``, and a
    number in its ``do_not_specialize``; all others are the beginning of an allocation.
    """
    kinds = (getattr(arg, "dtype", type(arg)) for arg in args)
    key = (id(kernel), args[0].device, *kinds, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[(programs, 1, 1)](*args, *values)
        return
    compiled = kernel[(programs,)](*args, **constants, num_warps=warps, **OPTIONS)
    if compiled is not None:  # Triton's interpreter compiles nothing
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device PyTorch's current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
