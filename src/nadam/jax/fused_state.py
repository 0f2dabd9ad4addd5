"""The state of `fused`: what is in it, and whether it is of these settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from nadam.core.compressed import is_compressed, num_scales
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import StepReport
from nadam.core.traced import Tensor
from nadam.jax.checks import alike, check_trainable
from nadam.jax.compressed import narrowed, widened
from nadam.jax.trees import beside, compute_dtype, dtype_of, scalar_dtype

LAST_COUNT = 2**31 - 1  # where int32 ends
# Fields that are like the parameters, or None, in the order in which a tensor has them; then those of scales.
LIKE_PARAMS = ("mu", "nu", "ema", "accumulator")
SCALES = ("mu_scale", "nu_scale")
CODES = {"mu": "int8", "nu": "uint8"}


class FusedState(NamedTuple):
    """State of `fused`: a tree of arrays, whose structure depends on the settings alone.

    Attributes:
        count: int32, calls so far, without those that were skipped; at ``2**31 - 1`` it stays.
        mu: First moments, not bias-corrected; a tree like the parameters. With ``state_bits`` int8 codes of large ones.
        nu: Second moments, likewise; codes are uint8.
        mu_product: Product of the momenta of all updates so far.
        ema: Moving averages of the parameters, with ``use_ema``.
        accumulator: Sums of gradients, with ``gradient_accumulation_steps``.
        last_step: What the last call did; without what the settings do not ask for.
        beyond: int32, calls since ``count`` stays, modulo those after which accumulation and overwriting are where they
            were: so both go on. Schedules see ``count``.
        mu_scale: With ``state_bits`` a tree like the parameters: where ``mu`` is codes, their scales in C order, uint8,
            one for each 32 elements and at least 64; else None.
        nu_scale: Likewise of ``nu``.
    """

    count: Any
    mu: Any
    nu: Any
    mu_product: Any
    ema: Any
    accumulator: Any
    last_step: StepReport
    beyond: Any
    mu_scale: Any = None
    nu_scale: Any = None


def in_8_bits(state_bits: int | None, leaf: Any) -> bool:
    """Whether the moments of a parameter are codes."""
    return state_bits is not None and is_compressed(np.size(leaf), compute_dtype(leaf).name)


def check_state(h: Hyperparameters, state: Any) -> None:
    """That a state is one of `fused` with such settings."""
    if not isinstance(state, FusedState):
        raise ValueError(f"state: {type(state).__name__}, expected the FusedState that init gives")
    parts = {
        "ema": (state.ema, h.use_ema),
        "accumulator": (state.accumulator, h.gradient_accumulation_steps is not None),
        "last_step.grad_norm": (state.last_step.grad_norm, h.measures_norm),
        "last_step.clip_factor": (state.last_step.clip_factor, h.clips_by_norm),
    }
    for name, (part, wanted) in parts.items():
        if (part is not None) != wanted:
            found = "there is none" if part is None else "there should be none"
            raise ValueError(f"state.{name}: it is of an optimizer with other settings: {found}")


def columns(
    state: FusedState, state_bits: int | None, params: Any, treedef: Any, leaves: list[Any]
) -> dict[str, list[Any]]:
    """The leaves of the trees in a state by name, checked to be of these parameters; None where there is no scale."""
    trees = {name: tree for name in LIKE_PARAMS if (tree := getattr(state, name)) is not None}
    found = {name: alike(f"state.{name}", tree, "params", treedef, leaves) for name, tree in trees.items()}
    for (name, codes), field in zip(CODES.items(), SCALES, strict=True):
        tree = getattr(state, field)
        try:
            found[field] = [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(f"state.{field}: its structure is not that of params: {error}") from None
        for i, (leaf, moment, scale) in enumerate(zip(leaves, found[name], found[field], strict=True)):
            small, dtype = in_8_bits(state_bits, leaf), dtype_of(moment)
            expected = (num_scales(np.size(leaf)),) if small else None
            given = None if scale is None else np.shape(scale)
            if given == expected and (dtype == codes if small else jnp.issubdtype(dtype, jnp.floating)):
                continue
            path = jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(params)[0][i][0])
            raise ValueError(
                f"state.{name}{path}: it is of an optimizer with other settings: {dtype} and scales {given}, expected "
                f"{codes if small else compute_dtype(leaf)} and {expected} with state_bits={state_bits}"
            )
    return found


def wide_moments(state: FusedState) -> tuple[Any, Any]:
    """Both trees of moments in the dtype that is computed in; those that are codes, exactly."""
    made = [tensor if tensor.exp_avg_scale is None else widened(tensor) for tensor in _moments(state)]
    treedef = jax.tree.structure(state.mu)
    return treedef.unflatten([each.exp_avg for each in made]), treedef.unflatten([each.exp_avg_sq for each in made])


def with_moments(state: FusedState, mu: Any, nu: Any) -> FusedState:
    """A state with other moments, in its own format: where it has codes, float32 ones are rounded to nearest."""
    wide = [Tensor(None, m, v, None, None) for m, v in zip(*map(jax.tree.leaves, (mu, nu)), strict=True)]
    pairs = zip(_moments(state), wide, strict=True)
    made = [new if old.exp_avg_scale is None else narrowed(old, new, None) for old, new in pairs]
    treedef, trees = jax.tree.structure(state.mu), {"mu": "exp_avg", "nu": "exp_avg_sq"}
    if state.mu_scale is not None:
        trees |= {"mu_scale": "exp_avg_scale", "nu_scale": "exp_avg_sq_scale"}
    return state._replace(**{n: treedef.unflatten([getattr(each, of) for each in made]) for n, of in trees.items()})


def _moments(state: FusedState) -> list[Tensor]:
    """Moments and scales."""
    first, treedef = jax.tree.flatten(state.mu)
    second, *scales = (
        [None] * len(first) if tree is None else treedef.flatten_up_to(tree)
        for tree in (state.nu, state.mu_scale, state.nu_scale)
    )
    return [Tensor(None, m, v, None, None, a, b) for m, v, a, b in zip(first, second, *scales, strict=True)]


def new_state(h: Hyperparameters, state_bits: int | None, params: Any) -> FusedState:
    """Before the first call."""
    check_trainable(params)

    def zeros(codes: str = "") -> Any:
        def zero(leaf: Any) -> Any:
            return jnp.zeros_like(leaf, dtype=codes if codes and in_8_bits(state_bits, leaf) else compute_dtype(leaf))

        return jax.tree.map(zero, params)

    def scales() -> Any:
        def scale(leaf: Any) -> Any:
            small = in_8_bits(state_bits, leaf)
            return beside(params, jnp.zeros(num_scales(np.size(leaf)), jnp.uint8)) if small else None

        return None if state_bits is None else jax.tree.map(scale, params)

    def copied(leaf: Any) -> Any:
        # An abstract parameter has no value yet. Otherwise a copy, since parameter and average may both be donated.
        dtype = compute_dtype(leaf)
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros_like(leaf, dtype=dtype) if abstract else jnp.array(leaf, dtype=dtype, copy=True)

    def scalar(value: Any, dtype: Any) -> Any:
        return beside(params, jnp.full((), value, dtype))

    dtype = scalar_dtype()
    norm, factor = (scalar(0, dtype) if there else None for there in (h.measures_norm, h.clips_by_norm))
    step, skipped_steps, skipped = scalar(0, jnp.int32), scalar(0, jnp.int32), scalar(False, bool)
    return FusedState(
        count=scalar(0, jnp.int32),
        mu=zeros(CODES["mu"]),
        nu=zeros(CODES["nu"]),
        mu_product=scalar(1, dtype),
        ema=jax.tree.map(copied, params) if h.use_ema else None,
        accumulator=zeros() if h.gradient_accumulation_steps else None,
        last_step=StepReport(step, scalar(0, dtype), norm, factor, skipped_steps, skipped),
        beyond=scalar(0, jnp.int32),
        mu_scale=scales(),
        nu_scale=scales(),
    )
