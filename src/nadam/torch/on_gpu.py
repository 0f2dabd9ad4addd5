"""A step on one GPU: what is launched, in which order. Nothing of it is brought to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import inf, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nadam.core.clock import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import StepReport
from nadam.kernels import triton as kernels
from nadam.kernels import triton_prepare as preparing
from nadam.kernels.spans import COMPUTE_DTYPE
from nadam.kernels.triton_formats import ELEMENTS
from nadam.torch.gpu_tables import Launch, State, Tables

# Entries of all tensors on a device -> those of all of them everywhere, where other devices or processes have some.
Combine = Callable[[Tensor], Tensor]
# Not left to Triton's default: the rule in float32 is the CPU kernel's up to how products and sums are fused.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class DevicePlan:
    """Parameters that have been updated equally often, with their counters, on one GPU.

    Args:
        params: Parameters; `gpu_tables.takes` has accepted each.
        states: What is kept of each. Step and momentum product become views of the counters.
        grads: Gradients; None, with accumulation, for one that is missing.
        h: Settings of their group.
        position: Calls since the last update, with accumulation.
        skipped: Calls that were skipped.
        seed: Of rounding by chance, below 2**32.
        decays: Whether each takes part in weight decay; None for all.
        follows: The plan of the same parameters that did not fit these gradients; its counters go on.

    Attributes:
        counters: float64, on the device, laid out as those of `core.clock.Clock`.

    Raises:
        ValueError: The seed is too large.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        grads: Sequence[Tensor | None],
        h: Hyperparameters,
        *,
        position: int = 0,
        skipped: int = 0,
        seed: int = 0,
        decays: Sequence[bool] | None = None,
        follows: DevicePlan | None = None,
    ) -> None:
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed={seed!r}: expected 0 <= seed < 2**32 on a GPU")
        self.tables = Tables(params, states, grads, decays)
        self.seed, self.device = seed, self.tables.device
        count = self.tables.count
        self.counters = self._zeros(SEEN + 3 * count)
        if follows is not None:
            self.counters.copy_(follows.counters)
        steps, products = self.counters[SEEN + count :].view(2, count)
        for name, kept in (("step", steps), ("mu_product", products)):
            old = [state[name].to(states[0][name].device) for state in states]
            kept.copy_(torch.stack(old), non_blocking=True)
            for state, own in zip(states, kept, strict=True):
                state[name] = own
        if follows is None:
            self.counters[CALLS] = steps[0] * (h.gradient_accumulation_steps or 1) + position
            self.counters[MOMENTUM_PRODUCT] = products[0]
            self.counters[SKIPPED] = skipped
        self.scalars = {name: self._zeros(len(kernels.SCALARS), name) for name in ("float32", "float64")}
        self.factors = {name: self._zeros(count, name) for name in ("float32", "float64")}
        self.active = self._zeros(count)
        self.chance = self._zeros(2, "int32")

    def _zeros(self, count: int, dtype: str = "float64") -> Tensor:
        return torch.zeros(count, dtype=getattr(torch, dtype), device=self.device)

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """As of `Tables`."""
        return self.tables.fits(grads)

    def position(self, h: Hyperparameters) -> int:
        """Calls since the last update, with accumulation; it waits for the device."""
        return int(self.counters[CALLS]) % (h.gradient_accumulation_steps or 1)


class Part(NamedTuple):
    """Parameters of a step with settings and counters in common.

    Attributes:
        plan: The tensors.
        h: What the user set; clipping, accumulation, averaging and skipping are the same for all parts of a step.
        lr: Learning rate; a tensor of one element on the device, or a number.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
    """

    plan: DevicePlan
    h: Hyperparameters
    lr: Tensor | float
    beta1: float
    beta2: float


class DeviceReport:
    """What a step on a GPU did, as of `StepReport`; whoever looks waits for the device.

    Of a step in a CUDA graph it tells what the last replay did.

    Args:
        values: For each device, `triton_prepare.REPORT` of each part.
        measured: Whether there is a norm.
        clipped: Whether there is a factor.
        skipped: Calls that had been skipped before the counters began.
    """

    def __init__(self, values: Sequence[Tensor], measured: bool, clipped: bool, skipped: int = 0) -> None:
        self._values, self._measured, self._clipped, self._skipped = values, measured, clipped, skipped

    def read(self) -> StepReport:
        """The report as it is now."""
        rows = [row for values in self._values for row in values.tolist()]
        mode, step, lr, norm, _, skipped = rows[0]
        factor = min((row[4] for row in rows), key=lambda value: (value == value, value))  # a NaN before all others
        updated = mode == kernels.UPDATE
        return StepReport(
            step=int(step),
            learning_rate=lr,
            grad_norm=norm if self._measured and updated else None,
            clip_factor=factor if self._clipped and updated else None,
            skipped_steps=self._skipped + int(skipped),
            skipped=mode == kernels.SKIP,
        )

    def numbers(self) -> Tensor:
        """Norm, clip factor and skipped calls, on the (first) device."""
        return self._values[0][0, 3:6]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __repr__(self) -> str:
        return repr(self.read())


