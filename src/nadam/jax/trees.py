"""Leaves of trees: their dtypes, and which of them decay."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp


def scalar_dtype() -> str:
    """The dtype in which the scalars of a step are computed."""
    return "float64" if jax.config.jax_enable_x64 else "float32"


def compute_dtype(leaf: Any) -> np.dtype[Any]:
    """The dtype in which a parameter is computed, and its moments are kept."""
    dtype = dtype_of(leaf)
    return np.dtype("float32") if dtype.itemsize == 2 else dtype


def dtype_of(leaf: Any) -> np.dtype[Any]:
    """Of an array, a number or what has only a shape and a dtype."""
    dtype: np.dtype[Any] = np.dtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
    return dtype


def beside(params: Any, scalar: Any) -> Any:
    """A scalar on all devices that parameters are spread over, where an update leaves it: or a second call compiles."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            placed = leaf.sharding
            if isinstance(placed, jax.sharding.NamedSharding) and placed.mesh.size > 1:
                return jax.device_put(scalar, jax.sharding.NamedSharding(placed.mesh, jax.sharding.PartitionSpec()))
    return scalar


def layers(params: Any) -> list[int]:
    """The layer of each leaf, as far as the names tell: what lies in one container is a layer, and 2 is before 10.

    Example:
        >>> layers({"dense_10": {"w": 1.0, "b": 1.0}, "dense_2": {"w": 1.0}}), layers([1.0, 1.0])
        ([1, 1, 0], [0, 1])
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    within = [path[:-1] for path in paths]
    named = [re.split(r"(\d+)", jax.tree_util.keystr(path)) for path in (within if len(set(within)) > 1 else paths)]
    natural = [tuple((int(part) if part.isdigit() else 0, part) for part in parts) for parts in named]
    ranks = {each: rank for rank, each in enumerate(sorted(set(natural)))}
    return [ranks[each] for each in natural]


def is_weak(leaf: Any) -> bool:
    """Whether a leaf stands for a Python number, whose dtype gives way to others."""
    return isinstance(leaf, (int, float, complex)) or bool(getattr(leaf, "weak_type", False))


def as_type(value: Any, dtype: Any, weak: bool) -> Any:
    """A value in a dtype; weak, where it stands for a Python number: then the types of a state stay what they were."""
    value = value.astype(dtype)
    if not weak:
        return value
    return lax.convert_element_type_p.bind(value, new_dtype=np.dtype(dtype), weak_type=True, sharding=None)


def chosen(mask: Any, like: Any, treedef: Any) -> list[bool]:
    """Which leaves decay."""
    if mask is None:
        return [True] * treedef.num_leaves
    tree = mask(like) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda part, below: jax.tree.map(lambda _: part, below), tree, like)
    except ValueError as error:
        raise ValueError(f"mask: its structure is not that of the parameters, or a prefix of it: {error}") from None
    return [bool(leaf) for leaf in jax.tree.leaves(spread)]
