"""A step made of PyTorch's own operations: for devices without a kernel, and for steps that are differentiated.

By its foreach functions, one call does an operation for all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.counters import CounterBuffers
from nadam.core.dtypes import SHRINK, SMALLEST_NORMAL
from nadam.core.element import Flags
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.library import mathematics
from nadam.core.rounding import keys
from nadam.core.scalars import Scalars, clamp_eps
from nadam.core.step import Bucket, Factors
from nadam.torch.buckets import STATE_DTYPES
from nadam.torch.memory import real


def _operator(function: Callable[..., Any]) -> Callable[[Lists, Any], Lists]:
    def apply(self: Lists, other: Any) -> Lists:
        return Lists(function(self.tensors, other.tensors if isinstance(other, Lists) else other))

    return apply


class Lists:
    """Many tensors as one value: each operation is one call of PyTorch's foreach functions for all of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    __add__ = __radd__ = _operator(torch._foreach_add)
    __sub__ = _operator(torch._foreach_sub)
    __mul__ = __rmul__ = _operator(torch._foreach_mul)
    __truediv__ = _operator(torch._foreach_div)
    __lt__ = _operator(lambda tensors, bound: [tensor < bound for tensor in tensors])
    __gt__ = _operator(lambda tensors, bound: [tensor > bound for tensor in tensors])


class ListMathematics:
    """The functions that `core.library.mathematics` takes from a library, for Lists."""

    @staticmethod
    def sqrt(values: Lists) -> Lists:
        return Lists(torch._foreach_sqrt(values.tensors))

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        if not isinstance(condition, Lists):
            return yes if condition else no
        columns = (each.tensors if isinstance(each, Lists) else repeat(each) for each in (yes, no))
        return Lists([torch.where(*row) for row in zip(condition.tensors, *columns, strict=False)])

    log = expm1 = sqrt  # of scalars, which are floats here and pass by


class Row:
    """One parameter with its state and gradient; complex tensors as pairs of reals."""

    def __init__(self, param: Tensor, state: dict[str, Tensor], grad: Tensor) -> None:
        self.param, self.grad = real(param), real(grad)
        self.state = {name: real(value) for name, value in state.items()}


class FallbackPlan:
    """A `core.step.Plan` for tensors anywhere; nothing is brought to the host but norms that were asked for."""

    def __init__(self, rows: Sequence[Row], members: NDArray[np.int64], seed: int = 0) -> None:
        self.rows, self.members, self.seed = rows, members, seed

    def _wide(self, inv_scale: float | None, accumulated: bool) -> Lists:
        grads = Lists([row.grad.to(row.state["exp_avg_sq"].dtype) for row in self.rows])
        if inv_scale is not None and inv_scale != 1.0:
            grads = grads * inv_scale
        return grads + Lists([row.state["grad_accumulator"] for row in self.rows]) if accumulated else grads

    def measure(self, inv_scale: float, accumulated: bool, check: Check) -> tuple[list[float], bool]:
        if check is not Check.NOTHING:
            grads = self._wide(inv_scale, accumulated=False).tensors
            largest = [torch.finfo(g.dtype).max ** (0.5 if check is Check.SQUARES_FINITE else 1.0) for g in grads]
            inside = [(g.abs() <= bound).all() for g, bound in zip(grads, largest, strict=True)]
            if not all(bool(each) for each in inside):
                return [], False
        # In float64 the squares of float32 and half gradients do not overflow; those of float64 are shrunk.
        grads = [g.double() for g in self._wide(inv_scale, accumulated).tensors]
        sums = [float((g * g).sum()) for g in grads]
        norms = [sqrt(total) for total in sums]
        for i, total in enumerate(sums):
            if total == inf:
                norms[i] = float((grads[i] * SHRINK["float64"]).square().sum().sqrt()) / SHRINK["float64"]
        return norms, True

    @torch.no_grad()
    def accumulate(self, inv_scale: float, buffers: CounterBuffers) -> None:
        buffers.current[:] = buffers.next
        added = self._wide(inv_scale, accumulated=False)
        torch._foreach_add_([row.state["grad_accumulator"] for row in self.rows], added.tensors)

    def update_at_once(self, bucket: Bucket, grad_factor: float) -> bool:
        return False

    @torch.no_grad()
    def update(
        self, s: Scalars, flags: Flags, *, grad_factors: Factors, buffers: CounterBuffers, step: int = 0
    ) -> None:
        buffers.current[:] = buffers.next
        rows = self.rows
        exp_avg_sqs = Lists([row.state["exp_avg_sq"] for row in rows])
        floors = [clamp_eps(s.eps, s.eps, torch.finfo(each.dtype).smallest_normal) for each in exp_avg_sqs.tensors]
        s = s._replace(eps=floors[0] if len(set(floors)) == 1 else _scalars(floors, exp_avg_sqs))

        def stored(params: Lists) -> Lists:
            for row, param in zip(rows, params.tensors, strict=True):
                store(row.param, row.state, param)
            return Lists([joined(row.param, row.state) for row in rows])

        params, exp_avgs, new, emas = mathematics(ListMathematics).element(stored)(
            Lists([joined(row.param, row.state) for row in rows]),
            self._wide(None, accumulated=False),
            Lists([row.state["exp_avg"].to(row.state["exp_avg_sq"].dtype) for row in rows]),
            exp_avg_sqs,
            Lists([row.state["ema"] for row in rows]) if flags.averaged else None,
            Lists([row.state["grad_accumulator"] for row in rows]) if flags.accumulated else None,
            grad_factors if isinstance(grad_factors, float) else _scalars(grad_factors, exp_avg_sqs),
            s.decay,
            s,
            *flags,
        )
        torch._foreach_copy_(exp_avg_sqs.tensors, new.tensors)
        for row, exp_avg, key in zip(rows, exp_avgs.tensors, keys(self.seed, step, self.members).tolist(), strict=True):
            rounded = row.state["exp_avg"].dtype == torch.bfloat16
            row.state["exp_avg"].copy_(stochastically_rounded(exp_avg, key) if rounded else exp_avg)
        if flags.accumulated:
            torch._foreach_zero_([row.state["grad_accumulator"] for row in rows])
        if flags.averaged:
            torch._foreach_copy_([row.state["ema"] for row in rows], emas.tensors)
            if s.overwrite:
                stored(params)


