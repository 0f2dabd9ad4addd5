"""State of our JAX optimizers, and of optax's Nadam and Adam, in the form that moves between hosts, and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from numpy.typing import NDArray

from nadam.core.hyperparameters import Hyperparameters
from nadam.core.portable import ParamState, PortableState, widened
from nadam.core.portable_settings import by_decay, settings_of
from nadam.jax.fused_state import LAST_COUNT, FusedState
from nadam.jax.fused_step import Fused
from nadam.jax.state import is_ours, replaced, the_one
from nadam.jax.trees import chosen, dtype_of

Array = NDArray[Any]
SLOTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "ema": "ema", "accumulator": "accumulator"}
SLOTS |= {"exp_avg_scale": "mu_scale", "exp_avg_sq_scale": "nu_scale"}  # with leaves only where moments are codes


def knows(state: Any) -> bool:
    """Whether there is one state of such an optimizer in a tree, or in an (optimizer, state) pair."""
    return sum(map(is_ours, jax.tree.leaves(_parts(state)[1], is_leaf=is_ours))) == 1


def export(state: Any, params: Any = None) -> PortableState:
    """What is in a state: that of `fused`, or an optax state that holds one of `nadam`, `nadamw` or optax's own Adam.

    Args:
        state: The state; or (fused, state), whose settings are then known, as they have to be with
            ``gradient_accumulation_steps``.
        params: A tree of what it trains.

    Raises:
        ValueError: Gradients are accumulated, and settings are not given.
        TypeError: Parts of a chain's state that there is no place for; arrays of other processes.
    """
    h, tree = _parts(state)
    ours = the_one(tree, "state")
    _check_others(tree)
    fused = isinstance(ours, FusedState)
    calls = int(ours.count)
    steps = _accumulation_steps(ours, h)
    updates = int(ours.last_step.step) if fused else calls
    product = float(ours.mu_product) if hasattr(ours, "mu_product") else None
    columns = {slot: _named(kept) for slot, name in SLOTS.items() if (kept := getattr(ours, name, None)) is not None}
    names = list(columns["exp_avg"])
    position = (calls + int(ours.beyond)) % steps if fused else 0
    found = {
        name: ParamState(
            updates,
            product,
            accumulated=position > 0,
            **{s: column[name] for s, column in columns.items() if name in column},
        )
        for name in names
    }
    return PortableState(
        optimizer="nadam.jax.fused" if fused else "nadam.jax.nadam" if product is not None else "optax.scale_by_adam",
        step=updates,
        names=names,
        params=found,
        momentum_product=product,
        position=position,
        skipped_steps=int(ours.last_step.skipped_steps) if fused else 0,
        groups=[settings_of(*each) for each in _groups(state, ours)],
        values=None if params is None else _named(params),
    )


def restore(like: Any, state: PortableState, params: Any = None) -> tuple[Any, Any]:
    """A state with the structure and the dtypes of another, and parameters likewise.

    Args:
        like: State of the optimizer that is to go on, as from its ``init``; or (optimizer, state).
        state: What is to be in it.
        params: A tree like the parameters, which get the values of the state; None to leave them out.

    Returns:
        The new state, and the new parameters or None.

    Raises:
        ValueError: It does not fit; see `PortableState.check_fits`. Or settings are not known that are needed.
    """
    h, tree = _parts(like)
    ours = the_one(tree, "optimizer")
    _check_others(tree)
    steps = _accumulation_steps(ours, h)
    shapes = {name: np.shape(leaf) for name, leaf in _leaves(ours.mu).items()}
    values = None if params is None else {name: np.shape(leaf) for name, leaf in _leaves(params).items()}
    checked = h or Hyperparameters(use_ema=getattr(ours, "ema", None) is not None, momentum_decay=float("inf"))
    state.check_fits(shapes, checked, one_count=True, values=values)
    leaves = {**_leaves(params), **_leaves(ours.mu)}
    state.check_complex({name for name, leaf in leaves.items() if dtype_of(leaf).kind == "c"}, joint=True)
    for settings, own in _groups(like, ours):
        state.check_settings(settings, own)
    codes = dict.fromkeys(_leaves(getattr(ours, "mu_scale", None)))
    halves = [name for name, leaf in _leaves(params).items() if dtype_of(leaf).name == "bfloat16"]
    state = state.fitted(codes, dict.fromkeys(halves, 0))
    fields: dict[str, Any] = {}
    for slot, name in SLOTS.items():
        kept = getattr(ours, name, None)
        if kept is not None:
            given = {n: getattr(each, slot) for n, each in state.params.items()}
            fields[name] = _filled(kept, given, of_window=slot == "accumulator")
    whole = min(state.step * steps + state.position, LAST_COUNT)
    fields["count"] = _like(ours.count, whole)
    if hasattr(ours, "mu_product"):
        if h is None and state.momentum_product is None and state.step:
            raise ValueError(
                "momentum_decay: a state alone does not tell it, and what was saved has no momentum product: give "
                "(fused, state); for nadam and nadamw load into a state of optax.adam, and take nadam.jax.from_optax"
            )
        fields["mu_product"] = _like(ours.mu_product, state.product(checked))
    if isinstance(ours, FusedState):
        seen = {"step": state.step, "skipped_steps": state.skipped_steps}
        report = {name: _like(getattr(ours.last_step, name), value) for name, value in seen.items()}
        fields["last_step"] = ours.last_step._replace(**report)
    rate = state.learning_rate(state.names)
    made = replaced(tree, ours._replace(**fields))

    def other(path: Any, leaf: Any) -> Any:
        if is_ours(leaf):
            return leaf
        name = keystr(path, simple=True, separator="/").rpartition("/")[2]
        value = state.step if name == "count" else rate if name == "learning_rate" else None
        return leaf if value is None else _like(leaf, value)

    made = jax.tree_util.tree_map_with_path(other, made, is_leaf=is_ours)
    return made, None if params is None else _filled(params, state.values or {})


def _parts(state: Any) -> tuple[Hyperparameters | None, Any]:
    """Settings, as far as they are given, and the state."""
    if type(state) is tuple and len(state) == 2 and hasattr(state[0], "init") and callable(state[0].init):
        return (state[0].settings if isinstance(state[0], Fused) else None), state[1]
    return None, state


def _groups(state: Any, ours: Any) -> list[tuple[Hyperparameters, list[str]]]:
    """The settings that are known, with the names of those parameters."""
    h, _ = _parts(state)
    if h is None:
        return []
    names = list(_leaves(ours.mu))
    return by_decay(h, dict(zip(names, chosen(state[0].mask, ours.mu, jax.tree.structure(ours.mu)), strict=True)))


def _accumulation_steps(ours: Any, h: Hyperparameters | None) -> int:
    if getattr(ours, "accumulator", None) is None:
        return 1
    if h is None:
        raise ValueError("gradient_accumulation_steps: a state alone does not tell: give (fused, state)")
    return h.gradient_accumulation_steps or 1


def _check_others(tree: Any) -> None:
    """That nothing else is in a tree but counts and hyperparameters."""
    for path, leaf in tree_flatten_with_path(tree, is_leaf=is_ours)[0]:
        where = keystr(path, simple=True, separator="/")
        if not is_ours(leaf) and where.rpartition("/")[2] != "count" and "hyperparams" not in where.split("/"):
            raise TypeError(f"state: {where}: no part of Nadam's or Adam's state, and no count; orbax saves any tree")


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their paths."""
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _named(tree: Any) -> dict[str, Array]:
    found = {}
    for name, leaf in _leaves(tree).items():
        if not getattr(leaf, "is_fully_addressable", True):
            raise TypeError(f"{name}: parts of it are in other processes; orbax can save it")
        found[name] = widened(leaf)
    return found


def _filled(tree: Any, given: dict[str, Any], of_window: bool = False) -> Any:
    """A tree with other values; where none is given, its own, or zeros of what belongs to a window."""

    def filled(path: Any, leaf: Any) -> Any:
        value = given.get(keystr(path, simple=True, separator="/"))
        if value is None:
            return jax.numpy.zeros_like(leaf) if of_window else leaf
        return _like(leaf, value)

    return jax.tree_util.tree_map_with_path(filled, tree)


def _like(leaf: Any, value: Any) -> Any:
    """A value with the dtype of an array, where that is."""
    array = np.asarray(value).astype(jax.numpy.result_type(leaf))
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else array
