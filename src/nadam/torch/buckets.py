"""Parameters that are updated together, and the state that is kept of each.

Parameters that have been updated equally often have the same scalars, so one plan moves all of them in one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nadam.core.compressed import SCALES, check_state_options, is_compressed, num_scales
from nadam.core.gradient import Check, largest_passing
from nadam.core.hyperparameters import Hyperparameters
from nadam.kernels.strides import LARGE, SHIFT
from nadam.torch.compressed import convert
from nadam.torch.memory import FORMATS
from nadam.torch.sharding import is_sharded, local, local_gradient

State = dict[str, Any]
Groups = Sequence[dict[str, Any]]
# dtype of moments, average and accumulator, by the parameter's, where it is another.
STATE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
PLACES = {"exp_avg": 1, "exp_avg_sq": 2, "ema": 3, "grad_accumulator": 4, "remainder": 5}
PLACES |= dict.fromkeys(SCALES.values(), 0)
# In the order of `Counters.own`: with accumulation, whether there is a gradient in this window; updates; momentum
# product.
COUNTERS = ("accumulated", "step", "mu_product")
_STATE = (*PLACES, *COUNTERS)
TRAINABLE = {*FORMATS, torch.complex64, torch.complex128}
_warned: set[str] = set()


class StateOptions(NamedTuple):
    """How state is kept."""

    remainder: bool | int  # bits beside bfloat16 parameters, 8 or 16, which is also True
    exp_avg_dtype: torch.dtype | None  # bfloat16 to keep it so, stochastically rounded, else as wide as is computed in
    seed: int
    state_bits: int | None = None  # 8 for moments of 8 bits, stochastically rounded
    state_device: str | None = None  # "cpu" to keep all there, whatever device the parameters are on

    def checked(self) -> StateOptions:
        """These, if they are in their ranges."""
        dtype = self.exp_avg_dtype
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"exp_avg_dtype={dtype}: expected torch.bfloat16 or None")
        if self.remainder not in (False, True, 8, 16):
            raise ValueError(f"remainder={self.remainder!r}: expected 8, 16, True for 16 or False")
        check_state_options(self.state_bits, self.seed)
        if self.state_device not in (None, "cpu"):
            raise ValueError(f"state_device={self.state_device!r}: expected 'cpu' or None")
        if dtype is not None and self.state_bits is not None:
            raise ValueError(f"exp_avg_dtype={dtype}: expected None with state_bits={self.state_bits}")
        return self

    @property
    def remainder_dtype(self) -> torch.dtype:
        """The dtype of the remainders."""
        return torch.int8 if self.remainder == 8 else torch.int16

    @property
    def needs_kernel(self) -> str | None:
        """What of these only the kernels can do; None where PyTorch's own operations do as well."""
        if self.state_bits is not None:
            return f"state_bits={self.state_bits}"
        if self.state_device is not None:
            return f"state_device={self.state_device!r}"
        return "remainder=8" if self.remainder == 8 else None

    def compresses(self, param: Tensor) -> bool:
        """Whether a parameter's moments are kept in 8 bits."""
        wide = STATE_DTYPES.get(param.dtype, param.dtype)
        return self.state_bits == 8 and is_compressed(param.numel(), str(wide)[6:])

    def dtype(self, name: str, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's state of this name."""
        wide = STATE_DTYPES.get(param.dtype, param.dtype)
        if name == "remainder":
            return self.remainder_dtype
        if name in SCALES and self.compresses(param):
            return torch.int8 if name == "exp_avg" else torch.uint8
        rounded = name == "exp_avg" and self.exp_avg_dtype is not None and wide == torch.float32
        return torch.bfloat16 if rounded else wide


class ParamBucket:
    """Parameters of a group, on one device, that have been updated equally often.

    Attributes:
        shares: This process's shares of them; ``kept`` those of their state.
        given: Gradients of these shares.
        grads: The same as the plan takes them, until the step is done; some may be copies.
        plan: The passes over them.
        counters: Their step counters, on the CPU; on a GPU the plan has them.
        version: PyTorch's count of writes to the counters on a GPU, as the plan was made.
    """

    plan: Any
    counters: Any
    version: int
    tensors: Any = None  # on the CPU, where there is a kernel, the plan with its tensors

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        params: Sequence[Tensor],
        states: Sequence[State],
        given: Sequence[Any],
        grads: Sequence[Any],
    ) -> None:
        self.index, self.names, self.params, self.states = index, names, params, states
        self.given, self.grads = given, grads
        self.shares = list(map(local, params))
        self.kept = [{name: local(state[name]) for name in _STATE if name in state} for state in states]

    def written(self) -> list[tuple[str, Tensor]]:
        """What a step writes to, with the parameters' names."""
        rows = zip(self.names, self.shares, self.kept, strict=True)
        named = [(name, (param, *map(state.get, PLACES))) for name, param, state in rows]
        return [(name, tensor) for name, tensors in named for tensor in tensors if tensor is not None]


