"""State of optax's own Nadam and Adam as ours, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any

import jax
import optax
from jax import numpy as jnp

from nadam.core.scalars import momentum_product
from nadam.jax.checks import alike, check_floating, check_trainable, number
from nadam.jax.fused_state import LAST_COUNT, FusedState, wide_moments, with_moments
from nadam.jax.transforms import NadamState


def from_optax(
    state: Any,
    like: Any,
    *,
    b1: float = 0.9,
    momentum_decay: float | None = None,
    gradient_accumulation_steps: int | None = None,
) -> Any:
    """Go on from the state of `optax.nadam`, `optax.nadamw`, `optax.adam` or `optax.adamw`.

    With ``momentum_decay`` infinite `nadam` and `nadamw` take such a state as it is. This is for the others, for half
    precision, whose moments are wider here, and for a state that comes out of a file.

    Args:
        state: Any state that has one `optax.ScaleByAdamState` in it.
        like: State of the optimizer that is to go on, as from its ``init``: of `nadam`, `nadamw` or `fused`.
        b1: Decay rate of the first moment, for the momentum product.
        momentum_decay: As of the optimizer that is to go on, likewise.
        gradient_accumulation_steps: As of the optimizer that is to go on: the window of `fused` starts anew.

    Returns:
        ``like`` with the moments and the count of ``state``; averages, accumulators and the like are kept. With
        ``state_bits=8`` moments are rounded to nearest, of which a warning says what is lost.

    Raises:
        ValueError: There is not one such state in it, or it is of other parameters, or holds NaN or infinity.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from nadam.jax import fused
        >>> params = jnp.ones(2)
        >>> state = from_optax(optax.nadam(0.1).init(params), fused(0.1).init(params))
        >>> int(state.count)
        0
    """
    theirs, ours = the_one(state, "state", optax.ScaleByAdamState), the_one(like, "like")
    treedef = jax.tree.structure(ours.mu)
    moments = {}
    for name in ("mu", "nu"):
        kept = getattr(ours, name)
        given = alike(f"state ({name})", getattr(theirs, name), "like", treedef, jax.tree.leaves(kept))
        check_floating(f"state ({name})", given, jax.tree.leaves(kept))
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in given):
            raise ValueError(f"state ({name}): it holds NaN or infinity")
        dtypes = ["float32" if own.dtype.kind in "iu" else own.dtype for own in jax.tree.leaves(kept)]  # of codes
        cast = [jnp.asarray(leaf).astype(dtype) for leaf, dtype in zip(given, dtypes, strict=True)]
        moments[name] = treedef.unflatten(cast)
    updates = int(theirs.count)
    if updates < 0:
        raise ValueError(f"state (count): {updates}, expected a number >= 0")
    fields: dict[str, Any] = {"count": jnp.int32(updates), **moments}
    if not isinstance(ours, optax.ScaleByAdamState):
        decay = inf if momentum_decay is None else number("momentum_decay", momentum_decay)
        product = momentum_product(updates, number("b1", b1), decay)
        fields["mu_product"] = jnp.asarray(product, ours.mu_product.dtype)
    if isinstance(ours, FusedState):
        if (ours.accumulator is None) != (gradient_accumulation_steps is None):
            allowed = "None" if ours.accumulator is None else "that of the optimizer that is to go on"
            raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps}: expected {allowed}")
        steps = gradient_accumulation_steps or 1
        fields["count"] = jnp.int32(min(updates, LAST_COUNT // steps) * steps)
        fields["last_step"] = ours.last_step._replace(step=jnp.int32(updates))
        if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(ours.mu)):
            lost = "each second moment to within 1/32 of itself, each first one to within 1/127 of the largest of 32"
            warnings.warn(f"state_bits=8: moments of large parameters are rounded: {lost}", stacklevel=2)
        ours = with_moments(ours, fields.pop("mu"), fields.pop("nu"))
    return replaced(like, ours._replace(**fields))


def to_optax(state: Any, params: Any = None) -> Any:
    """The moments and the count as `optax.ScaleByAdamState`, in the place where they are.

    Args:
        state: Of `nadam`, `nadamw` or `fused`.
        params: If given, moments get the dtypes that optax keeps them in, those of the parameters.

    Returns:
        For `nadam` and `nadamw` the state as that of `optax.nadam` and `optax.nadamw`; for `fused` a
        `optax.ScaleByAdamState`.

    Raises:
        ValueError: There is none of our states in it; gradients have been accumulated in it.
    """
    ours = the_one(state, "state")
    mu, nu = wide_moments(ours) if isinstance(ours, FusedState) else (ours.mu, ours.nu)
    if params is not None:
        check_trainable(params, or_complex=True)
        mu, nu = (jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, params) for tree in (mu, nu))
    if isinstance(ours, FusedState):
        if ours.accumulator is not None and any(bool(leaf.any()) for leaf in jax.tree.leaves(ours.accumulator)):
            raise ValueError("state: it holds gradients of a window that has not ended, which optax's has no place for")
        return optax.ScaleByAdamState(count=ours.last_step.step, mu=mu, nu=nu)
    return replaced(state, optax.ScaleByAdamState(count=ours.count, mu=mu, nu=nu))


_OURS = (NadamState, FusedState, optax.ScaleByAdamState)


def the_one(tree: Any, name: str, kinds: Any = _OURS) -> Any:
    """The only state of such kinds in a tree."""
    found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is(kinds)) if isinstance(leaf, kinds)]
    if len(found) != 1:
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{name}: expected one {names} in it, found {len(found)}")
    return found[0]


def replaced(tree: Any, new: Any) -> Any:
    """A tree with another state in the place of its own."""
    return jax.tree.map(lambda leaf: new if is_ours(leaf) else leaf, tree, is_leaf=is_ours)


def is_ours(leaf: Any) -> bool:
    """Whether this is a state of `nadam`, `nadamw` or `fused`."""
    return isinstance(leaf, _OURS)


def _is(kinds: Any) -> Callable[[Any], bool]:
    return lambda leaf: isinstance(leaf, kinds)
