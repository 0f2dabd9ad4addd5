"""What users mistake for something else: a model for its parameters, settings for attributes, whose state it is."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from math import inf
from typing import Any

from torch.nn import Module

from nadam.torch.settings import DEFAULTS, EXTRAS, OF_ALL, STATE_OPTIONS, check_group

SETTINGS = (*DEFAULTS, *EXTRAS, *STATE_OPTIONS)


def listed(params: Any) -> Any:
    """What a user gave for parameters, where it is no model and has not been gone through already."""
    check_no_model(params)
    if isinstance(params, Iterator):
        params = list(params)
        if not params:
            raise ValueError(
                "optimizer got an empty parameter list: nothing is left in what was given for params; a generator, as "
                "model.parameters() gives, can be used once"
            )
    return params


def check_no_model(params: Any) -> None:
    """That a model is not given for its parameters."""
    if isinstance(params, Module):
        raise TypeError(f"params: expected model.parameters(), got the model itself, a {type(params).__name__}")


def check_new_group(group: Any, of_all: Mapping[str, Any], index: int) -> None:
    """That a new group has parameters and settings of a group."""
    if isinstance(group, Mapping):
        check_no_model(group.get("params"))
        check_group(group, of_all, f"param_groups[{index}]")


def check_saved_groups(state_dict: Mapping[str, Any], of_all: Mapping[str, Any]) -> None:
    """That a checkpoint is made as PyTorch makes one, and that its groups have settings of a group."""
    _check_is(state_dict.get("state", {}), Mapping, "state")
    groups = state_dict.get("param_groups", [])
    _check_is(groups, (list, tuple), "param_groups")
    for i, group in enumerate(groups):
        _check_is(group, Mapping, f"param_groups[{i}]")
        _check_is(group.get("params"), (list, tuple), f"param_groups[{i}]['params']")
        for name in ("params", "param_names"):
            if not all(isinstance(each, Hashable) for each in group.get(name) or ()):
                raise ValueError(f"param_groups[{i}][{name!r}]: {group[name]!r:.99}, expected numbers or names")
        check_group(group, of_all, f"param_groups[{i}]")


def _check_is(value: Any, kinds: Any, where: str) -> None:
    if not isinstance(value, kinds):
        wanted = "a dict" if kinds is Mapping else "a list"
        raise ValueError(f"{where}: expected {wanted}, got {type(value).__name__}")


def where_it_belongs(name: str) -> str:
    """What is said of a setting that somebody takes for an attribute of the optimizer."""
    return f"it is set in param_groups[i][{name!r}]" if name in DEFAULTS else f"it is {OF_ALL}"


def shown(given: Mapping[str, Any]) -> str:
    """The settings of the whole optimizer that are not at their defaults, a line each."""
    defaults = {**EXTRAS, **STATE_OPTIONS}
    return "".join(f"{name}: {value}\n" for name, value in given.items() if value != defaults[name])


def check_owner(state_dict: Mapping[str, Any], wanted: str) -> None:
    """That a checkpoint is not that of Adam, which has another way in, or of NAdamW, which has another class."""
    for i, group in enumerate(state_dict.get("param_groups", ())):
        if "momentum_decay" not in group and "amsgrad" in group:
            owner, remedy = "Adam or AdamW", "load_adam_state_dict takes it"
        elif wanted == "NAdam" and _is_of_nadamw(group) and _has_no_product(state_dict):
            owner, remedy = "NAdamW", "nadam.torch.NAdamW takes it"
        else:
            continue
        raise ValueError(f"param_groups[{i}]: this is the state of another optimizer than {wanted}, {owner}: {remedy}")


def _is_of_nadamw(group: Mapping[str, Any]) -> bool:
    return "caution" in group or group.get("momentum_decay") == inf


def _has_no_product(state_dict: Mapping[str, Any]) -> bool:
    entries = state_dict.get("state", {}).values()
    return bool(entries) and not any("mu_product" in entry for entry in entries if isinstance(entry, Mapping))