def check_trainable(params: Sequence[Tensor], options: StateOptions) -> None:
    """That parameters are of numbers that can be trained, and their state can be kept as is asked for."""
    for i, param in enumerate(params):
        whole = {"state_bits": options.state_bits, "state_device": options.state_device}
        asked = [f"{name}={value!r}" for name, value in whole.items() if value is not None]
        if asked and is_sharded(param):
            raise TypeError(f"params[{i}]: a DTensor, expected whole parameters with {asked[0]}")
        if param.dtype not in TRAINABLE:
            raise TypeError(
                f"params[{i}]: dtype {param.dtype}, expected float16, bfloat16, float32, float64 or complex"
            )


def name_of(groups: Groups, index: int, place: int) -> str:
    """What messages and reports call a parameter: its name, where the optimizer was given named parameters."""
    named = groups[index].get("param_names")
    if named is not None:
        return str(named[place])
    return f"params[{place}]" if len(groups) == 1 else f"param_groups[{index}]['params'][{place}]"


def nonfinite(groups: Groups, inv_scale: float, check: Check) -> str | None:
    """The name of the first parameter whose gradient, in this process, does not pass a check."""
    for index, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            largest = largest_passing(str(STATE_DTYPES.get(param.dtype, param.dtype).to_real())[6:], check)
            magnitudes = local_gradient(param, param.grad).abs().double() * inv_scale
            if not bool((magnitudes <= largest).all()):
                return name_of(groups, index, place)
    return None


def entry(state: Any, param: Tensor, h: Hyperparameters, options: StateOptions) -> dict[str, Any]:
    """A parameter's state, with what is missing of it made anew."""
    found: dict[str, Any] = state.setdefault(param, {})
    if not found or any(name not in found for name in extra_state(param, h, options)):
        found.update({**new_state(param, h, options), **found})
    elif h.gradient_accumulation_steps is not None and "accumulated" not in found:  # of an older checkpoint
        seen = bool(local(found["grad_accumulator"]).any())
        found["accumulated"] = torch.tensor(float(seen), dtype=torch.float64, device="cpu")
    return found


def held_dicts(state: dict[Any, Any], params: Sequence[Tensor]) -> list[tuple[dict[Any, Any], list[Any]]]:
    """Which entries of the optimizer's state are to stay the same objects, as `pointers.Held` takes it."""
    wanted = set(map(id, params))
    entries = [key for key in state if id(key) in wanted]
    own = ((state[param], [name for name in state[param] if name in _STATE]) for param in entries)
    return [(state, entries), *own]


def is_owed(entry: Mapping[str, Any] | None) -> bool:
    """Whether a parameter without a gradient had one earlier in this window: it counts as zero now."""
    return bool(entry) and float(entry.get("accumulated", 0.0)) > 0.0  # type: ignore[union-attr]