def step(
    parts: Sequence[Part],
    *,
    scale: Tensor | None = None,
    found: Tensor | None = None,
    loss_scale: float = 1.0,
    must_be_finite: bool = False,
    combine: Combine | None = None,
    skipped: int = 0,
) -> DeviceReport:
    """Do one call: an update, one more gradient for the accumulators, or nothing; the device decides.

    Args:
        parts: What is to move, all on one device; at least one.
        scale: What the gradients are divided by: one element on the device.
        found: One element on the device, not 0 if nothing is to change.
        loss_scale: What they are divided by besides.
        must_be_finite: Whether NaN or infinity skips the call even without ``skip_nonfinite``.
        combine: Where other devices or processes hold the rest of the tensors.
        skipped: As of `DeviceReport`.

    Returns:
        What it did, once it is asked.
    """
    entries = measured(
        parts, scale=scale, loss_scale=loss_scale, must_be_finite=must_be_finite, each=combine is not None
    )
    if entries is not None and combine is not None:
        entries = combine(entries)
    return moved(parts, entries, scale=scale, found=found, loss_scale=loss_scale, skipped=skipped)


def step_on_devices(
    parts: Sequence[Part], *, scale: Tensor | None, found: Tensor | None, combine: Combine | None, skipped: int
) -> DeviceReport:
    """The same for parts on several devices, whose norms are of all of them together."""
    devices = list(dict.fromkeys(part.plan.device for part in parts))
    if len(devices) == 1:
        return step(parts, scale=scale, found=found, combine=combine, skipped=skipped)
    own = [[part for part in parts if part.plan.device == device] for device in devices]
    scales, founds = ([_at(given, device) for device in devices] for given in (scale, found))
    seen = [measured(mine, scale=here) for mine, here in zip(own, scales, strict=True)]
    reports = []
    for i, device in enumerate(devices):
        # A device's own come first: by them it clips each gradient.
        sums = [_at(entries, device) for entries in (seen[i], *seen[:i], *seen[i + 1 :])]
        entries = None if seen[i] is None else torch.cat(sums)
        reports.append(moved(own[i], entries, scale=scales[i], found=founds[i], skipped=skipped))
    first = reports[0]
    return DeviceReport(
        [values for report in reports for values in report._values], first._measured, first._clipped, skipped
    )


def _at(value: Tensor | None, device: torch.device) -> Any:
    return None if value is None else value.to(device, non_blocking=True)


def measured(
    parts: Sequence[Part],
    *,
    scale: Tensor | None = None,
    loss_scale: float = 1.0,
    must_be_finite: bool = False,
    each: bool = False,
) -> Tensor | None:
    """Read the gradients once, where anything asks for that.

    Returns:
        float64 of `triton.PARTIALS` columns: sums of squares, those of shrunk values, and how many values are too
        large; a row per tensor, or per chunk if neither the settings nor ``each`` ask for tensors. Rows may be added
        up. None if nothing asks.
    """
    h = parts[0].h
    check = Check.SQUARES_FINITE if h.skip_nonfinite else Check.FINITE if must_be_finite else Check.NOTHING
    if check is Check.NOTHING and h.clipnorm is None and h.global_clipnorm is None:
        return None
    each = each or h.clipnorm is not None
    device = parts[0].plan.device
    total = sum(part.plan.tables.chunk_count for part in parts)
    partials = torch.empty((total, kernels.PARTIALS), dtype=torch.float64, device=device)
    rows = sum(part.plan.tables.count for part in parts)
    entries = torch.empty((rows, kernels.PARTIALS), dtype=torch.float64, device=device) if each else partials
    first_chunk = first = 0
    with _on(device):
        for plan, own, *_ in parts:
            tables = plan.tables
            mine = partials[first_chunk : first_chunk + tables.chunk_count]
            for launch in tables.launches:
                _measure(plan, own, launch, mine[launch.first :], scale, 1.0 / loss_scale, check)
            if each:
                sums = preparing.sums[(tables.count,)]
                sums(mine, tables.ends, entries[first:], BLOCK=preparing.BLOCK, num_warps=preparing.WARPS, **OPTIONS)
            first_chunk, first = first_chunk + tables.chunk_count, first + tables.count
    return entries


