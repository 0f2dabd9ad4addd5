"""The moving averages of an optimizer's parameters: taking them for the parameters, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nadam.core.exclusive import Exclusive
from nadam.torch.fallback import joined, store
from nadam.torch.sharding import local


class WithAverages:
    """What `NAdam` has of its averages."""

    param_groups: list[dict[str, Any]]
    state: Any
    _extras: dict[str, Any]
    _exclusive: Exclusive
    _swapped = False  # whether the parameters have the values of their averages

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the block, parameters have the values of their moving averages, and `step` is refused.

        Raises:
            RuntimeError: ``use_ema`` is not set; a call from within a step, as by a signal handler.

        Example:
            >>> from nadam.torch import NAdam
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = NAdam([weight], use_ema=True)
            >>> with optimizer.swap_ema():
            ...     pass  # evaluate
        """
        kept: list[Any] = []
        before = self._swapped
        try:
            self._exclusive.run("swap_ema", self._swap_in, kept)
            yield
        finally:
            self._exclusive.run("swap_ema", self._swap_out, kept, before)

    def finalize(self) -> None:
        """Set parameters to their moving averages; before the first update nothing happens.

        Another thread's step is waited for.

        Raises:
            RuntimeError: ``use_ema`` is not set; a call from within a step, as by a signal handler.
        """
        self._exclusive.run("finalize", self._take_averages)

    def _swap_in(self, kept: list[Any]) -> None:
        kept += [(param, entry, joined(param.detach(), entry).clone()) for param, entry in self._averaged()]
        self._swapped = True
        self._take_averages()

    @torch.no_grad()
    def _swap_out(self, kept: list[Any], before: bool) -> None:
        for param, entry, value in kept:
            store(param, entry, value)
        self._swapped = before

    @torch.no_grad()
    def _take_averages(self) -> None:
        for param, entry in self._averaged():
            store(param, entry, entry["ema"])

    def _averaged(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """This process's shares of parameters that have been updated, and of their state."""
        if not self._extras["use_ema"]:
            raise RuntimeError("use_ema=False: there is no moving average")
        entries = [(p, self.state[p]) for group in self.param_groups for p in group["params"] if self.state.get(p)]
        updated = [(local(param), entry) for param, entry in entries if float(entry["step"]) > 0]
        return [(param, {name: local(value) for name, value in entry.items()}) for param, entry in updated]