def new_state(param: Tensor, h: Hyperparameters, options: StateOptions) -> State:
    """A parameter's state before its first step."""
    state: State = {
        "step": torch.zeros((), dtype=torch.float64, device="cpu"),
        "mu_product": torch.ones((), dtype=torch.float64, device="cpu"),
    }
    if h.gradient_accumulation_steps is not None:
        state["accumulated"] = torch.zeros((), dtype=torch.float64, device="cpu")
    for name in ("exp_avg", "exp_avg_sq", *extra_state(param, h, options)):
        if name in SCALES.values():
            state[name] = torch.zeros(num_scales(param.numel()), dtype=torch.uint8, device=param.device)
        else:
            state[name] = zeros_beside(param, PLACES[name], options.dtype(name, param))
    if h.use_ema:
        state["ema"].copy_(param.detach())
    return state


def extra_state(param: Tensor, h: Hyperparameters, options: StateOptions) -> list[str]:
    """The names of a parameter's state that PyTorch's own NAdam does not have."""
    wanted = {
        "ema": h.use_ema,
        "grad_accumulator": h.gradient_accumulation_steps is not None,
        "remainder": options.remainder and param.dtype == torch.bfloat16,
        **dict.fromkeys(SCALES.values(), options.compresses(param)),
    }
    return [name for name, there in wanted.items() if there]


def cast_state(param: Tensor, state: State, options: StateOptions) -> None:
    """Copy state that was loaded or set by the user to the dtype and order in memory that kernels take."""
    if is_sharded(param):
        state.update({name: state[name].to(options.dtype(name, param)) for name in PLACES if name in state})
        return
    convert(state, options.compresses(param), options.remainder_dtype)
    strides = torch.empty_like(param.detach(), memory_format=torch.preserve_format, device="meta").stride()
    for name, place in PLACES.items():
        tensor = state.get(name)
        if name in SCALES.values():
            if tensor is not None:
                _check_scales(name, tensor, param)
            continue
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but its parameter has {tuple(param.shape)}")
        wanted = options.dtype(name, param)
        fits = tensor.dtype == wanted and tensor.device == param.device and tensor.stride() == strides
        if not fits or tensor.is_neg() or tensor.is_conj():
            state[name] = zeros_beside(param, place, wanted).copy_(tensor)


def _check_scales(name: str, tensor: Tensor, param: Tensor) -> None:
    """That scales which somebody has set are as many bytes as the kernels read."""
    wanted = torch.uint8, (num_scales(param.numel()),), param.device, True
    if (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous()) != wanted:
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: {found}, expected contiguous torch.uint8 of shape {wanted[1]} on {param.device}")


def zeros_beside(param: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """Zeros in a parameter's order of dimensions; large ones are shifted in memory against it, by ``place`` SHIFTs."""
    plain = param.detach()
    if plain.numel() * dtype.itemsize < LARGE or not plain.is_cpu or type(plain) is not Tensor:
        return torch.zeros_like(plain, dtype=dtype, memory_format=torch.preserve_format)
    # On the meta device, since memory that is freed again may leave a hole as large as all of the state.
    like = torch.empty_like(plain, dtype=dtype, device="meta", memory_format=torch.preserve_format)
    offset = place * SHIFT // like.itemsize
    memory = torch.zeros(like.numel() + offset, dtype=dtype, device="cpu")
    return memory.as_strided(like.size(), like.stride(), offset)


def usable(grad: Tensor, name: str) -> Tensor:
    """A gradient as plans take it: itself wherever it can be, else a copy."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} does not support sparse gradients")
    if grad.is_neg() or grad.is_conj():
        grad = grad.detach().resolve_neg().resolve_conj()
    return grad if grad.dtype in TRAINABLE else grad.to(torch.float32)


def has_kernel(params: Sequence[Tensor]) -> bool:
    """Whether there is a kernel where these parameters lie."""
    return all(param.is_cpu for param in params)


def warn_once(device: str) -> None:
    """Warn that there is no kernel for a device."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"nadam: no kernel for {device!r}: the step is made of PyTorch's foreach operations there", stacklevel=5
        )
