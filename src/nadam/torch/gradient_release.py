"""Gradient release: parameters move within the backward pass, bucket by bucket, and their gradients are freed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nadam.core.gradient import total_norm
from nadam.core.step import StepReport, step
from nadam.torch.bucket_cache import BucketCache
from nadam.torch.buckets import Groups, is_owed, name_of
from nadam.torch.memory import check_apart
from nadam.torch.optimizer import NAdam
from nadam.torch.settings import Settings
from nadam.torch.sharding import check_unwrapped, local

# A bucket is this part of all gradients, and at least so large: each costs some 0.1 ms besides its pass.
SHARE, SMALLEST_MB = 16, 4
LAGGED = "lagged_grad_norm"  # of a group, in checkpoints
SCALED = "it could unscale gradients only after they are released; train in bfloat16, or disable it"
REFUSED = {
    "skip_nonfinite": "a step is skipped as a whole, and parts of it are done before the last gradient is there",
    "differentiable": "autograd cannot go through a step within its own backward pass",
}


class Batch(BucketCache):
    """Parameters whose gradients arrive together, with their plan, kept from step to step."""

    def __init__(self, optimizer: NAdam, params: Sequence[Tensor], where: dict[int, tuple[int, int]]) -> None:
        settings = Settings(optimizer._extras, optimizer._of_all())
        steps = optimizer._extras["gradient_accumulation_steps"]
        super().__init__(settings, optimizer._options, steps, type(optimizer).__name__)
        self._where = where
        self._members: dict[int, tuple[list[Tensor], list[str]]] = {}  # by the numbers of the groups, with their names
        for param in params:
            index, place = where[id(param)]
            own, names = self._members.setdefault(index, ([], []))
            own.append(param)
            names.append(name_of(optimizer.param_groups, index, place))

    def groups(self, groups: Groups) -> Groups:
        """The groups with only these parameters."""
        members = self._members.items()
        return [{**groups[index], "params": params, "param_names": names} for index, (params, names) in members]

    def _plan(self, bucket: Any, *given: Any) -> None:
        super()._plan(bucket, *given)
        # Rounded as where there is no release and all parameters of the group have gradients.
        bucket.plan.streams = np.array([self._where[id(param)][1] for param in bucket.params], np.int64)


class Release:
    """What `release` gives: gradients are freed until `remove`, or the end of a ``with`` block."""

    def __init__(self, optimizer: NAdam, bucket_mb: float | None) -> None:
        self._optimizer, self._bucket_mb = optimizer, bucket_mb
        self._hooks: dict[int, Any] = {}  # of parameters, by their ids
        self._layout: list[list[int]] | None = None  # of the groups: these ids, 0 for what is not trained
        self._norm = self._taken_norm()  # of the update before
        self._seen: set[int] = set()
        self._reset()
        self._follow_groups()
        self._state_hooks = [
            optimizer.register_state_dict_pre_hook(self._check_whole),
            optimizer.register_state_dict_post_hook(self._save_norm),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        optimizer._released = self

    def remove(self) -> None:
        """Have `step` do all again; of no effect the second time.

        Raises:
            RuntimeError: A call between a backward pass and its `step`.
        """
        self._check_whole()
        for hook in (*self._hooks.values(), *self._state_hooks):
            hook.remove()
        self._hooks, self._state_hooks = {}, []
        if self._optimizer._released is self:
            self._optimizer._released = None

    def __enter__(self) -> Release:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:  # in the middle of a backward pass, maybe
            self._reset()
        self.remove()

    def _reset(self) -> None:
        """No gradient of a step has arrived."""
        self._seen.clear()  # ids of parameters whose gradients have
        self._pending: list[Tensor] = []  # those that are still to move
        self._bytes = 0  # of their gradients
        self._reports: list[StepReport] = []

    def _follow_groups(self) -> None:
        """Have a hook on every parameter that is trained, and on no other."""
        groups = self._optimizer.param_groups
        layout = [[id(param) if param.requires_grad else 0 for param in group["params"]] for group in groups]
        if layout == self._layout:
            return
        where = {id(p): (i, place) for i, group in enumerate(groups) for place, p in enumerate(group["params"])}
        trained = [param for group in groups for param in group["params"] if param.requires_grad]
        named = [(name_of(groups, *where[id(param)]), local(param)) for param in trained]
        for name, param in named:
            if not param.is_cpu:
                raise ValueError(f"release: {name} is on {param.device}: expected parameters on the CPU")
        check_apart(named, [])
        check_unwrapped(where)
        hooks = {id(p): self._hooks.pop(id(p), None) for p in trained}
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {id(p): hooks[id(p)] or p.register_post_accumulate_grad_hook(self._arrived) for p in trained}
        # Of whole parameters, not of this process's shares: all processes have to move the same ones together.
        self._sizes = {id(param): param.nbytes for param in trained}
        self._trained = trained  # or their ids might become those of others
        self._layout, self._where = layout, where
        self._batches: dict[tuple[int, ...], Batch] = {}
        share = max(sum(self._sizes.values()) / SHARE, SMALLEST_MB * 2**20)
        self._limit = share if self._bucket_mb is None else self._bucket_mb * 2**20

    def _begin(self) -> None:
        """Check all that can be checked before the first parameter of a step moves."""
        optimizer = self._optimizer
        if optimizer._swapped:
            raise RuntimeError("backward: called within swap_ema, and release would do a step")
        self._follow_groups()
        if not self._batches:  # the model may have been wrapped since, and the loss of this backward pass scaled
            check_unwrapped(self._where)
            _check_unscaled()
        for index, group in enumerate(optimizer.param_groups):
            optimizer._settings.now(index, group)
        self._position = optimizer._position

    def _arrived(self, param: Tensor) -> None:
        """A parameter has its gradient: autograd's hook."""
        if not self._seen:
            self._begin()
        key = id(param)
        size = self._sizes.get(key)
        if size is None:  # it has left the groups
            return
        if key in self._seen:
            name = name_of(self._optimizer.param_groups, *self._where[key])
            raise RuntimeError(
                f"{name}: a second gradient before step(), and the first may be released: call step() after each "
                "backward pass; gradient_accumulation_steps adds up several"
            )
        self._seen.add(key)
        self._pending.append(param)
        self._bytes += size
        if self._bytes >= self._limit:
            self._optimizer._exclusive.run("backward", self._flush)

    def _flush(self) -> None:
        pending, self._pending, self._bytes = self._pending, [], 0
        key = tuple(map(id, pending))
        if key not in self._batches:
            if len(self._batches) > len(self._hooks):  # gradients come in another order each time
                self._batches.clear()
            self._batches[key] = Batch(self._optimizer, pending, self._where)
        batch = self._batches[key]
        self._move(batch, batch.groups(self._optimizer.param_groups))

    def _move(self, cache: BucketCache, groups: Groups) -> None:
        """Do this step of some parameters, and free their gradients."""
        moving, params = cache.now(groups, self._optimizer.state, self._position)
        if not moving:
            return
        self._seen.update(map(id, params))
        lagged = self._norm or 0.0  # before the first update, nothing is clipped
        try:
            self._reports.append(step(moving, loss_scale=1.0, combine=cache.combine, lagged_norm=lagged))
        finally:
            increment_version(params)
            cache.release()
            for param in params:  # also after an interrupt, or `finish` would move what has moved
                param.grad = None

    def finish(self) -> None:
        """What `NAdam.step` does: move what is left, and end the step."""
        optimizer = self._optimizer
        if getattr(optimizer, "found_inf", None) is not None:
            self._reset()
            raise RuntimeError(
                f"release: a step of GradScaler, after parameters have moved by scaled gradients: {SCALED}"
            )
        if not self._seen:
            self._begin()
        if self._pending:
            self._flush()
        # Gradients that came by no hook; and those that are missing from the last call of a window.
        if any(map(self._is_left, (param for group in optimizer.param_groups for param in group["params"]))):
            self._move(optimizer._buckets, optimizer.param_groups)
        if self._reports:
            self._report()
            optimizer._position = (self._position + 1) % (optimizer._extras["gradient_accumulation_steps"] or 1)
        self._reset()

    def _is_left(self, param: Tensor) -> bool:
        """Whether a parameter takes part in this step, and has not moved."""
        if param.grad is not None:
            return True
        steps = self._optimizer._extras["gradient_accumulation_steps"]
        return steps is not None and self._position == steps - 1 and is_owed(self._optimizer.state.get(param))

    def _report(self) -> None:
        norms = [report.grad_norm for report in self._reports if report.grad_norm is not None]
        factors = [report.clip_factor for report in self._reports if report.clip_factor is not None]
        norm = total_norm(norms) if norms else None
        self._norm = self._norm if norm is None else norm
        groups, state = self._optimizer.param_groups, self._optimizer.state
        in_order = ((i, param) for i, group in enumerate(groups) for param in group["params"])
        index, first = next((i, p) for i, p in in_order if id(p) in self._seen and state.get(p))
        rate = self._optimizer._settings.now(index, groups[index])[1].lr
        count = int(state[first]["step"])
        self._optimizer._last_step = StepReport(count, rate, norm, min(factors, default=None), 0)

    def _check_whole(self, *_: Any) -> None:
        if self._seen:
            raise RuntimeError("called between a backward pass and step(): some parameters have moved, some have not")

    def _save_norm(self, _: Any, state_dict: dict[str, Any]) -> None:
        if self._norm is not None and self._optimizer._extras["global_clipnorm"] is not None:
            for group in state_dict["param_groups"]:
                group[LAGGED] = self._norm

    def _loaded(self, _: Any) -> None:
        self._norm = self._taken_norm()
        self._reset()

    def _taken_norm(self) -> float | None:
        """The norm of the update before, as the optimizer has it, or as it stands in a checkpoint that was loaded."""
        saved: list[float | None] = [group.pop(LAGGED, None) for group in self._optimizer.param_groups]
        last = self._optimizer.last_step.grad_norm
        return saved[0] if last is None else last


