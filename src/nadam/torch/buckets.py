"""Parameters that have been updated equally often, their state, and the kernels' tables of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.counters import Counters
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.strides import LARGE, SHIFT, overlap
from nadam.torch.fallback import FallbackPlan, Row
from nadam.torch.memory import FORMATS, Slot, TensorPlan, real
from nadam.torch.sharding import is_sharded, local

State = dict[str, Any]
Groups = Sequence[dict[str, Any]]
# dtype of moments, average and accumulator, by the parameter's.
STATE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
PLACES = {"exp_avg": 1, "exp_avg_sq": 2, "ema": 3, "grad_accumulator": 4, "remainder": 5}
# In the order of `Counters.own`: with accumulation, whether there is a gradient in this window; updates; momentum
# product.
COUNTERS = ("accumulated", "step", "mu_product")
_STATE = {*PLACES, *COUNTERS}
TRAINABLE = {*FORMATS, torch.complex64, torch.complex128}
_warned: set[str] = set()


class StateOptions(NamedTuple):
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


class ParamBucket:
    """Parameters of a group that have been updated equally often: one clock and one plan.

    Attributes:
        counters: Theirs.
        plan: The passes over them.
        tensors: The same with its tensors; None where PyTorch's own operations make the step.
        held: Gradients that the plan points to, until the step is done; they may be copies.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        params: Sequence[Tensor],
        states: Sequence[State],
        h: Hyperparameters,
        position: int,
        options: StateOptions,
    ) -> None:
        self.index, self.names, self.params, self.states, self._options = index, names, params, states, options
        self.counters = Counters(len(params), shown=True)
        self._calls = h.gradient_accumulation_steps or 1
        self.counters.start(int(states[0]["step"]), float(states[0]["mu_product"]), position, self._calls)
        own = zip(COUNTERS, torch.from_numpy(self.counters.own), strict=True)
        accumulates = h.gradient_accumulation_steps is not None
        self._shown = {name: list(views) for name, views in own if accumulates or name != "accumulated"}
        for name, views in self._shown.items():
            taken: set[int] = set()
            for state, view in zip(states, views, strict=True):
                kept = state[name]
                if name == "accumulated":
                    view.fill_(float(kept))
                # Whoever holds the tensor sees it change, as with PyTorch's own, but for one of several parameters.
                if type(kept) is Tensor and kept.dtype == view.dtype and kept.is_cpu and id(kept) not in taken:
                    kept.data = view
                else:
                    state[name] = view
                taken.add(id(kept))
        self.plan: Any = None
        self.tensors: TensorPlan | None = None
        self.held: Any = None

    def prepare(self, grads: Sequence[Tensor], name: str) -> None:
        """Make the plan for these gradients."""
        self.held = given = [usable(grad, name) for grad in grads]
        for param, state in zip(self.params, self.states, strict=True):
            cast_state(param, state, self._options)
        params = list(map(local, self.params))
        states = [{key: local(value) for key, value in state.items() if key in PLACES} for state in self.states]
        members = np.arange(len(params), dtype=np.int64)
        if has_kernel(params):
            slots = [
                Slot._make([where, param, *map(state.get, PLACES), True, True])
                for where, param, state in zip(self.names, params, states, strict=True)
            ]
            self.tensors = TensorPlan(slots, given, members, self._options.seed)
            self.plan = self.tensors.plan
            return
        for where, param in zip(self.names, params, strict=True):
            if overlap(param.shape, [stride * param.itemsize for stride in param.stride()], param.itemsize):
                raise ValueError(f"{where}: its elements share memory, as in one that was expanded")
        warn_once(params[0].device.type)
        rows = [
            Row(real(param), real(grad), {key: real(value) for key, value in state.items()})
            for param, grad, state in zip(params, given, states, strict=True)
        ]
        self.plan = FallbackPlan(rows, members, self._options.seed)

    def written(self) -> list[tuple[str, Tensor]]:
        """What a step writes to, with the parameters' names."""
        made = []
        for where, param, state in zip(self.names, self.params, self.states, strict=True):
            made += [(where, local(tensor)) for tensor in (param, *(state[name] for name in PLACES if name in state))]
        return made

    def shown(self) -> list[Tensor]:
        """The tensors that show the counters."""
        return [state[name] for name in self._shown for state in self.states]

    def counts(self) -> tuple[NDArray[np.float64], int, int]:
        """The counters, as `pointers.Held` takes them."""
        return self.counters.current, len(self.params), self._calls


