"""A step on GPUs: what is launched, in which order. Two to four launches, and nothing is brought to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nadam.core.dtypes import COMPUTE_DTYPE
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.kernels.gpu import passes as kernels
from nadam.kernels.gpu import prepare as preparing
from nadam.kernels.gpu.formats import ELEMENT
from nadam.torch.gpu.launch import launch, on
from nadam.torch.gpu.plan import DevicePlan
from nadam.torch.gpu.report import DeviceReport
from nadam.torch.gpu.tables import Kind

# Entries of all tensors on a device -> those of all of them everywhere, where other devices or processes have some.
Combine = Callable[[Tensor], Tensor]


class Bucket(NamedTuple):
    """Parameters of a step with settings and counters in common.

    Attributes:
        plan: The tensors.
        h: What the user set; clipping, accumulation, averaging and skipping are the same for all buckets of a step.
        lr: Learning rate; a tensor of one element on the device, or a number.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
    """

    plan: DevicePlan
    h: Hyperparameters
    lr: Tensor | float
    beta1: float
    beta2: float


def step(
    buckets: Sequence[Bucket],
    *,
    scale: Tensor | None = None,
    found: Tensor | None = None,
    loss_scale: float = 1.0,
    must_be_finite: bool = False,
    combine: Combine | None = None,
    skipped: int = 0,
) -> DeviceReport:
    """Do one call: an update, one more gradient for the accumulators, or nothing; the device decides."""
    entries = measured(
        buckets, scale=scale, loss_scale=loss_scale, must_be_finite=must_be_finite, each=combine is not None
    )
    if entries is not None and combine is not None:
        entries = combine(entries)
    return moved(buckets, entries, scale=scale, found=found, loss_scale=loss_scale, skipped=skipped)


def step_on_devices(
    buckets: Sequence[Bucket], *, scale: Tensor | None, found: Tensor | None, combine: Combine | None, skipped: int
) -> DeviceReport:
    """Do one call for buckets on one or several devices; a norm is that of all of them together."""
    devices = list(dict.fromkeys(bucket.plan.device for bucket in buckets))
    if len(devices) == 1:
        return step(buckets, scale=scale, found=found, combine=combine, skipped=skipped)
    own = [[bucket for bucket in buckets if bucket.plan.device == device] for device in devices]
    scales, founds = ([_at(given, device) for device in devices] for given in (scale, found))
    seen = [measured(mine, scale=here) for mine, here in zip(own, scales, strict=True)]
    reports = []
    for i, device in enumerate(devices):
        # A device's own come first: by them it clips each gradient.
        sums = [_at(entries, device) for entries in (seen[i], *seen[:i], *seen[i + 1 :])]
        entries = None if seen[i] is None else torch.cat(sums)
        reports.append(moved(own[i], entries, scale=scales[i], found=founds[i], skipped=skipped))
    return reports[0].and_of(reports[1:])


def _at(value: Tensor | None, device: torch.device) -> Any:
    return None if value is None else value.to(device, non_blocking=True)


def measured(
    buckets: Sequence[Bucket],
    *,
    scale: Tensor | None = None,
    loss_scale: float = 1.0,
    must_be_finite: bool = False,
    each: bool = False,
) -> Tensor | None:
    """Read the gradients once, where anything asks for that."""
    h = buckets[0].h
    check = h.check(must_be_finite)
    if check is Check.NOTHING and not h.measures_norm:
        return None
    each = each or h.clipnorm is not None
    device = buckets[0].plan.device
    total = sum(bucket.plan.tables.chunk_count for bucket in buckets)
    partials = torch.empty((total, kernels.PARTIALS), dtype=torch.float64, device=device)
    rows = sum(bucket.plan.tables.count for bucket in buckets)
    entries = torch.empty((rows, kernels.PARTIALS), dtype=torch.float64, device=device) if each else partials
    first_chunk = first = 0
    with on(device):
        for plan, own, *_ in buckets:
            tables = plan.tables
            mine = partials[first_chunk : first_chunk + tables.chunk_count]
            for kind in tables.kinds:
                _measure(plan, own, kind, mine[kind.first :], scale, 1.0 / loss_scale, check)
            if each:
                args = (mine, tables.ends, entries[first:])
                launch(preparing.sums, tables.count, args, warps=preparing.WARPS, BLOCK=preparing.BLOCK)
            first_chunk, first = first_chunk + tables.chunk_count, first + tables.count
    return entries


def _measure(
    plan: DevicePlan, h: Hyperparameters, kind: Kind, partials: Tensor, scale: Any, inv_scale: float, check: Check
) -> None:
    compute = COMPUTE_DTYPE[kind.param_format]
    largest = torch.finfo(getattr(torch, compute)).max
    bound = sqrt(largest) if check is Check.SQUARES_FINITE else largest
    calls = float(h.gradient_accumulation_steps or 1)
    launch(
        kernels.measure,
        kind.programs,
        (plan.tables.rows, kind.chunks, partials, plan.counters, scale, inv_scale, bound, calls),
        warps=kernels.WARPS,
        GRAD=kind.grad_format,
        COMPUTE=compute,
        ACCUMULATED=h.gradient_accumulation_steps is not None,
        CHECKED=check is not Check.NOTHING,
        BLOCK=min(kind.block, kernels.BLOCK),
    )


def moved(
    buckets: Sequence[Bucket],
    entries: Tensor | None,
    *,
    scale: Tensor | None = None,
    found: Tensor | None = None,
    loss_scale: float = 1.0,
    skipped: int = 0,
) -> DeviceReport:
    """Decide what the step does, and do it."""
    h, device = buckets[0].h, buckets[0].plan.device
    values = torch.empty((len(buckets), len(preparing.REPORT)), dtype=torch.float64, device=device)
    first = 0
    with on(device):
        for bucket, report in zip(buckets, values, strict=True):
            own = None if entries is None or bucket.h.clipnorm is None else entries[first:]
            _prepare(bucket, entries, own, report, scale, found, 1.0 / loss_scale)
            first += bucket.plan.tables.count
        for bucket in buckets:
            for kind in bucket.plan.tables.kinds:
                _update(bucket.plan, bucket.h, kind)
    return DeviceReport([values], entries is not None, h.clips_by_norm, skipped)


def _prepare(bucket: Bucket, entries: Any, own: Any, report: Tensor, scale: Any, found: Any, inv_scale: float) -> None:
    plan, h, lr = bucket.plan, bucket.h, bucket.lr
    on_device = isinstance(lr, Tensor) and lr.device == plan.device
    clip = next((clip for clip in (h.clipnorm, h.global_clipnorm, h.clipvalue) if clip is not None), inf)
    settings = h.settings(Now(0.0 if on_device else float(lr), bucket.beta1, bucket.beta2))
    args = (
        plan.counters,
        plan.tables.rows,
        entries,
        own,
        plan.scalars["float32"],
        plan.scalars["float64"],
        plan.factors["float32"],
        plan.factors["float64"],
        plan.active,
        plan.step_key,
        report,
        found,
        scale,
        lr if on_device else None,
        plan.tables.count,
        0 if entries is None else len(entries),
        inv_scale,
        float(h.gradient_accumulation_steps or 1),
        *settings[:6],
        clip,
        settings.ema_momentum,
        -1.0 if h.maximize else 1.0,
        plan.seed,
    )
    launch(
        preparing.prepare,
        1,
        args,
        warps=preparing.WARPS,
        MEASURED=entries is not None,
        EACH=h.clipnorm is not None,
        GLOBAL=h.global_clipnorm is not None,
        COUPLED=h.coupled_weight_decay,
        ADAM=settings.adam_correction,
        ACCUMULATED=h.gradient_accumulation_steps is not None,
        FREQUENCY=h.ema_overwrite_frequency if h.use_ema else None,
        ROUNDED=any(kind.rounds for kind in plan.tables.kinds),
        BLOCK=preparing.BLOCK,
    )


def _update(plan: DevicePlan, h: Hyperparameters, kind: Kind) -> None:
    compute, flags = COMPUTE_DTYPE[kind.param_format], h.flags
    launch(
        kernels.one_pass,
        kind.programs,
        (plan.tables.rows, kind.chunks, plan.scalars[compute], plan.factors[compute], plan.active, plan.step_key),
        warps=kind.warps,
        PARAM=kind.param_format,
        GRAD=kind.grad_format,
        COMPUTE=compute,
        ELEMENT=ELEMENT[kind.param_format],
        ACCUMULATED=flags.accumulated,
        LIMITED=flags.limited,
        COUPLED=flags.penalized,
        AVERAGED=flags.averaged,
        KEPT=kind.kept,
        EACH=h.clipnorm is not None,
        BLOCK=kind.block,
    )
