"""The settings that a portable state records: of the parameters that decay, and of those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nadam.core.config import FIELDS, to_config
from nadam.core.hyperparameters import Hyperparameters

_PYTORCHS = ("coupled_weight_decay", "maximize")
# Settings of Nadam's rule, which Adam has not: coming from it or going to it, they do not differ.
NO_ADAMS = frozenset({"momentum_decay", "bias_correction"})


def by_decay(h: Hyperparameters, decays: Mapping[str, bool]) -> list[tuple[Hyperparameters, list[str]]]:
    """The settings of the parameters that decay and of those that do not, with their names."""
    both = [(replace(h, weight_decay=h.weight_decay if which else None), which) for which in (True, False)]
    made = [(settings, [name for name, own in decays.items() if own == which]) for settings, which in both]
    return [(settings, own) for settings, own in made if own]


def settings_of(h: Hyperparameters, names: list[str], *, adam: bool = False) -> dict[str, Any]:
    """An entry of `PortableState.groups`: settings as JSON can hold them, of Adam without those that it has not."""
    found: dict[str, Any] = {"params": names}
    for name in (*FIELDS, *_PYTORCHS):
        value = getattr(h, name)
        if adam and name in NO_ADAMS:
            continue
        try:
            found[name] = to_config(name, value)
        except ValueError:  # of a function that has no name
            found[name] = {"class_name": "function", "config": repr(value)}
    return found


def hyperparameters_of(group: Mapping[str, Any]) -> Hyperparameters:
    """The settings in an entry of `PortableState.groups`; those that a function gives are the defaults."""
    known = {name: group[name] for name in (*FIELDS, *_PYTORCHS) if name in group}
    return Hyperparameters(**{name: value for name, value in known.items() if not isinstance(value, Mapping)})


def plain(value: Any) -> Any:
    """A setting as it is compared: 0 where it is absent, None where a function computes it or it is no setting."""
    if isinstance(value, (Mapping, list, np.ndarray)):
        return None
    if value is None or value is False:
        return 0.0
    return value