def buckets(
    index: int,
    named: Mapping[str, Tensor],
    kept: Sequence[State],
    h: Hyperparameters,
    position: int,
    options: StateOptions,
) -> list[ParamBucket]:
    """Parameters of a group, by their names, sorted by how often they have been updated, and by device."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for (name, param), state in zip(named.items(), kept, strict=True):
        key = (float(state["step"]), float(state["mu_product"]), param.device)
        alike.setdefault(key, []).append((name, param, state))
    columns = [tuple(zip(*members, strict=True)) for members in alike.values()]
    return [ParamBucket(index, names, params, states, h, position, options) for names, params, states in columns]


def name_of(groups: Groups, index: int, place: int) -> str:
    """What messages call a parameter."""
    return f"params[{place}]" if len(groups) == 1 else f"param_groups[{index}]['params'][{place}]"


def entry(state: Any, param: Tensor, h: Hyperparameters, options: StateOptions) -> dict[str, Any]:
    """What the optimizer keeps of a parameter, made where it is not there or was cleared."""
    found: dict[str, Any] = state.setdefault(param, {})
    if not found:
        found.update(new_state(param, h, options))
    elif any(name not in found for name in extra_state(param, h, options)):
        found.update({**new_state(param, h, options), **found})
    elif h.gradient_accumulation_steps is not None and "accumulated" not in found:  # of an older checkpoint
        seen = bool(local(found["grad_accumulator"]).any())
        found["accumulated"] = torch.tensor(float(seen), dtype=torch.float64, device="cpu")
    return found


def held_dicts(state: dict[Any, Any], params: Sequence[Tensor]) -> list[tuple[dict[Any, Any], list[Any]]]:
    """The optimizer's state, as `pointers.Held` takes it."""
    wanted = set(map(id, params))
    entries = [key for key in state if id(key) in wanted]
    own = ((state[param], [name for name in state[param] if name in _STATE]) for param in entries)
    return [(state, entries), *own]


def is_owed(entry: Mapping[str, Any] | None) -> bool:
    """Whether a parameter without a gradient had one earlier in this window: it counts as zero now."""
    return bool(entry) and float(entry.get("accumulated", 0.0)) > 0.0  # type: ignore[union-attr]


def new_state(param: Tensor, h: Hyperparameters, options: StateOptions) -> State:
    """What the optimizer keeps of a parameter, before its first step."""
    state: State = {
        "step": torch.zeros((), dtype=torch.float64, device="cpu"),
        "mu_product": torch.ones((), dtype=torch.float64, device="cpu"),
    }
    if h.gradient_accumulation_steps is not None:
        state["accumulated"] = torch.zeros((), dtype=torch.float64, device="cpu")
    for name in ("exp_avg", "exp_avg_sq", *extra_state(param, h, options)):
        state[name] = zeros_beside(param, PLACES[name], options.dtype(name, param))
    if h.use_ema:
        state["ema"].copy_(param.detach())
    return state


def extra_state(param: Tensor, h: Hyperparameters, options: StateOptions) -> list[str]:
    """What else than PyTorch's own NAdam there is to keep of a parameter."""
    wanted = {
        "ema": h.use_ema,
        "grad_accumulator": h.gradient_accumulation_steps is not None,
        "remainder": options.remainder and param.dtype == torch.bfloat16,
    }
    return [name for name, there in wanted.items() if there]


def cast_state(param: Tensor, state: State, options: StateOptions) -> None:
    """Bring state that somebody else has put there into the dtype and order in memory that the kernels take."""
    if is_sharded(param):
        state.update({name: state[name].to(options.dtype(name, param)) for name in PLACES if name in state})
        return
    strides = torch.empty_like(param.detach(), memory_format=torch.preserve_format, device="meta").stride()
    for name, place in PLACES.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but its parameter has {tuple(param.shape)}")
        wanted = options.dtype(name, param)
        fits = tensor.dtype == wanted and tensor.device == param.device and tensor.stride() == strides
        if not fits or tensor.is_neg() or tensor.is_conj():
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
    if grad.is_neg() or grad.is_conj():
        grad = grad.detach().resolve_neg().resolve_conj()
    return grad if grad.dtype in TRAINABLE else grad.to(torch.float32)


def warn_once(device: str) -> None:
    """That there is no kernel for a device."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"nadam: no kernel for {device!r}: the step is made of PyTorch's foreach operations there", stacklevel=5
        )
