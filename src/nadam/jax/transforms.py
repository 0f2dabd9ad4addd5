"""`nadam` and `nadamw`: gradient transformations in the place of `optax.nadam` and `optax.nadamw`.

The rule gives updates when the parameter that it moves is zero. XLA makes loops of it, so all of JAX's transformations
apply; the scalars of a step are computed once, behind a barrier, rather than again for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from nadam.core import rule
from nadam.core.dtypes import SMALLEST_NORMAL
from nadam.core.hyperparameters import BIAS_CORRECTIONS, BiasCorrection, one_of
from nadam.core.library import mathematics
from nadam.core.names import known_arguments
from nadam.core.rebind import rebind
from nadam.core.traced import eps_in, scalar
from nadam.jax.checks import alike, check_floating, check_trainable, number
from nadam.jax.step import XP
from nadam.jax.trees import as_type, beside, chosen, compute_dtype, dtype_of, is_weak, scalar_dtype

Schedule = Callable[[Any], Any]


class NadamState(NamedTuple):
    """State with a finite ``momentum_decay``: that of optax, and the momentum product.

    Attributes:
        count: int32, updates so far.
        mu: First moments, not bias-corrected; a tree like the parameters.
        nu: Second moments, likewise.
        mu_product: Product of the momenta of all updates so far.
    """

    count: Any
    mu: Any
    nu: Any
    mu_product: Any


@known_arguments()
def nadam(
    learning_rate: ArrayLike | Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    momentum_decay: ArrayLike | None = None,
    bias_correction: BiasCorrection = "nadam",
) -> optax.GradientTransformationExtraArgs:
    """Nadam in the place of `optax.nadam`: the same arguments, numbers and state.

    Arithmetic is in float32, float64 for float64 parameters; so are the moments, unless ``mu_dtype`` is given. Complex
    parameters have a complex first moment, and a second moment of |gradient|**2.

    Args:
        learning_rate: A number >= 0, or a schedule: a function of the number of updates so far.
        b1: Decay rate of the first moment, in [0, 1).
        b2: Decay rate of the second moment, in [0, 1).
        eps: Added outside the square root, >= 0.
        eps_root: Added inside the square root, >= 0; above 0, the update can be differentiated where gradients are 0.
        mu_dtype: dtype of the first moments; None for that of the arithmetic. Those of complex parameters stay complex.
        momentum_decay: How fast the momentum warms up, >= 0: 0.004 is PyTorch's, 1 is Keras's. None or infinity, not at
            all, is optax's; the state is then optax's own, `optax.ScaleByAdamState`, and else `NadamState`.
        bias_correction: "nadam" divides the momentum term by one minus the momentum product of the next step, "adam" by
            that of this step, as AlgoPerf's NadamW.

    Returns:
        A transformation whose updates are of the dtype of parameters and gradients together.

    Raises:
        ValueError: A number out of its range; it is named, with what is allowed. One that is only computed within a
            compiled step, as by a schedule, makes all updates NaN instead.
        TypeError: Parameters that are neither real nor complex floating-point numbers, at ``init``.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = nadam(0.5)
        >>> params = {"w": jnp.ones(2)}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"w": jnp.ones(2)}, state, params)
        >>> [round(float(update), 4) for update in updates["w"]]
        [-0.7368, -0.7368]

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam.
    """
    scaled = _Scaled(b1, b2, eps, eps_root, mu_dtype, momentum_decay, bias_correction)
    return _transformation(scaled, _Rate("learning_rate", learning_rate), None, None)


@known_arguments()
def nadamw(
    learning_rate: ArrayLike | Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike | Schedule = 1e-4,
    mask: Any = None,
    *,
    momentum_decay: ArrayLike | None = None,
    bias_correction: BiasCorrection = "nadam",
) -> optax.GradientTransformationExtraArgs:
    """`nadam` with decoupled weight decay, in the place of `optax.nadamw`.

    Args:
        learning_rate: As of `nadam`, as are those that follow.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added outside the square root.
        eps_root: Added inside the square root.
        mu_dtype: dtype of the first moments.
        weight_decay: A number >= 0, or a schedule: learning_rate * weight_decay of each parameter goes at each update.
        mask: Which parameters decay: a tree of bools like the parameters or a prefix of it, or a function that gives
            one; None for all.
        momentum_decay: How fast the momentum warms up.
        bias_correction: "adam" for AlgoPerf's NadamW.

    Raises:
        ValueError: A number out of its range; an update without ``params``.
        TypeError: As of `nadam`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = jnp.full(2, 8.0)
        >>> optimizer = nadamw(0.5, weight_decay=0.25)
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> updates.tolist()
        [-1.0, -1.0]
    """
    scaled = _Scaled(b1, b2, eps, eps_root, mu_dtype, momentum_decay, bias_correction)
    return _transformation(scaled, _Rate("learning_rate", learning_rate), _Rate("weight_decay", weight_decay), mask)


class _Rate:
    """A number or a schedule, checked; its state as optax keeps that of the transformation which applies it."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value if callable(value) else number(name, value)
        # A tracer is an argument of the function that is being compiled, so it may be used as it is.
        self.given = value

    def at(self, state: Any, updates: Any) -> Any:
        """The value at an update, by the count in a state of optax's; before optax 0.2.6 decay has none there."""
        if not callable(self._value):
            return self._value
        return number(self._name, self._value(*(jax.tree.leaves(state) or [updates])))


