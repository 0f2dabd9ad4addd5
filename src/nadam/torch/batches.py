"""The parameters of one group in the kernels' tables, kept from step to step for as long as they fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nadam.core.clock import Clock
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.step import Part
from nadam.kernels.layouts import overlap
from nadam.kernels.plan import Plan
from nadam.kernels.rows import LARGE, SHIFT
from nadam.kernels.tensors import FORMATS, Slot, TensorPlan
from nadam.torch.arrays import ArraysPlan, Row
from nadam.torch.sharding import is_sharded, local, local_gradient

State = dict[str, Any]
# dtype of moments, average and accumulator, by the parameter's.
STATE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
PLACES = {"exp_avg": 1, "exp_avg_sq": 2, "ema": 3, "grad_accumulator": 4, "remainder": 5}
TRAINABLE = {*FORMATS, torch.complex64, torch.complex128}
_warned: set[str] = set()
_grad, _exp_avg, _is_there = attrgetter("grad"), itemgetter("exp_avg"), partial(is_not, None)


class Keeping(NamedTuple):
    """How state is kept."""

    remainder: bool  # beside bfloat16 parameters
    exp_avg_dtype: torch.dtype | None  # bfloat16 to keep it rounded by chance, else as wide as is computed in
    seed: int

    def dtype(self, name: str, param: Tensor) -> torch.dtype:
        """Of a part of a parameter's state."""
        wide = STATE_DTYPES.get(param.dtype, param.dtype)
        if name == "remainder":
            return torch.int16
        rounded = name == "exp_avg" and self.exp_avg_dtype is not None and wide == torch.float32
        return torch.bfloat16 if rounded else wide


class Cohort:
    """Parameters of a group that have been updated equally often: one clock and one plan.

    Args:
        params: Parameters.
        states: What the optimizer keeps of each; step and momentum product become views of the clock.
        h: Settings of their group.
        position: Calls since the last update, with accumulation.
        keeping: How their state is kept.
    """

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[State], h: Hyperparameters, position: int, keeping: Keeping
    ) -> None:
        self.params, self.states, self._keeping = params, states, keeping
        self.clock = Clock(len(params), steps=True)
        first = states[0]
        steps = h.gradient_accumulation_steps or 1
        self.clock.start(int(first["step"]), float(first["mu_product"]), position, steps)
        for state, step, product in zip(states, *map(torch.from_numpy, self.clock.steps), strict=True):
            state["step"], state["mu_product"] = step, product
        self._moments = [state["exp_avg"] for state in states]
        self._complex = [(param, param.data_ptr()) for param in params if param.is_complex()]
        self.sharded = any(map(is_sharded, params))
        self._shares: list[Tensor] = []
        self._plan: TensorPlan | None = None
        self.held: Any = None  # gradients that a plan made in this step points to; they may be copies
        self._members = np.arange(len(params), dtype=np.int64)

    def planned(self, grads: Sequence[Tensor], name: str) -> Any:
        """The plan for these gradients.

        Raises:
            RuntimeError: A sparse gradient.
            ValueError: Memory that overlaps, a parameter whose shape has changed.
        """
        if self.sharded:
            grads = [local_gradient(param, grad) for param, grad in zip(self.params, grads, strict=True)]
        known = self.fitting(grads)
        if known is not None:
            return known
        self.held = grads = [usable(grad, name) for grad in grads]
        for param, state in zip(self.params, self.states, strict=True):
            settle(param, state, self._keeping)
        self._moments = [state["exp_avg"] for state in self.states]
        self._complex = [(param, param.data_ptr()) for param in self.params if param.is_complex()]
        self._shares = [local(param) for param in self.params]
        params = [real(share) for share in self._shares]
        states = [{key: real(local(value)) for key, value in state.items()} for state in self.states]
        if not has_kernel(params):
            for i, param in enumerate(params):
                if overlap(param.shape, [stride * param.itemsize for stride in param.stride()], param.itemsize):
                    raise ValueError(f"params[{i}]: its elements share memory, as in one that was expanded")
            warn_once(params[0].device.type)
            self._plan = None
            rows = [Row(*row) for row in zip(params, grads, states, strict=True)]
            return ArraysPlan(rows, self._members, self._keeping.seed)
        slots = []
        for i, (param, state) in enumerate(zip(params, states, strict=True)):
            fields = [state.get(key) for key in ("exp_avg", "exp_avg_sq", "ema", "grad_accumulator")]
            slots.append(Slot._make([f"params[{i}]", param, *fields, True, True, state.get("remainder")]))
        self._plan = TensorPlan(slots, grads, self._members, self._keeping.seed)
        return self._plan.plan

    def fitting(self, grads: Sequence[Tensor]) -> Plan | None:
        """The last plan, if it is one for these gradients, those of this process's shares."""
        known = self._plan
        return known.plan if known is not None and self._is_current() and known.fits(grads) else None

    def _is_current(self) -> bool:
        """Whether nobody has put other tensors in the place of the state, or of complex parameters, which are views."""
        if not all(map(is_, map(_exp_avg, self.states), self._moments)):
            return False
        if self._complex and any(param.data_ptr() != address for param, address in self._complex):
            return False
        return not self.sharded or all(map(is_, map(local, self.params), self._shares))