def _check_unscaled() -> None:
    """That no loss is scaled: gradients do not show it, so all objects are looked through, in some 40 ms."""
    scalers = (each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler))
    if any(each.is_enabled() and each._scale is not None for each in scalers):  # set by the first loss that is scaled
        raise RuntimeError(f"release: a GradScaler is at work: {SCALED}")


def release(optimizer: NAdam, *, bucket_mb: float | None = None, global_clipnorm_lag: int | None = None) -> Release:
    """Have each parameter updated within the backward pass, and its gradient freed there.

    So there is never more than a share of the gradients at a time. The numbers are those without release, bit for bit,
    in the same training loop: ``loss.backward()`` moves parameters, ``step()`` those that are left, and ends the step,
    for schedulers and the report. Every backward pass that reaches a parameter counts, and what stands between it and
    ``step()`` finds no gradients: clip by the optimizer's arguments.

    With ``gradient_accumulation_steps`` gradients are released into the state's accumulators. Of a backward pass that
    fails midway, by an error or an interrupt, some parameters have moved, as their ``state[param]["step"]`` tells:
    load a checkpoint, or end that step by ``step()``.

    Args:
        optimizer: A `NAdam` or `NAdamW` of parameters on the CPU, whole or of `fully_shard`.
        bucket_mb: Parameters move when their gradients have so many MiB, > 0; None for a sixteenth of all, at least 4.
        global_clipnorm_lag: 1 to clip by the norm of all gradients of the update before, as that of this one is known
            only when they are gone: for ``global_clipnorm``, and only with it. The first update is not clipped.

    Returns:
        A handle: ``remove()`` ends it, as does the end of a ``with`` block.

    Raises:
        TypeError: Another optimizer.
        ValueError: An argument out of its range, ``skip_nonfinite`` or ``differentiable``, parameters on a GPU, or a
            model in DistributedDataParallel. Nothing has changed.
        RuntimeError: The optimizer has a release already. In a backward pass: a second gradient before ``step()``; a
            GradScaler, in the first. In ``state_dict()``: between a backward pass and ``step()``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = NAdam(model.parameters(), clipnorm=1.0)
        >>> with release(optimizer, bucket_mb=1e-5):
        ...     model(torch.ones(4)).sum().backward()
        ...     model.weight.grad is None, optimizer.step()
        (True, None)
        >>> optimizer.last_step.step
        1
    """
    if not isinstance(optimizer, NAdam):
        raise TypeError(f"optimizer: {type(optimizer).__name__}, expected a nadam.torch.NAdam or NAdamW")
    if optimizer._released is not None:
        raise RuntimeError("release: this optimizer has one already")
    for name, reason in REFUSED.items():
        if optimizer._extras.get(name, optimizer.defaults.get(name)):
            raise ValueError(f"release: {name}=True: expected False: {reason}")
    if bucket_mb is not None and not (isinstance(bucket_mb, (int, float)) and 0 < bucket_mb < inf):
        raise ValueError(f"bucket_mb={bucket_mb!r}: expected 0 < bucket_mb < inf, or None")
    clips = optimizer._extras["global_clipnorm"] is not None
    if global_clipnorm_lag != (1 if clips else None):
        why = "1 with global_clipnorm: the norm is known when all gradients are gone" if clips else "None without it"
        raise ValueError(f"global_clipnorm_lag={global_clipnorm_lag!r}: expected {why}")
    return Release(optimizer, bucket_mb)
