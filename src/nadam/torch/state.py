"""Checkpoints: what is refused, what is kept as it is, and those of Adam."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nadam.core.compressed import SCALES, num_scales
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.portable_checks import LARGEST_SCALES, some
from nadam.core.portable_formats import warn_of_rounding
from nadam.core.scalars import momentum_product
from nadam.torch.buckets import STATE_DTYPES, Groups, StateOptions, extra_state, name_of, new_state
from nadam.torch.compressed import convert, fits_order, wide
from nadam.torch.mistakes import check_owner
from nadam.torch.sharding import is_sharded, local

# What a checkpoint of torch.optim.NAdam has of each parameter, and of Adam.
NADAM, ADAM = ("step", "mu_product", "exp_avg", "exp_avg_sq"), ("step", "exp_avg", "exp_avg_sq")
SCALARS = {"step", "mu_product", "accumulated"}
OURS = {"ema", "grad_accumulator", "remainder", "accumulated", *SCALES.values()}


class Kept:
    """A tensor that PyTorch's loading is not to touch: it would give all state the dtype of the parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def checked(groups: list[dict[str, Any]], state_dict: Mapping[str, Any], device: str | None = None) -> Any:
    """A checkpoint of NAdam in the order of these groups, its tensors Kept on a device, by default the parameters'."""
    check_owner(state_dict, "NAdam")
    return _checked(groups, state_dict, NADAM, device)


def _checked(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any], required: tuple[str, ...], device: str | None = None
) -> Any:
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict: no {key!r} in it")
    saved = [dict(group) for group in state_dict["param_groups"]]
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, not {len(groups)}"
        )
    state = {key: dict(entry) if isinstance(entry, Mapping) else entry for key, entry in state_dict["state"].items()}
    for i, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"param_groups[{i}] has {len(theirs['params'])} parameters, not {len(ours['params'])}"
            )
        names, known = theirs.get("param_names"), ours.get("param_names")
        if names is not None and known is not None and names != known:
            if sorted(names) != sorted(known):
                wrong = sorted(set(names) ^ set(known))
                raise ValueError(
                    f"param_groups[{i}]: parameters {wrong} are not in both the checkpoint and the optimizer"
                )
            order = [names.index(name) for name in known]
            theirs["params"], theirs["param_names"] = [theirs["params"][j] for j in order], list(known)
    ids = list(chain.from_iterable(group["params"] for group in saved))
    params = chain.from_iterable(group["params"] for group in groups)
    strays = state.keys() - set(ids)
    if strays:
        raise ValueError(f"state: it has entries of {some(list(strays))}, param_groups parameters of {some(ids)}")
    for key, param in zip(ids, params, strict=True):
        if key in state:
            state[key] = _entry(f"state[{key}]", state[key], param, required, device)
    return {**state_dict, "state": state, "param_groups": saved}