class _Scaled:
    """The hyperparameters of the rule and their checks; the scalars of a step."""

    def __init__(
        self, b1: Any, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, momentum_decay: Any, bias_correction: str
    ) -> None:
        self.b1, self.b2 = number("b1", b1), number("b2", b2)
        self.eps, self.eps_root = number("eps", eps), number("eps_root", eps_root)
        self.momentum_decay = inf if momentum_decay is None else number("momentum_decay", momentum_decay)
        self.adam_correction = one_of(BIAS_CORRECTIONS, "bias_correction", bias_correction) == "adam"
        self.mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)
        if self.mu_dtype is not None and not jnp.issubdtype(self.mu_dtype, jnp.inexact):
            raise TypeError(f"mu_dtype={mu_dtype!r}: expected a floating-point or complex dtype, or None")
        # Not known to be infinite before a program is compiled: then it may be anything.
        known = momentum_decay is None or isinstance(momentum_decay, (int, float, np.number))
        self.tracks_product = not (known and self.momentum_decay == inf)

    def new_state(self, params: Any) -> Any:
        """Before the first update."""
        check_trainable(params, or_complex=True)

        def zeros(leaf: Any, dtype: Any = None) -> Any:
            wanted = compute_dtype(leaf)
            if dtype is not None:  # a real dtype would lose the imaginary part, and a complex one keep nothing in it
                wanted = np.promote_types(dtype, "complex64") if wanted.kind == "c" else jnp.finfo(dtype).dtype
            return jnp.zeros_like(leaf, dtype=None if wanted == dtype_of(leaf) else wanted)

        mu, nu = jax.tree.map(partial(zeros, dtype=self.mu_dtype), params), jax.tree.map(zeros, params)
        state = {"count": beside(params, jnp.zeros((), jnp.int32)), "mu": mu, "nu": nu}
        if not self.tracks_product:
            return optax.ScaleByAdamState(**state)
        return NadamState(**state, mu_product=beside(params, jnp.ones((), scalar_dtype())))

    def scalars(self, state: Any, rate: Any, decay: Any) -> tuple[list[Any], Any]:
        """This update's scalars for the rule, with eps_root and decay at the end; and the new momentum product."""
        dtype = scalar_dtype()
        t = XP.cast(state.count, dtype)
        b1, b2, eps, eps_root, momentum_decay = (
            value if isinstance(value, float) else scalar(XP, value, dtype)
            for value in (self.b1, self.b2, self.eps, self.eps_root, self.momentum_decay)
        )
        if self.tracks_product:
            product = scalar(XP, state.mu_product, dtype)
        else:
            product = jnp.where(t > 0, scalar(XP, b1, dtype) ** t, jnp.ones_like(t))
        rate = scalar(XP, rate, dtype)
        c, product = mathematics(XP).coefficients(
            t + 1.0,
            lr=rate,
            beta1=b1,
            beta2=b2,
            eps=1.0,  # which gives the root of the second moment's bias correction
            momentum_decay=momentum_decay,
            momentum_product=product,
            adam_correction=self.adam_correction,
        )
        root = scalar(XP, c.eps, dtype)
        eps = mathematics(XP).clamp_eps(eps, root * eps, SMALLEST_NORMAL[dtype])
        rest = [eps, root * root * eps_root, rate * scalar(XP, 0.0 if decay is None else decay, dtype)]
        return list(lax.optimization_barrier([scalar(XP, value, dtype) for value in (*c[:-1], *rest)])), product

    def rule(self, offset: Any, exp_avg_sq: Any = None) -> Callable[..., Any]:
        """The rule with a number added inside its square root, which may be that of a given second moment."""
        if exp_avg_sq is not None:
            return rebind(rule.update, sqrt=lambda _: jnp.sqrt(exp_avg_sq + offset))
        if isinstance(self.eps_root, float) and not self.eps_root:
            return mathematics(XP).update
        return rebind(rule.update, sqrt=lambda value: jnp.sqrt(value + offset))


