"""What a step is made of: the parameters that have a gradient, kept from step to step for as long as they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import Part
from nadam.torch import batches
from nadam.torch.batches import Batch, Keeping
from nadam.torch.settings import Settings
from nadam.torch.sharding import local


class Parts:
    """The parts of the steps of one optimizer.

    Args:
        settings: Of its groups.
        keeping: How its state is kept.
        accumulation_steps: Calls per update, or None.
        name: What it is called in messages.
    """

    def __init__(self, settings: Settings, keeping: Keeping, accumulation_steps: int | None, name: str) -> None:
        self._settings, self._keeping, self._name = settings, keeping, name
        self._accumulation_steps = accumulation_steps
        self._batches: list[Batch] = []
        self.sharded = False  # whether a parameter was split over processes

    def forget(self) -> None:
        """Look everything up anew at the next step."""
        self._batches = []

    def release(self) -> None:
        """After a step: hold its gradients no longer."""
        for batch in self._batches:
            for cohort in batch.cohorts:
                cohort.held = None

    def now(self, groups: Sequence[dict[str, Any]], state: Any, position: int) -> tuple[list[Part], list[Tensor]]:
        """All parameters that have a gradient, with their settings and counters.

        Args:
            groups: The optimizer's.
            state: The optimizer's; that of new parameters is added.
            position: Calls since the last update, with accumulation.

        Returns:
            The parts, and the parameters in them.

        Raises:
            ValueError: A setting out of its range, or memory that overlaps.
            RuntimeError: A sparse gradient.
        """
        updating = self._accumulation_steps is not None and position == self._accumulation_steps - 1
        for batch in self._batches:
            if not batch.knows(state) or (updating and any(_owed(state.get(param)) for param in batch.absent)):
                self._batches = []
                break
        same = self._same(groups)
        return same if same is not None else self._anew(groups, state, position, updating)

    def _same(self, groups: Sequence[dict[str, Any]]) -> tuple[list[Part], list[Tensor]] | None:
        """Those of the last step with the settings of now; None if more than values has changed since."""
        if len(self._batches) != len(groups):
            return None
        parts: list[Part] = []
        params: list[Tensor] = []
        for index, (group, batch) in enumerate(zip(groups, self._batches, strict=True)):
            own = batch.parts(group["params"], *self._settings.now(index, group))
            if own is None:
                return None
            parts += own
            params += batch.params
        return parts, params

    def _anew(
        self, groups: Sequence[dict[str, Any]], state: Any, position: int, updating: bool
    ) -> tuple[list[Part], list[Tensor]]:
        found = []
        for index, group in enumerate(groups):
            h, now = self._settings.now(index, group)
            known = self._batches[index] if index < len(self._batches) else None
            grads = None if known is None else known.grads(group["params"])
            if known is not None and grads is not None:
                batch = known
            else:
                batch = self._batch(group["params"], h, state, position, updating)
                self._batches[index:] = [batch, *self._batches[index + 1 :]]
                grads = [_gradient(param) for param in batch.params]
            found.append((h, now, batch, grads))
        parts: list[Part] = []
        params: list[Tensor] = []
        for h, now, batch, grads in found:
            for cohort, places in zip(batch.cohorts, batch.places, strict=True):
                own = grads if len(batch.cohorts) == 1 else [grads[i] for i in places]
                parts.append(Part(h, now, cohort.clock, cohort.planned(own, self._name)))
                params += cohort.params
        return parts, params

    @torch.no_grad()
    def _batch(self, source: list[Tensor], h: Hyperparameters, state: Any, position: int, updating: bool) -> Batch:
        """The parameters with a gradient; with accumulation, at an update, also those that had one in its window."""
        chosen = [p for p in source if p.grad is not None or (updating and _owed(state.get(p)))]
        for param in chosen:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(f"{self._name} does not support sparse gradients")
        states = []
        for param in chosen:
            if not state[param]:
                state[param] = batches.new_state(param, h, self._keeping)
            states.append(state[param])
        batch = Batch(source, chosen, batches.cohorts(chosen, states, h, position, self._keeping))
        self.sharded = self.sharded or batch.sharded
        return batch


def _owed(entry: Mapping[str, Any] | None) -> bool:
    """Whether a parameter without a gradient had one earlier in this window: it counts as zero now."""
    return bool(entry) and bool(entry["grad_accumulator"].any())  # type: ignore[index]


def _gradient(param: Tensor) -> Tensor:
    if param.grad is not None:
        return param.grad
    share = local(param)
    return share.new_zeros(()).expand(share.shape)
