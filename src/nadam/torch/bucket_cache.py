"""The buckets of an optimizer's steps, kept from step to step while all is as it was.

Grouping and looking everything up takes many times as long as a step of small tensors; one native look at all of it
tells whether it can be left out (kernels/cpu/pointers.py, with figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nadam.core.counters import Counters
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import Bucket
from nadam.kernels.cpu.pointers import Held, Pointers
from nadam.kernels.strides import overlap
from nadam.torch import buckets as parts
from nadam.torch.buckets import COUNTERS, PLACES, Groups, ParamBucket, StateOptions
from nadam.torch.fallback import FallbackPlan, Row
from nadam.torch.memory import Array, Methods, Slot, TensorPlan, check_apart, watch
from nadam.torch.settings import Settings
from nadam.torch.sharding import combiner, is_sharded, local, local_gradient

gradient_of = attrgetter("grad")


class BucketCache:
    """The buckets of one optimizer on the CPU; gpu/bucket_cache.py says what differs on GPUs.

    Attributes:
        buckets: Those of the last step.
        combine: What `core.step.step` gets norms of whole tensors by, where parameters are split over processes.
    """

    def __init__(self, settings: Settings, options: StateOptions, accumulation_steps: int | None, name: str) -> None:
        self._settings, self._options, self._name = settings, options, name
        self._accumulation_steps = accumulation_steps
        self._counter_names = COUNTERS[accumulation_steps is None :]
        self.forget()

    def forget(self) -> None:
        """Form the buckets anew at the next step."""
        self.buckets: list[ParamBucket] = []
        self._params: list[Tensor] = []
        self._absent: list[Tensor] = []  # parameters that are in no bucket
        self._shares: list[tuple[Tensor, Tensor]] = []  # of what is split over processes, with this one's
        self._watch: Pointers | Methods | None = None
        self._source: tuple[Any, list[Any]] = (None, [])
        self.combine: Any = None
        self.release()

    def release(self) -> None:
        """After a step: hold its gradients no longer."""
        self._grads: Any = None
        for bucket in self.buckets:
            bucket.given = bucket.grads = ()

    def now(self, groups: Groups, state: Any, position: int) -> tuple[list[Bucket], list[Tensor]]:
        """What `core.step.step` is to move, and all of its parameters."""
        current = [self._settings.now(index, group) for index, group in enumerate(groups)]
        updating = self._accumulation_steps is not None and position == self._accumulation_steps - 1
        if not self._fits(groups, state, position, updating):
            self.forget()
            self._form(groups, state, [h for h, _ in current], position, updating)
        return [Bucket(*current[bucket.index], bucket.counters, bucket.plan) for bucket in self.buckets], self._params

    def _fits(self, groups: Groups, state: Any, position: int, updating: bool) -> bool:
        """Whether all is as when the buckets were formed; if so, the gradients of now are in their tables."""
        if self._watch is None or not self._same_groups(groups, state, updating):
            return False
        grads = list(map(gradient_of, self._params))
        if self._shares:
            if any(grad is None for grad in grads) or not self._same_shares():
                return False
            grads = list(map(local_gradient, self._params, grads))
        self._grads = grads
        return self._watch.fits(grads, position)

    def _same_groups(self, groups: Groups, state: Any, updating: bool) -> bool:
        """Whether the groups have the same lists of parameters, and none of them has joined those in the buckets."""
        known, sources = self._source
        if state is not known or len(groups) != len(sources):
            return False
        for param in self._absent:
            if param.grad is not None or (updating and self._owes(state.get(param))):
                return False
        return all(group["params"] is source for group, source in zip(groups, sources, strict=True))

    def _same_shares(self) -> bool:
        return all(local(tensor) is share for tensor, share in self._shares)

    @staticmethod
    def _owes(entry: Any) -> bool:
        """Whether a parameter without a gradient takes part all the same, by its state."""
        return parts.is_owed(entry)

    def _present(self, groups: Groups, state: Any, updating: bool) -> list[tuple[int, str, Tensor]]:
        """The parameters that take part, with the numbers of their groups and their names."""
        return [
            (index, parts.name_of(groups, index, i), param)
            for index, group in enumerate(groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None or (updating and self._owes(state.get(param)))
        ]

    @torch.no_grad()
    def _form(
        self, groups: Groups, state: Any, settings: Sequence[Hyperparameters], position: int, updating: bool
    ) -> None:
        """Form buckets of the parameters with a gradient; at an update, also of those that had one in its window."""
        present = self._present(groups, state, updating)
        given = [self._gradient(param) for _, _, param in present]
        for (_, name, param), grad in zip(present, given, strict=True):
            if grad is not None and grad.is_complex() and not param.is_complex():  # `grad_dtype` lets it be one
                raise RuntimeError(f"grad of {name}: {grad.dtype}, expected real numbers for one of {param.dtype}")
        used = [None if grad is None else parts.usable(grad, self._name) for grad in given]
        alike: dict[tuple[Any, ...], list[Any]] = {}
        for (index, name, param), *grads in zip(present, given, used, strict=True):
            own = parts.entry(state, param, settings[index], self._options)
            parts.cast_state(param, own, self._options)
            key = index, float(own["step"]), float(own["mu_product"]), param.device
            alike.setdefault(key, []).append((name, param, own, *grads))
        buckets = [ParamBucket(key[0], *zip(*rows, strict=True)) for key, rows in alike.items()]
        written = [each for bucket in buckets for each in bucket.written()]
        named = [each for bucket in buckets for each in zip(bucket.names, bucket.grads, strict=True)]
        arrays = check_apart(written, [(name, grad) for name, grad in named if grad is not None])
        for bucket in buckets:
            self._plan(bucket, settings[bucket.index], position, arrays)
        self.buckets, self._source = buckets, (state, [group["params"] for group in groups])
        self._params = [param for bucket in buckets for param in bucket.params]
        chosen = set(map(id, self._params))
        self._absent = [param for source in self._source[1] for param in source if id(param) not in chosen]
        kept = [*self._params, *(value for bucket in buckets for own in bucket.states for value in own.values())]
        self._shares = [(tensor, local(tensor)) for tensor in kept if is_sharded(tensor)]
        counters = [own[name] for bucket in buckets for own in bucket.states for name in self._counter_names]
        self._prepare_watch(arrays, counters, Held(parts.held_dicts(state, self._params), self._source[1]))

    def _gradient(self, param: Tensor) -> Tensor | None:
        """The gradient of this process's share; zeros where there is none."""
        if param.grad is not None:
            return local_gradient(param, param.grad)
        share = local(param)
        return share.new_zeros(()).expand(share.shape)

    def _plan(self, bucket: ParamBucket, h: Hyperparameters, position: int, written: Sequence[Array]) -> None:
        """Make the bucket's plan and counters; its state shows the counters."""
        calls, first = self._accumulation_steps or 1, bucket.states[0]
        bucket.counters = Counters(len(bucket.params), shown=True)
        bucket.counters.start(int(first["step"]), float(first["mu_product"]), position, calls)
        for name, views in zip(COUNTERS, torch.from_numpy(bucket.counters.own), strict=True):
            if name in self._counter_names:
                _show(name, views, bucket.states)
        members = np.arange(len(bucket.params), dtype=np.int64)
        rows = list(zip(bucket.names, bucket.shares, bucket.kept, bucket.grads, strict=True))
        if parts.has_kernel(bucket.shares):
            slots = [Slot._make([name, param, *map(state.get, PLACES), True, True]) for name, param, state, _ in rows]
            tensors = TensorPlan(slots, bucket.grads, members, self._options.seed)
            bucket.plan, bucket.tensors = tensors.plan, tensors
            return
        for name, param, *_ in rows:
            if overlap(param.shape, [stride * param.itemsize for stride in param.stride()], param.itemsize):
                raise ValueError(f"{name}: its elements share memory, as in one that was expanded")
        device = bucket.shares[0].device.type
        if self._options.needs_kernel is not None:
            raise RuntimeError(f"{self._options.needs_kernel}: there is no kernel for parameters on {device!r}")
        parts.warn_once(device)
        bucket.plan = FallbackPlan([Row(*row) for _, *row in rows], members, self._options.seed)

    def _prepare_watch(self, written: Sequence[Array], counters: Sequence[Tensor], held: Held) -> None:
        """Have it looked at later steps whether all is as it is now."""
        self.combine = combiner(self._params)
        plans = [bucket.tensors for bucket in self.buckets if bucket.tensors is not None]
        direct = all(all(map(is_, bucket.given, bucket.grads)) for bucket in self.buckets)
        if plans and len(plans) == len(self.buckets) and direct:
            calls = self._accumulation_steps or 1
            counts = [(bucket.counters.current, len(bucket.params), calls) for bucket in self.buckets]
            self._watch = watch(plans, written, counters, held._replace(counters=counts))
        for plan in plans:
            plan.grads = ()


def _show(name: str, views: Tensor, states: Sequence[dict[str, Any]]) -> None:
    """Let each state's counter of this name lie where the kernel counts.

    Whoever holds the old tensor sees it change, as with PyTorch's own, but for one of several parameters.
    """
    taken: set[int] = set()
    for state, view in zip(states, views, strict=True):
        kept = state[name]
        if name == "accumulated":
            view.fill_(float(kept))
        if type(kept) is Tensor and kept.dtype == view.dtype and kept.is_cpu and id(kept) not in taken:
            kept.data = view
        else:
            state[name] = view
        taken.add(id(kept))