class Batch:
    """The parameters of a group that had a gradient in the last call, and those that had none."""

    def __init__(self, source: list[Tensor], params: list[Tensor], cohorts: list[Cohort]) -> None:
        self.source, self.params, self.cohorts = source, params, cohorts
        self.count = len(source)
        self.sharded = any(cohort.sharded for cohort in cohorts)
        present = {id(param): i for i, param in enumerate(params)}
        self.absent = [param for param in source if id(param) not in present]
        self.places = [[present[id(param)] for param in cohort.params] for cohort in cohorts]

    def parts(self, source: list[Tensor], h: Hyperparameters, now: Now) -> list[Part] | None:
        """The parts of the last call, if the same parameters have a gradient as then, and all lies as it did."""
        grads = None if self.sharded else self._grads(source)
        if grads is None:
            return None
        parts = []
        for cohort, places in zip(self.cohorts, self.places, strict=True):
            plan = cohort.fitting(grads if len(self.cohorts) == 1 else [grads[i] for i in places])
            if plan is None:
                return None
            parts.append(Part(h, now, cohort.clock, plan))
        return parts

    def grads(self, source: list[Tensor]) -> list[Tensor] | None:
        """The gradients, if the same parameters have one as before."""
        grads = self._grads(source)
        return grads if grads is not None and all(map(_is_there, grads)) else None

    def _grads(self, source: list[Tensor]) -> list[Tensor] | None:
        """The same, with None among them where one is gone."""
        if source is not self.source or len(source) != self.count:
            return None
        if self.absent and any(param.grad is not None for param in self.absent):
            return None
        return list(map(_grad, self.params))

    def knows(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the optimizer's state is still what this was made for."""
        return all(state.get(cohort.params[0]) is cohort.states[0] for cohort in self.cohorts)


def cohorts(
    params: Sequence[Tensor], states: Sequence[State], h: Hyperparameters, position: int, keeping: Keeping
) -> list[Cohort]:
    """Parameters by how often they have been updated, and on which device."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        key = (float(state["step"]), float(state["mu_product"]), param.device)
        alike.setdefault(key, []).append(i)
    return [
        Cohort([params[i] for i in members], [states[i] for i in members], h, position, keeping)
        for members in alike.values()
    ]


def new_state(param: Tensor, h: Hyperparameters, keeping: Keeping) -> State:
    """What the optimizer keeps of a parameter, before its first step."""
    state: State = {
        "step": torch.zeros((), dtype=torch.float64, device="cpu"),
        "mu_product": torch.ones((), dtype=torch.float64, device="cpu"),
    }
    for name in ("exp_avg", "exp_avg_sq", *extra_state(param, h, keeping)):
        state[name] = zeros_beside(param, PLACES[name], keeping.dtype(name, param))
    if h.use_ema:
        state["ema"].copy_(param.detach())
    return state


def extra_state(param: Tensor, h: Hyperparameters, keeping: Keeping) -> list[str]:
    """What else than PyTorch's own NAdam there is to keep of a parameter."""
    wanted = {
        "ema": h.use_ema,
        "grad_accumulator": h.gradient_accumulation_steps is not None,
        "remainder": keeping.remainder and param.dtype == torch.bfloat16,
    }
    return [name for name, there in wanted.items() if there]


def settle(param: Tensor, state: State, keeping: Keeping) -> None:
    """Bring state that somebody else has put there into the dtype and order in memory that the kernels take.

    Raises:
        ValueError: The parameter has another shape now.
    """
    if is_sharded(param):
        state.update({name: state[name].to(keeping.dtype(name, param)) for name in PLACES if name in state})
        return
    strides = torch.empty_like(param.detach(), memory_format=torch.preserve_format, device="meta").stride()
    for name, place in PLACES.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but its parameter has {tuple(param.shape)}")
        wanted = keeping.dtype(name, param)
        if tensor.dtype != wanted or tensor.device != param.device or tensor.stride() != strides:
            state[name] = zeros_beside(param, place, wanted).copy_(tensor)


def zeros_beside(param: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """Zeros for a parameter's state, dense and in its order of dimensions.

    Large ones are shifted by ``place`` SHIFTs, so that they do not lie in step with the parameter.
    """
    plain = torch.zeros_like(param.detach(), dtype=dtype, memory_format=torch.preserve_format)
    if plain.nbytes < LARGE or not plain.is_cpu or type(plain) is not Tensor:
        return plain
    offset = place * SHIFT // plain.itemsize
    memory = torch.zeros(plain.numel() + offset, dtype=dtype, device="cpu")
    return memory.as_strided(plain.size(), plain.stride(), offset)


def has_kernel(params: Sequence[Tensor]) -> bool:
    """Whether there is a kernel where these parameters lie."""
    return all(param.is_cpu for param in params)


def usable(grad: Tensor, name: str) -> Tensor:
    """A gradient as the plans take it: itself wherever it can be."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} does not support sparse gradients")
    grad = real(grad.detach()).resolve_neg()
    return grad if grad.dtype in FORMATS else grad.to(torch.float32)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as one of reals, with one more dimension; any other as it is."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor


def warn_once(device: str) -> None:
    """That there is no kernel for a device."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"nadam: no kernel for {device!r}: the step is made of PyTorch's foreach operations there", stacklevel=5
        )