def _measure(
    plan: DevicePlan,
    h: Hyperparameters,
    launch: Launch,
    partials: Tensor,
    scale: Tensor | None,
    unscale: float,
    check: Check,
) -> None:
    compute = COMPUTE_DTYPE[launch.param_format]
    largest = torch.finfo(getattr(torch, compute)).max
    kernels.measure[(launch.chunks,)](
        plan.tables.rows,
        plan.tables.chunks[launch.first :],
        partials,
        plan.counters,
        scale,
        unscale,
        sqrt(largest) if check is Check.SQUARES_FINITE else largest,
        float(h.gradient_accumulation_steps or 1),
        GRAD=launch.grad_format,
        GRAD_ELEMENT=ELEMENTS[launch.grad_format],
        COMPUTE=ELEMENTS[compute],
        ACCUMULATED=h.gradient_accumulation_steps is not None,
        CHECKED=check is not Check.NOTHING,
        BLOCK=launch.block,
        num_warps=kernels.WARPS,
        **OPTIONS,
    )


def moved(
    parts: Sequence[Part],
    entries: Tensor | None,
    *,
    scale: Tensor | None = None,
    found: Tensor | None = None,
    loss_scale: float = 1.0,
    skipped: int = 0,
) -> DeviceReport:
    """Decide what the step does, and do it.

    Args:
        parts: As of `step`.
        entries: What `measured` gave, or what was made of it.
        scale: As of `step`.
        found: As of `step`.
        loss_scale: As of `step`.
        skipped: As of `DeviceReport`.
    """
    h, device = parts[0].h, parts[0].plan.device
    values = torch.empty((len(parts), len(preparing.REPORT)), dtype=torch.float64, device=device)
    first = 0
    with _on(device):
        for part, report in zip(parts, values, strict=True):
            own = None if entries is None or part.h.clipnorm is None else entries[first:]
            _prepare(part, entries, own, report, scale, found, 1.0 / loss_scale)
            first += part.plan.tables.count
        for part in parts:
            for launch in part.plan.tables.launches:
                _update(part.plan, part.h, launch)
    clipped = h.clipnorm is not None or h.global_clipnorm is not None
    return DeviceReport([values], entries is not None, clipped, skipped)


def _prepare(
    part: Part,
    entries: Tensor | None,
    own: Tensor | None,
    report: Tensor,
    scale: Tensor | None,
    found: Tensor | None,
    unscale: float,
) -> None:
    plan, h, lr = part.plan, part.h, part.lr
    clips = (h.clipnorm, h.global_clipnorm, h.clipvalue)
    on_device = isinstance(lr, Tensor) and lr.device == plan.device
    preparing.prepare[(1,)](
        plan.counters,
        plan.tables.rows,
        entries,
        own,
        plan.scalars["float32"],
        plan.scalars["float64"],
        plan.factors["float32"],
        plan.factors["float64"],
        plan.active,
        plan.chance,
        report,
        found,
        scale,
        lr if on_device else None,
        plan.tables.count,
        0 if entries is None else len(entries),
        unscale,
        float(h.gradient_accumulation_steps or 1),
        0.0 if on_device else float(lr),
        float(part.beta1),
        float(part.beta2),
        float(h.eps),
        float(h.momentum_decay),
        float(h.weight_decay or 0.0),
        next((float(clip) for clip in clips if clip is not None), inf),
        float(h.ema_momentum),
        -1.0 if h.maximize else 1.0,
        plan.seed,
        MEASURED=entries is not None,
        EACH=h.clipnorm is not None,
        GLOBAL=h.global_clipnorm is not None,
        COUPLED=h.coupled_weight_decay,
        ACCUMULATED=h.gradient_accumulation_steps is not None,
        FREQUENCY=h.ema_overwrite_frequency if h.use_ema else None,
        ROUNDED=any(launch.rounded for launch in plan.tables.launches),
        BLOCK=preparing.BLOCK,
        num_warps=preparing.WARPS,
        **OPTIONS,
    )


def _update(plan: DevicePlan, h: Hyperparameters, launch: Launch) -> None:
    compute = COMPUTE_DTYPE[launch.param_format]
    kernels.one_pass[(launch.chunks,)](
        plan.tables.rows,
        plan.tables.chunks[launch.first :],
        plan.scalars[compute],
        plan.factors[compute],
        plan.active,
        plan.chance,
        PARAM=launch.param_format,
        GRAD=launch.grad_format,
        PARAM_ELEMENT=ELEMENTS[launch.param_format],
        GRAD_ELEMENT=ELEMENTS[launch.grad_format],
        ACCUMULATED=h.gradient_accumulation_steps is not None,
        LIMITED=h.clipvalue is not None,
        AVERAGED=h.use_ema,
        COUPLED=h.coupled_weight_decay and bool(h.weight_decay),
        ROUNDED=launch.rounded,
        EACH=h.clipnorm is not None,
        BLOCK=launch.block,
        num_warps=kernels.WARPS,
        **OPTIONS,
    )


def _on(device: torch.device) -> Any:
    """Triton launches on PyTorch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
