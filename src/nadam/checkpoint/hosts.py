"""Which host an optimizer is of. A framework that is not imported has no optimizer here, and is not imported for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from nadam.core.portable import PortableState

# Host -> where the framework has its base class, if it has one.
_BASES = {
    "keras": ("keras", "optimizers.Optimizer"),
    "torch": ("torch", "optim.Optimizer"),
}


def host_of(value: Any) -> Any:
    """The module that exports and restores an optimizer's state: ``nadam.<host>.portable``; None for other values."""
    for host, (module, attribute) in _BASES.items():
        base: Any = sys.modules.get(module)
        for part in attribute.split("."):
            base = getattr(base, part, None)
        if base is not None and isinstance(value, base):
            return import_module(f"nadam.{host}.portable")
    if type(value).__module__.startswith("nadam.numpy."):
        return import_module("nadam.numpy.portable")
    if "optax" in sys.modules and not isinstance(value, Mapping):
        jax = import_module("nadam.jax.portable")
        if jax.knows(value):
            return jax
    return None


def exported(value: Any, params: Any = None) -> Any:
    """What is saved of a value: of an optimizer, its portable state as a tree; of anything else, itself."""
    host = host_of(value)
    if host is not None:
        return host.export(value, params).to_tree()
    if not isinstance(value, Mapping):
        raise TypeError(f"state: {type(value).__qualname__}: expected an optimizer that nadam knows, or a dict")
    if params is not None:
        raise TypeError("params: expected an optimizer beside them, not a dict; put them into it")
    return value


def restored(tree: Any, optimizer: Any, params: Any, rename: Any, transpose: Any) -> Any:
    """An optimizer with a state that was saved; with parameters, a pair of both."""
    host = host_of(optimizer)
    if host is None:
        raise TypeError(f"optimizer: {type(optimizer).__qualname__}: expected one that nadam knows")
    state = PortableState.from_tree(tree).renamed(rename, transpose)
    made = host.restore(optimizer, state, params)
    return made[0] if params is None else made
