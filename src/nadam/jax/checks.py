"""What is refused: numbers out of their range, and trees that do not belong together.

What is known before a program is compiled raises; a number that is traced, out of its range, makes everything NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from nadam.core.hyperparameters import as_number, in_range
from nadam.jax.trees import dtype_of, scalar_dtype

# The hyperparameters by optax's names, those that have others here.
OURS = {"learning_rate": "lr", "b1": "beta1", "b2": "beta2", "eps_root": "eps", "loss_scale": "loss_scale_factor"}
SPELLING = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"}
UPPER = {"b1": 1.0, "b2": 1.0}
TRAINABLE = {"float16", "bfloat16", "float32", "float64"}
COMPLEX = {"complex64", "complex128"}
# What is added where a function or a model, which is one too, is among parameters.
_MODEL = (
    "; of a model give its arrays: model.init(...) of Flax, nnx.state(model, nnx.Param), "
    "eqx.filter(model, eqx.is_inexact_array) of Equinox"
)


def number(name: str, value: Any) -> Any:
    """A hyperparameter by optax's name: a float where it is known, else a traced scalar, NaN where out of its range."""
    if isinstance(value, jax.Array) and jnp.iscomplexobj(value):  # inject_hyperparams gives it the parameters' dtype
        value = jnp.where(value.imag == 0, value.real, nan)
    if not isinstance(value, jax.core.Tracer):
        return in_range(OURS.get(name, name), as_number(name, value), name)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.number):
        raise TypeError(f"{name}: a traced array of shape {value.shape}, {value.dtype}: expected a number")
    wide = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(scalar_dtype())
    inside = wide > 0 if name == "loss_scale" else wide >= 0
    if name != "momentum_decay":
        inside &= wide < UPPER.get(name, inf)
    return jnp.where(inside, wide, jnp.full_like(wide, nan))


def check_trainable(params: Any, or_complex: bool = False) -> None:
    """That all leaves of a tree are arrays of real floating-point numbers, or complex ones where these are taken."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        try:
            masked = isinstance(leaf, np.ma.MaskedArray)
            name = "a masked array" if masked else str(getattr(leaf, "dtype", None) or jnp.result_type(leaf))
        except TypeError:
            name = type(leaf).__name__
        if name not in TRAINABLE and not (or_complex and name in COMPLEX):
            where, allowed = f"params{jax.tree_util.keystr(path)}", "float16, bfloat16, float32 or float64"
            raise TypeError(
                f"{where}: {name}, expected {allowed}{', or complex' if or_complex else ''}{_MODEL * callable(leaf)}"
            )


def alike(name: str, tree: Any, reference: str, treedef: Any, leaves: Sequence[Any]) -> list[Any]:
    """The leaves of a tree, checked to be like those of another."""
    given: list[Any]
    given, own = jax.tree.flatten(tree)
    if own != treedef:
        raise ValueError(f"{name}: its structure is not that of {reference}: {own}, expected {treedef}")
    for i, (leaf, like) in enumerate(zip(given, leaves, strict=True)):
        if jnp.shape(leaf) != jnp.shape(like):
            path = jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(tree)[0][i][0])
            raise ValueError(f"{name}{path}: shape {jnp.shape(leaf)}, expected that of {reference}, {jnp.shape(like)}")
    return given


def check_floating(name: str, leaves: Sequence[Any], *state: Sequence[Any]) -> None:
    """That leaves are of real floating-point numbers, of whatever width; or complex, where those of the state are."""
    for i, (leaf, *kept) in enumerate(zip(leaves, *state, strict=True)):
        dtype, real = dtype_of(leaf), not kept or any(dtype_of(each).kind != "c" for each in kept)
        if not jnp.issubdtype(dtype, jnp.floating if real else jnp.inexact):
            kind = "real" if real else "real or complex"
            raise TypeError(f"{name}: leaf {i} is {dtype}, expected {kind} floating-point numbers")