def of_adam(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> Any:
    """A checkpoint of Adam as one of NAdam with the settings of these groups."""
    made = _checked(groups, state_dict, ADAM)
    pairs = zip(groups, made["param_groups"], strict=True)
    return _with_products({**made, "param_groups": [{**ours, "params": theirs["params"]} for ours, theirs in pairs]})


def of_nadamw(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> Any:
    """A checkpoint of NAdamW, which keeps no momentum product, as one of NAdam; settings that it has not are ours."""
    check_owner(state_dict, "NAdamW")
    made = _checked(groups, state_dict, ADAM)
    pairs = zip(groups, made["param_groups"], strict=True)
    return _with_products({**made, "param_groups": [{**ours, **theirs} for ours, theirs in pairs]})


def _with_products(made: dict[str, Any]) -> Any:
    """A checkpoint with the momentum products of so many steps."""
    for group in made["param_groups"]:
        for key in group["params"]:
            entry = made["state"].get(key)
            if entry:
                entry.pop("max_exp_avg_sq", None)
                steps, beta1 = int(entry["step"].tensor), float(group["betas"][0])
                product = momentum_product(steps, beta1, float(group["momentum_decay"]))
                entry["mu_product"] = Kept(torch.tensor(product, dtype=torch.float64, device="cpu"))
    return made


def _entry(where: str, entry: Any, param: Tensor, required: tuple[str, ...], device: str | None) -> Any:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected a dict, got {type(entry).__name__}")
    missing = [name for name in required if name not in entry]
    if missing and entry:
        owner = "NAdam" if required is NADAM else "Adam, AdamW or NAdamW"
        hint = "; load_adam_state_dict takes Adam's, nadam.torch.NAdamW that of NAdamW" * (missing == ["mu_product"])
        raise ValueError(f"{where}: no {missing[0]!r}: this is not the state of {owner}{hint}")
    kept = {}
    for name, value in entry.items():
        if name not in {*NADAM, *OURS}:
            kept[name] = value
            continue
        shape = torch.Size() if name in SCALARS else param.shape
        if name in SCALES.values():
            shape = torch.Size([num_scales(param.numel())])
        tensor = _tensor(f"{where}[{name!r}]", value)
        if name in SCALARS and tensor.numel() == 1:
            tensor = tensor.reshape(())
        if tensor.shape != shape:
            raise ValueError(f"{where}[{name!r}]: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not bool(torch.isfinite(local(tensor)).all()):
            raise ValueError(f"{where}[{name!r}]: it holds NaN or infinity")
        kept[name] = Kept(_placed(name, tensor, param, device))
    _check_ranges(where, kept)
    _check_codes(where, kept)
    if SCALES["exp_avg"] in kept:
        codes = {name: _tensor(where, entry[name]) for name in (*SCALES, *SCALES.values())}
        if not fits_order(codes, param):
            kept = {name: value for name, value in kept.items() if name not in codes}
            kept |= {name: Kept(_placed(name, tensor, param, device)) for name, tensor in wide(codes).items()}
    return kept


def _tensor(where: str, value: Any) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: {value!r:.99}, expected a tensor: {error}") from error


def _check_ranges(where: str, entry: dict[str, Any]) -> None:
    step, product, squares = (entry.get(name) for name in ("step", "mu_product", "exp_avg_sq"))
    if step is not None and (float(step.tensor) < 0 or float(step.tensor) % 1):
        raise ValueError(f"{where}['step']: {float(step.tensor)}, expected an integer >= 0")
    if product is not None and not 0 <= float(product.tensor) <= 1:
        raise ValueError(f"{where}['mu_product']: {float(product.tensor)}, expected 0 <= mu_product <= 1")
    if squares is not None and not squares.tensor.is_complex() and bool((local(squares.tensor) < 0).any()):
        raise ValueError(f"{where}['exp_avg_sq']: it holds a negative number")


def _check_codes(where: str, entry: dict[str, Any]) -> None:
    """That moments are codes where there are scales, and only there."""
    there = [name for name in SCALES.values() if name in entry]
    found = {name: entry[name].tensor.dtype for name in SCALES if name in entry}
    codes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    if there and (len(there) < len(SCALES) or found != codes):
        raise ValueError(f"{where}: {there} with moments of {found}, expected scales of both and codes of {codes}")
    for name, largest in LARGEST_SCALES.items():
        if there and entry[name].tensor.numel() and int(entry[name].tensor.max()) > largest:
            raise ValueError(f"{where}[{name!r}]: {int(entry[name].tensor.max())}, expected at most {largest}")
    if not there and not all(dtype.is_floating_point or dtype.is_complex for dtype in found.values()):
        raise ValueError(f"{where}: moments of {found} without their scales")
    rest = entry.get("remainder")
    if rest is not None and rest.tensor.dtype not in (torch.int8, torch.int16):
        raise ValueError(f"{where}['remainder']: {rest.tensor.dtype}, expected torch.int16 or torch.int8")


def _placed(name: str, tensor: Tensor, param: Tensor, device: str | None) -> Tensor:
    """A copy on a device, by default the parameter's, in a dtype not narrower than it has."""
    if name in SCALARS:
        return tensor.detach().to(torch.float64).clone()
    wide = STATE_DTYPES.get(param.dtype, torch.promote_types(tensor.dtype, param.dtype))
    if tensor.dtype in (torch.int8, torch.uint8, torch.int16) and name not in ("ema", "grad_accumulator"):
        wide = tensor.dtype  # remainders and codes
    if name in SCALES.values():
        return tensor.detach().to(device or param.device, torch.uint8, copy=True)
    if is_sharded(param):
        return tensor.detach().to(wide)
    kept = torch.empty_like(param.detach(), dtype=wide, device=device, memory_format=torch.preserve_format)
    return kept.copy_(tensor)


def complete(state: Mapping[Any, Any], groups: Groups, extras: Mapping[str, Any], options: StateOptions) -> None:
    """After loading: put the tensors that were Kept in their places, and make what another optimizer does not keep."""
    h, rounded = Hyperparameters(**extras), set()
    for param, entry in state.items():
        entry.update({name: value.tensor for name, value in entry.items() if isinstance(value, Kept)})
        for name in SCALARS & entry.keys():
            value = entry[name]
            entry[name] = (value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")).to(torch.float64)
        if "exp_avg" in entry and not is_sharded(param):
            exact = convert(entry, options.compresses(param), options.remainder_dtype)
            rounded |= set() if exact else {id(param)}
        if entry and not entry.keys() >= set(extra_state(param, h, options)):
            entry.update({**new_state(param, h, options), **entry})
    places = ((i, place, p) for i, group in enumerate(groups) for place, p in enumerate(group["params"]))
    warn_of_rounding([name_of(groups, i, place) for i, place, param in places if id(param) in rounded])
