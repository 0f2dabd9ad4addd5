"""State of PyTorch's Nadam and Adam optimizers in the form that moves between hosts, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.compressed import SCALES
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.portable import ParamState, PortableState
from nadam.core.portable_settings import hyperparameters_of, settings_of
from nadam.torch import settings
from nadam.torch.buckets import extra_state
from nadam.torch.checkpoints import POSITION, SKIPPED
from nadam.torch.compressed import in_c_order, memory_order
from nadam.torch.fallback import joined, store
from nadam.torch.optimizer import NAdam
from nadam.torch.sharding import is_sharded

Groups = Sequence[Mapping[str, Any]]
Names = Sequence[Sequence[str]]  # of the parameters, group by group
# Classes, by name, and the settings that theirs are in the words of ours; what a group says of them comes first.
KNOWN: dict[str, dict[str, Any]] = {
    "NAdam": {},
    "Adam": {"momentum_decay": inf},
    "AdamW": {"momentum_decay": inf, "decoupled_weight_decay": True},
    "NAdamW": {"momentum_decay": inf, "decoupled_weight_decay": True, "bias_correction": "adam"},
}
ADAMS = ("Adam", "AdamW")
SLOTS = {name: name for name in ("exp_avg", "exp_avg_sq", "ema", "remainder", *SCALES.values())}
SLOTS |= {"accumulator": "grad_accumulator"}
PRODUCT = "mu_product"
# Whose state there is no place for.
REFUSED = ("max_exp_avg_sq", "momentum_buffer", "max_exp_avg")


def export(optimizer: torch.optim.Optimizer, params: Any = None) -> PortableState:
    """The state of an optimizer of PyTorch: NAdam or NAdamW of this package, or Adam, AdamW, NAdam, timm's NAdamW.

    Raises:
        TypeError: Another optimizer, or parameters that are split over processes.
        ValueError: Two parameters of one name.
    """
    kind = _kind(optimizer)
    named = _named(params)
    names = _names(optimizer.param_groups, named)
    flat = [
        (name, param)
        for group, own in zip(optimizer.param_groups, names, strict=True)
        for name, param in zip(own, group["params"], strict=True)
    ]
    for name, param in flat:
        if is_sharded(param):
            raise TypeError(f"{name}: it is split over processes; torch.distributed.checkpoint can save it")
    made = _from_state_dict(optimizer.state_dict(), kind, names, isinstance(optimizer, NAdam))
    values = None
    if params is not None:
        states = {id(param): optimizer.state.get(param) or {} for _, param in flat}
        values = {name: _value(tensor, states.get(id(tensor), {})) for name, tensor in named.items()}
    groups = [_settings(optimizer, kind, *each) for each in zip(optimizer.param_groups, names, strict=True)]
    cls = type(optimizer)
    return replace(made, optimizer=f"{cls.__module__}.{cls.__qualname__}", values=values, groups=groups)


def _from_state_dict(state_dict: Mapping[str, Any], kind: str, names: Names, ours: bool) -> PortableState:
    """A ``state_dict`` of such an optimizer, whose class has one of the names in ``KNOWN``, without settings.

    What it does not keep itself may be there all the same, out of a checkpoint of ours, and is no longer right.
    """
    groups = state_dict["param_groups"]
    found: dict[str, ParamState] = {}
    for group, own in zip(groups, names, strict=True):
        for key, name in zip(group["params"], own, strict=True):
            entry = state_dict["state"].get(key)
            if entry:
                found[name] = _param_state(name, entry, kind, ours)
    latest = max(found.values(), key=lambda each: each.step, default=None)
    return PortableState(
        optimizer=f"torch.optim.{kind}",
        step=0 if latest is None else latest.step,
        names=[name for own in names for name in own],
        params=found,
        momentum_product=None if latest is None else latest.momentum_product,
        position=int(groups[0].get(POSITION, 0)) if ours else 0,
        skipped_steps=int(groups[0].get(SKIPPED, 0)) if ours else 0,
    )


def _param_state(name: str, entry: Mapping[str, Any], kind: str, ours: bool) -> ParamState:
    refused = [each for each in REFUSED if each in entry]
    missing = [each for each in ("step", "exp_avg", "exp_avg_sq") if each not in entry]
    if missing or refused:
        raise ValueError(
            f"{name}: {f'no {missing[0]!r}' if missing else repr(refused[0])}: not the state of Nadam or Adam"
        )
    kept = SLOTS if ours else {slot: slot for slot in ("exp_avg", "exp_avg_sq")}
    entry = in_c_order(dict(entry)) if ours else entry
    arrays = {mine: _array(entry[theirs]) for mine, theirs in kept.items() if theirs in entry}
    product = float(entry[PRODUCT]) if PRODUCT in entry and (ours or kind == "NAdam") else None
    accumulated = ours and bool(entry.get("accumulated", False))
    return ParamState(int(entry["step"]), product, accumulated=accumulated, **arrays)


def restore(optimizer: torch.optim.Optimizer, state: PortableState, params: Any = None) -> tuple[Any, Any]:
    """Put a state into an optimizer, and values into a model; all of it or, if anything is wrong with it, nothing."""
    kind, named, ours = _kind(optimizer), _named(params), isinstance(optimizer, NAdam)
    names = _names(optimizer.param_groups, named)
    trained = {
        name: param
        for group, own in zip(optimizer.param_groups, names, strict=True)
        for name, param in zip(own, group["params"], strict=True)
    }
    shapes = {name: tuple(param.shape) for name, param in trained.items()}
    hyper = [_hyper(optimizer, kind, group) for group in optimizer.param_groups]
    values = None if params is None else {name: tuple(tensor.shape) for name, tensor in named.items()}
    state.check_fits(shapes, hyper[0], one_count=False, values=values)
    state.check_complex({name for name, each in {**named, **trained}.items() if each.is_complex()}, joint=False)
    for h, own in zip(hyper, names, strict=True):
        state.check_settings(h, own, adam=kind in ADAMS)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("amsgrad=True: expected False: there is no largest second moment in the state")
    if state.position and not ours:
        raise ValueError(f"position={state.position}: {kind} accumulates no gradients")
    state = _fitted(optimizer if ours else None, state, trained)
    # Settings of the whole optimizer say what else it keeps of a parameter, so those of one group do.
    extras = {name: extra_state(each, hyper[0], optimizer._options) for name, each in trained.items()} if ours else None
    optimizer.load_state_dict(_to_state_dict(state, kind, optimizer.param_groups, hyper, names, extras))
    if params is not None:
        with torch.no_grad():
            for name, tensor in named.items():
                value = torch.as_tensor(state.values[name].copy(), device=tensor.device)  # type: ignore[index]
                entry = optimizer.state.get(tensor, {}) if ours else {}
                store(tensor.detach(), entry, value.float() if "remainder" in entry else value)
    return optimizer, params


def _fitted(ours: NAdam | None, state: PortableState, trained: Mapping[str, Tensor]) -> PortableState:
    """A state with moments in the formats that one of our optimizers, or PyTorch's, has of these parameters."""
    halves = {name: param for name, param in trained.items() if param.dtype == torch.bfloat16}
    if ours is None:
        return state.fitted({}, dict.fromkeys(halves, 0))
    options = ours._options
    codes = {name: memory_order(param) for name, param in trained.items() if options.compresses(param)}
    return state.fitted(codes, dict.fromkeys(halves, 8 * options.remainder_dtype.itemsize if options.remainder else 0))


