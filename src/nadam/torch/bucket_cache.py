"""What a step is made of: the parameters that have a gradient, kept from step to step while all is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.step import Bucket
from nadam.kernels.cpu.pointers import Held, Pointers
from nadam.torch.buckets import Groups, ParamBucket, StateOptions, buckets, entry, held_dicts, is_owed, name_of
from nadam.torch.memory import Methods, check_apart, watch
from nadam.torch.settings import Settings
from nadam.torch.sharding import is_sharded, local, local_gradient

_grad = attrgetter("grad")


class BucketCache:
    """The parts of the steps of one optimizer."""

    def __init__(self, settings: Settings, options: StateOptions, accumulation_steps: int | None, name: str) -> None:
        self._settings, self._options, self._name = settings, options, name
        self._accumulation_steps = accumulation_steps
        self.sharded = False  # whether a parameter is split over processes
        self.forget()

    def forget(self) -> None:
        """Look everything up anew at the next step."""
        self._buckets: list[ParamBucket] = []
        self._params: list[Tensor] = []
        self._absent: list[Tensor] = []
        self._shares: list[tuple[Tensor, Tensor]] = []  # of what is split, with this process's
        self._watch: Pointers | Methods | None = None
        self._source: tuple[Any, list[Any]] = (None, [])
        self.release()

    def release(self) -> None:
        """After a step: hold its gradients no longer."""
        self._grads: Any = None
        for bucket in self._buckets:
            bucket.held = None

    def now(self, groups: Groups, state: Any, position: int) -> tuple[list[Bucket], list[Tensor]]:
        """All parameters that have a gradient, with their settings and counters."""
        current = [self._settings.now(index, group) for index, group in enumerate(groups)]
        updating = self._accumulation_steps is not None and position == self._accumulation_steps - 1
        if not self._fits(groups, state, position, updating):
            self.forget()
            self._form(groups, current, state, position, updating)
        return [Bucket(*current[bucket.index], bucket.counters, bucket.plan) for bucket in self._buckets], self._params

    def _fits(self, groups: Groups, state: Any, position: int, updating: bool) -> bool:
        """Whether all is as when the buckets were formed; if so, the gradients of now are in their tables."""
        known, sources = self._source
        if self._watch is None or state is not known or len(groups) != len(sources):
            return False
        if not all(group["params"] is source for group, source in zip(groups, sources, strict=True)):
            return False
        for param in self._absent:
            if param.grad is not None or (updating and is_owed(state.get(param))):
                return False
        grads = list(map(_grad, self._params))
        if self._shares:
            if any(grad is None for grad in grads) or not all(local(tensor) is share for tensor, share in self._shares):
                return False
            grads = list(map(local_gradient, self._params, grads))
        self._grads = grads
        return self._watch.fits(grads, position)

    @torch.no_grad()
    def _form(
        self,
        groups: Groups,
        current: Sequence[tuple[Hyperparameters, Now]],
        state: Any,
        position: int,
        updating: bool,
    ) -> None:
        """Form buckets of the parameters with a gradient; at an update, also of those that had one in its window."""
        made: list[ParamBucket] = []
        absent = []
        for index, (group, (h, _)) in enumerate(zip(groups, current, strict=True)):
            chosen = {}
            for i, param in enumerate(group["params"]):
                if param.grad is None and not (updating and is_owed(state.get(param))):
                    absent.append(param)
                    continue
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(f"{self._name} does not support sparse gradients")
                chosen[name_of(groups, index, i)] = param
            states = [entry(state, param, h, self._options) for param in chosen.values()]
            made += buckets(index, chosen, states, h, position, self._options)
        params = [param for bucket in made for param in bucket.params]
        given = [_gradient(param) for param in params]
        done = 0
        for bucket in made:
            own, done = given[done : done + len(bucket.params)], done + len(bucket.params)
            bucket.prepare(own, self._name)
        names = [name for bucket in made for name in bucket.names]
        used = [grad for bucket in made for grad in bucket.held]
        written = [each for bucket in made for each in bucket.written()]
        arrays = check_apart(written, list(zip(names, used, strict=True)))
        self._buckets, self._params, self._absent, self._grads = made, params, absent, given
        self._source = state, [group["params"] for group in groups]
        self.sharded = any(map(is_sharded, params))
        kept = [*params, *(value for bucket in made for entry in bucket.states for value in entry.values())]
        self._shares = [(tensor, local(tensor)) for tensor in kept if is_sharded(tensor)]
        plans = [bucket.tensors for bucket in made if bucket.tensors is not None]
        if made and len(plans) == len(made) and all(map(is_, given, used)):
            held = Held(
                dicts=held_dicts(state, params),
                lists=self._source[1],
                counters=[bucket.counts() for bucket in made],
            )
            counters = [each for bucket in made for each in bucket.shown()]
            self._watch = watch(plans, arrays, counters, held)
        for plan in plans:
            plan.grads = ()


def _gradient(param: Tensor) -> Tensor:
    """The gradient of this process's share."""
    if param.grad is not None:
        return local_gradient(param, param.grad)
    share = local(param)
    return share.new_zeros(()).expand(share.shape)
