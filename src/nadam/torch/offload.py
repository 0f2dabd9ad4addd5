"""State off the device: parameters have copies on the CPU, where the state is, and the step is the CPU's.

Before a step gradients are copied over, after it the copies' new values back, through pinned memory and without waiting
for one another. So all that a step on the CPU does, it does here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nadam.torch.buckets import Groups, State


def is_away(param: Tensor) -> bool:
    """Whether a parameter is somewhere else than on the CPU."""
    return not param.is_cpu


class Copy:
    """A parameter's copy on the CPU, and the memory for its gradient."""

    def __init__(self, param: Tensor) -> None:
        self._param, self._grad = param, _on_the_cpu(param)
        self._waits = not param.is_cuda  # whether a copy is done when the next line runs
        self.host = _on_the_cpu(param)

    def fetch(self) -> None:
        """Have values and gradient copied to the CPU."""
        grad = self._param.grad
        self.host.copy_(self._param.detach(), non_blocking=not self._waits)
        if grad is None:
            self.host.grad = None
            return
        if _lies(self._grad) != _lies(grad):
            self._grad = _on_the_cpu(grad)
        self.host.grad = self._grad.copy_(grad, non_blocking=not self._waits)

    def give_back(self) -> None:
        """Set the parameter to the copy's values."""
        self._param.copy_(self.host, non_blocking=not self._waits)


class Offload:
    """The copies of an optimizer's parameters, and its groups and state as of these."""

    def __init__(self) -> None:
        self._copies: dict[int, Copy] = {}  # by the parameters' ids
        self._hosts: list[list[Tensor]] = []  # as the user's groups, with the copies
        self._sources: list[list[Tensor]] = []
        self._layout: list[Any] = []  # of the parameters, as the copies were made of them
        self.state: dict[Any, State] = {}

    @torch.no_grad()
    def begin(self, groups: Groups, state: Any) -> Groups:
        """Fetch all; gives the groups with copies for parameters, whose state is in ``self.state``."""
        sources = [list(group["params"]) for group in groups]
        layout = [[(id(param), param.device, *_lies(param)) for param in each] for each in sources]
        if layout != self._layout:  # also where somebody has given a parameter another dtype, shape or device
            self._layout, self._sources, self.state = layout, sources, {}
            self._copies = {id(param): Copy(param) for each in sources for param in each if is_away(param)}
            self._hosts = [[self._host(param) for param in each] for each in sources]
        for param, host in self._pairs():
            if param not in state:
                self.state.pop(host, None)
            elif self.state.get(host) is not state[param]:
                self.state[host] = state[param]
        for copy in self._copies.values():
            copy.fetch()
        devices = {param.device for param, _ in self._pairs() if param.is_cuda}
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return [{**group, "params": hosts} for group, hosts in zip(groups, self._hosts, strict=True)]

    @torch.no_grad()
    def end(self, moved: Sequence[Tensor], state: Any) -> None:
        """Set parameters to the values that these copies have now; new state is theirs."""
        ids = set(map(id, moved))
        for param, host in self._pairs():
            if host in self.state:
                state[param] = self.state[host]
            if host is not param and id(host) in ids:
                self._copies[id(param)].give_back()

    def _host(self, param: Tensor) -> Tensor:
        return self._copies[id(param)].host if id(param) in self._copies else param

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters with what the step takes for them."""
        return zip(chain.from_iterable(self._sources), chain.from_iterable(self._hosts), strict=True)


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common of which one is to hold the values of the other."""
    return tensor.dtype, tensor.shape, tensor.stride()


def _on_the_cpu(tensor: Tensor) -> Tensor:
    """Memory on the CPU for a tensor's values, which a device can reach by itself."""
    made = torch.empty_like(tensor.detach(), device="cpu", memory_format=torch.preserve_format)
    return made.pin_memory() if tensor.is_cuda else made