def from_state_dict(state_dict: Mapping[str, Any], kind: str = "NAdam") -> PortableState:
    """The state in a ``state_dict`` of an optimizer whose class has one of the names in ``KNOWN``, as a file has it.

    Raises:
        ValueError: It is of another optimizer.
    """
    groups = state_dict["param_groups"]
    names = [group.get("param_names") or list(map(str, group["params"])) for group in groups]
    made = _from_state_dict(state_dict, kind, names, kind not in ADAMS)
    each = zip(groups, names, strict=True)
    return replace(made, groups=[settings_of(_hyper_of(kind, g), own, adam=kind in ADAMS) for g, own in each])


def to_state_dict(state: PortableState) -> dict[str, Any]:
    """A ``state_dict`` for `torch.optim.NAdam`, with the settings of the state and the names of its parameters."""
    given = state.groups or [{"params": state.names}]
    hyper = [hyperparameters_of(group) for group in given]
    groups = [
        {
            "lr": h.lr,
            "betas": (h.beta1, h.beta2),
            "eps": h.eps,
            "weight_decay": h.weight_decay or 0.0,
            "momentum_decay": h.momentum_decay,
            "decoupled_weight_decay": not h.coupled_weight_decay,
            "maximize": h.maximize,
            **dict.fromkeys(("capturable", "differentiable"), False),
            "foreach": None,
            "param_names": group["params"],
        }
        for group, h in zip(given, hyper, strict=True)
    ]
    return _to_state_dict(state, "NAdam", groups, hyper, [group["params"] for group in given])