def _transformation(
    scaled: _Scaled, rate: _Rate, decay: _Rate | None, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """States are those of optax's chain: the moments; what decay counts, where there is any; what the rate counts."""
    parts = [optax.scale_by_learning_rate(rate.given)]
    if decay is not None:
        parts = [optax.add_decayed_weights(decay.given, mask), *parts]

    def init(params: Any) -> tuple[Any, ...]:
        if decay is not None:
            chosen(mask, params, jax.tree.structure(params))
        return scaled.new_state(params), *(beside(params, part.init(params)) for part in parts)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, tuple[Any, ...]]:
        moments, *counts = _checked(state, scaled.tracks_product, len(parts))
        if decay is not None and params is None:
            raise ValueError("params: weight decay needs them: update(updates, state, params)")
        grads, treedef = jax.tree.flatten(updates)
        mus = alike("the optimizer's state (mu)", moments.mu, "updates", treedef, grads)
        nus = alike("the optimizer's state (nu)", moments.nu, "updates", treedef, grads)
        check_floating("updates", grads, mus, nus)
        owned = [None] * len(grads) if params is None else alike("params", params, "updates", treedef, grads)
        decays = [False] * len(grads) if decay is None else chosen(mask, params, treedef)
        weight = None if decay is None else decay.at(counts[0], moments.count)
        values, product = scaled.scalars(moments, rate.at(counts[-1], moments.count), weight)
        made = [_leaf(scaled, values, *each) for each in zip(grads, mus, nus, owned, decays, strict=True)]
        new = [treedef.unflatten(column) for column in (zip(*made, strict=True) if made else ((), (), ()))]
        fields = {"count": optax.safe_increment(moments.count), "mu": new[1], "nu": new[2]}
        if scaled.tracks_product:
            fields["mu_product"] = product.astype(moments.mu_product.dtype)
        # All that these states hold is how often they were used.
        advanced = [jax.tree.map(optax.safe_increment, count) for count in counts]
        return new[0], (moments._replace(**fields), *advanced)

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(state: Any, tracks_product: bool, others: int) -> Any:
    """A state, checked to be one of such a transformation."""
    kind = NadamState if tracks_product else optax.ScaleByAdamState
    if (
        not isinstance(state, tuple)
        or len(state) != 1 + others
        or set(getattr(state[0], "_fields", ())) != {*kind._fields}
    ):
        found = type(state).__name__ if not isinstance(state, tuple) else [type(part).__name__ for part in state]
        raise ValueError(f"the optimizer's state: {found}, expected {kind.__name__} and {others} more, as of init")
    return state


def _leaf(
    scaled: _Scaled, values: Sequence[Any], grad: Any, mu: Any, nu: Any, param: Any, decays: bool
) -> tuple[Any, Any, Any]:
    """One parameter's update and new moments.

    A complex one is two real ones with a common second moment. The averages of their squares begin with its two parts,
    of which the imaginary one is 0; the sum of both is that of |gradient|**2.
    """
    whole, is_complex = dtype_of(nu), dtype_of(nu).kind == "c"
    own = np.dtype(jnp.finfo(whole).dtype).name
    *scalars, eps, offset, decay = values
    *scalars, offset, decay = (value.astype(own) for value in (*scalars, eps_in(XP, eps, own), offset, decay))
    leaves = [XP.cast(leaf, whole.name) for leaf in ((grad, mu, nu, param) if decays else (grad, mu, nu))]

    def advanced(update_rule: Callable[..., Any], grad: Any, mu: Any, nu: Any, *param: Any) -> tuple[Any, Any, Any]:
        update, mu, nu = update_rule(0.0, grad, mu, nu, 0.0, *scalars)
        return mathematics(XP).coupled(update, *param, -decay) if decays else update, mu, nu

    if is_complex:
        parts = [leaf.real for leaf in leaves], [leaf.imag for leaf in leaves]
        real, imag = (advanced(scaled.rule(offset), *part)[2] for part in parts)
        new_nu = real + imag
        update, new_mu, _ = map(lax.complex, *(advanced(scaled.rule(offset, new_nu), *part) for part in parts))
    else:
        update, new_mu, new_nu = advanced(scaled.rule(offset), *leaves)
    given = [grad] if param is None else [grad, param]
    dtype = dtype_of(grad) if param is None else np.promote_types(dtype_of(grad), dtype_of(param))
    if is_complex:
        dtype = np.promote_types(dtype, "complex64")  # of a real gradient, without params
    weak = all(is_weak(leaf) for leaf in given)
    return (
        as_type(update, dtype, weak),
        as_type(new_mu, dtype_of(mu), is_weak(mu)),
        as_type(new_nu, dtype_of(nu), is_weak(nu)),
    )
