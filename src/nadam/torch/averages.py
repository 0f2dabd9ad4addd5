"""The moving averages of an optimizer's parameters: taking them for the parameters, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nadam.torch.fallback import joined, store
from nadam.torch.sharding import local


class WithAverages:
    """What `NAdam` has of its averages."""

    param_groups: list[dict[str, Any]]
    state: Any
    _extras: dict[str, Any]
    _swapped = False  # whether the parameters have the values of their averages

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the block, parameters have the values of their moving averages, and `step` is refused.

        Raises:
            RuntimeError: ``use_ema`` is not set.

        Example:
            >>> from nadam.torch import NAdam
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = NAdam([weight], use_ema=True)
            >>> with optimizer.swap_ema():
            ...     pass  # evaluate
        """
        kept = [(param, entry, joined(param.detach(), entry).clone()) for param, entry in self._averaged()]
        before, self._swapped = self._swapped, True
        try:
            self.finalize()
            yield
        finally:
            self._swapped = before
            with torch.no_grad():
                for param, entry, value in kept:
                    store(param, entry, value)

    @torch.no_grad()
    def finalize(self) -> None:
        """Set parameters to their moving averages; before the first update nothing happens.

        Raises:
            RuntimeError: ``use_ema`` is not set.
        """
        for param, entry in self._averaged():
            store(param, entry, entry["ema"])

    def _averaged(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """This process's shares of parameters that have been updated, and of their state."""
        if not self._extras["use_ema"]:
            raise RuntimeError("use_ema=False: there is no moving average")
        entries = [(p, self.state[p]) for group in self.param_groups for p in group["params"] if self.state.get(p)]
        updated = [(local(param), entry) for param, entry in entries if float(entry["step"]) > 0]
        return [(param, {name: local(value) for name, value in entry.items()}) for param, entry in updated]