def _to_state_dict(
    state: PortableState,
    kind: str,
    groups: Groups,
    hyper: Sequence[Hyperparameters],
    names: Names,
    extras: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer with these groups; for ours, with what it keeps besides of each parameter."""
    entries: dict[int, dict[str, Any]] = {}
    saved, index = [], 0
    for group, h, own in zip(groups, hyper, names, strict=True):
        for place, name in enumerate(own):
            given = state.params.get(name)
            if given is not None:
                given = given if extras is not None else given.wide()
                entries[index + place] = _entry(state, given, h, kind, None if extras is None else extras[name])
        rate = state.learning_rate(own)
        shown = {key: value for key, value in group.items() if key != "params"}
        if rate is not None:
            shown["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        if extras is not None and h.gradient_accumulation_steps is not None:
            shown[POSITION] = state.position
        if extras is not None and h.skip_nonfinite:
            shown[SKIPPED] = state.skipped_steps
        saved.append({**shown, "params": list(range(index, index + len(own)))})
        index += len(own)
    return {"state": entries, "param_groups": saved}


def _entry(
    state: PortableState, given: ParamState, h: Hyperparameters, kind: str, extras: Sequence[str] | None
) -> dict[str, Any]:
    dtype = torch.float32 if extras is None else torch.float64
    made: dict[str, Any] = {"step": torch.tensor(given.step, dtype=dtype, device="cpu")}
    if extras is not None or kind == "NAdam":
        made[PRODUCT] = torch.tensor(state.product(h, given), dtype=dtype, device="cpu")
    kept = {"exp_avg", "exp_avg_sq", *(extras or ())}
    if SLOTS["accumulator"] in kept:
        made["accumulated"] = torch.tensor(float(given.accumulated), dtype=torch.float64, device="cpu")
    arrays = {SLOTS[name]: array for name, array in given.arrays().items()}
    return made | {name: torch.from_numpy(array.copy(order="K")) for name, array in arrays.items() if name in kept}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Which of the known classes an optimizer is of."""
    found = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in KNOWN), None)
    if found is None:
        raise TypeError(f"optimizer: {type(optimizer).__qualname__}, expected one of {', '.join(KNOWN)}")
    return found


def _hyper(optimizer: torch.optim.Optimizer, kind: str, group: Mapping[str, Any]) -> Hyperparameters:
    return settings.checked(group, optimizer._extras) if isinstance(optimizer, NAdam) else _hyper_of(kind, group)


def _hyper_of(kind: str, group: Mapping[str, Any]) -> Hyperparameters:
    """The settings that a group of one of PyTorch's own, or a saved one, has."""
    given = {"momentum_decay": 0.0, "maximize": False, "decoupled_weight_decay": False, **KNOWN[kind], **group}
    return settings.checked(given, {"bias_correction": KNOWN[kind].get("bias_correction", "nadam")})


def _settings(
    optimizer: torch.optim.Optimizer, kind: str, given: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    found = settings_of(_hyper(optimizer, kind, given), list(names), adam=kind in ADAMS)
    if isinstance(optimizer, NAdam):
        dtype = optimizer._options.exp_avg_dtype
        found |= {**optimizer._options._asdict(), "exp_avg_dtype": None if dtype is None else str(dtype)}
    return found


def _names(groups: Groups, named: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the parameters, group by group: the model's, else those that the optimizer has, else their numbers."""
    known: dict[int, str] = {}
    for name, tensor in named.items():
        known.setdefault(id(tensor), name)
    made, index = [], 0
    for group in groups:
        own = group.get("param_names")
        fallback = own or map(str, range(index, index + len(group["params"])))
        made.append([known.get(id(param), name) for param, name in zip(group["params"], fallback, strict=True)])
        index += len(group["params"])
    flat = [name for own in made for name in own]
    if len(set(flat)) < len(flat):
        raise ValueError(
            f"params: {sorted(name for name in set(flat) if flat.count(name) > 1)}: two parameters of one name"
        )
    return made


def _named(params: Any) -> dict[str, Tensor]:
    """Tensors by name: of a model all that its state_dict has, of a dict or of named parameters these."""
    if params is None:
        return {}
    if isinstance(params, torch.nn.Module):
        return {name: each for name, each in params.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    pairs = list(params.items() if isinstance(params, Mapping) else params)
    for pair in pairs:
        if not (isinstance(pair, tuple) and isinstance(pair[0], str) and isinstance(pair[-1], Tensor)):
            raise TypeError("params: expected a model, a dict of tensors by name or pairs of name and tensor")
    return dict(pairs)


def _array(tensor: Tensor) -> NDArray[Any]:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())


def _value(tensor: Tensor, entry: Mapping[str, Any]) -> NDArray[Any]:
    return _array(joined(tensor.detach(), dict(entry)) if "remainder" in entry else tensor)