def _scalars(factors: Sequence[float], like: Lists) -> Lists:
    pairs = zip(factors, like.tensors, strict=True)
    return Lists([torch.tensor(factor, dtype=each.dtype, device=each.device) for factor, each in pairs])


def stochastically_rounded(value: Tensor, key: int) -> Tensor:
    """float32 as bfloat16, by the same hash as in kernels/cpu/formats.py; integers here are of 64 bits."""
    order = sorted(range(value.dim()), key=lambda d: -value.stride(d))
    dense = value.permute(order)
    x = torch.arange(value.numel(), device=value.device) * 0x9E3779B9 % 2**32 ^ key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    chance = (x ^ x >> 16) >> 16
    bits = dense.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    up = torch.where(dense.isfinite(), bits + chance.view(bits.shape), bits | dense.isnan().to(torch.int64) << 22)
    back = [order.index(d) for d in range(value.dim())]
    return (up >> 16 << 16).to(torch.int32).view(torch.float32).permute(back).to(torch.bfloat16)


def joined(param: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A parameter in the dtype that is computed in, with its remainder."""
    rest = state.get("remainder")
    if rest is None:
        return param.to(STATE_DTYPES.get(param.dtype, param.dtype))
    # As a signed number: a remainder of half a unit or more stands for a bfloat16 that was rounded up.
    upper = param.to(rest.device).view(torch.int16).to(torch.int32) << 16
    return (upper + (rest.to(torch.int32) << 16 - 8 * rest.itemsize)).view(torch.float32)


def store(param: Tensor, state: dict[str, Tensor], value: Tensor) -> None:
    """Set a parameter, and its remainder; one of 8 bits is rounded to nearest."""
    rest = state.get("remainder")
    if rest is None:
        param.copy_(value)
        return
    bits, nan = value.view(torch.int32), value.isnan()
    if rest.dtype == torch.int8:
        bits = bits + 0x80
    lower = (bits & 0xFFFF) >> 16 - 8 * rest.itemsize
    rest.copy_(torch.where(nan, 0, lower).to(rest.dtype))
    param.copy_(torch.where(nan, 0x7FC0, (bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))


def differentiable_step(h: Hyperparameters, now: Now, rows: Sequence[Row]) -> None:
    """One update that autograd can follow: parameters and state are changed in place, as by PyTorch's own."""
    m = mathematics(torch)
    for row in rows:
        state = row.state
        state["step"].add_(1)
        step, product = state["step"].detach(), state["mu_product"]
        s, product = m.scalars(h.settings(now), step, step, product, 1.0, SMALLEST_NORMAL["float32"])
        param, exp_avg, exp_avg_sq, _ = m.element(lambda param: param)(
            row.param,
            row.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            None,
            None,
            -1.0 if h.maximize else 1.0,
            s.decay,
            s,
            *h.flags,
        )
        state["mu_product"].copy_(product)
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)
        row.param.copy_(param)
