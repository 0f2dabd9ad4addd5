"""Tables, counters and scalars of parameters that are updated together, on their GPU, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SEEN
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.gpu.passes import SCALARS
from nadam.torch.gpu.tables import State, Tables
from nadam.torch.memory import Array


class DevicePlan:
    """Parameters that have been updated equally often, with their counters, on one GPU.

    Attributes:
        counters: float64, on the device, laid out as in `core.counters.Counters`.
        fits: `Tables.fits` of its tables.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        grads: Sequence[Tensor | None],
        h: Hyperparameters,
        *,
        position: int = 0,
        seed: int = 0,
        decays: Sequence[bool] | None = None,
        written: Sequence[Array] | None = None,
    ) -> None:
        self.tables = tables = Tables(params, states, grads, decays, written)
        self.seed, self.device, self.fits = seed, tables.device, tables.fits
        count = tables.count
        self.counters = self._zeros(SEEN + 3 * count)
        steps, products = self.counters[SEEN + count :].view(2, count)
        for name, kept in (("step", steps), ("mu_product", products)):
            old = [state[name].to(states[0][name].device) for state in states]
            kept.copy_(torch.stack(old), non_blocking=True)
            for state, own in zip(states, kept, strict=True):
                state[name] = own
        self.counters[CALLS] = steps[0] * (h.gradient_accumulation_steps or 1) + position
        self.counters[MOMENTUM_PRODUCT] = products[0]
        for state, seen in zip(states, self.counters[SEEN : SEEN + count], strict=True):
            if state.get("grad_accumulator") is not None:
                known = state.get("accumulated")
                seen.copy_(state["grad_accumulator"].any() if known is None else known)
                state["accumulated"] = seen
        self.scalars = {name: self._zeros(len(SCALARS), name) for name in ("float32", "float64")}
        self.factors = {name: self._zeros(count, name) for name in ("float32", "float64")}
        self.active = self._zeros(count)
        self.step_key = self._zeros(1, "int32")

    def _zeros(self, count: int, dtype: str = "float64") -> Tensor:
        return torch.zeros(count, dtype=getattr(torch, dtype), device=self.device)
