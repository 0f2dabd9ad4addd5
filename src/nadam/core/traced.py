"""What one call does, as in `core.step`, for array libraries whose compiler sees whole programs (JAX, TensorFlow).

There the number of the step and its scalars may be traced, nothing is written through a pointer, and what a call does
is decided inside the compiled program. So these are pure functions, of one branch each; the host chooses between them
with its compiler's own control flow. ``xp`` is the library's namespace with the names of `keras.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nadam.core.coefficients import SMALLEST_NORMAL
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.scalars import Scalars
from nadam.kernels.arrays import mathematics

Array = Any
# Sums of squares that overflow are taken again of values times this: no square of a finite value overflows then.
SHRINK = {"float32": 2.0**-80, "float64": 2.0**-600}
LARGEST = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}


class Tensor(NamedTuple):
    """One parameter with its state; moments, average and accumulator have the dtype that the rule computes in."""

    param: Array
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None
    accumulator: Array | None


class Traits(NamedTuple):
    """What is known of a parameter before the program is compiled."""

    decays: bool
    constraint: Callable[[Array], Array] | None


class Outcome(NamedTuple):
    """What an update gives."""

    tensors: list[Tensor]
    momentum_product: Array
    grad_norm: Array | None
    clip_factor: Array | None


def dtype_of(array: Array) -> str:
    """An array's dtype by its name in any library."""
    return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]


def scalar(xp: Any, value: Any, dtype: str) -> Array:
    """A number or 0-d array as a 0-d array of a dtype; a number does not pass through another one."""
    if isinstance(value, (bool, int, float)):
        return xp.convert_to_tensor(value, dtype=dtype)
    return xp.cast(value, dtype)


def eps_in(xp: Any, eps: Array, dtype: str) -> Array:
    """The eps of a step for tensors that are computed in a dtype, not yet cast to it."""
    return eps if dtype_of(eps) == dtype else mathematics(xp).clamp_eps(eps, eps, SMALLEST_NORMAL[dtype])


def usable(xp: Any, grads: Sequence[Array], tensors: Sequence[Tensor], unscale: Any, check: Check) -> Array:
    """Whether all values of all gradients pass a check."""
    passed = []
    for grad, tensor in zip(grads, tensors, strict=True):
        dtype = dtype_of(tensor.exp_avg)
        magnitudes = xp.abs(xp.cast(grad, dtype) * scalar(xp, unscale, dtype))
        passed.append(xp.all(magnitudes <= largest_passing(dtype, check)))
    return xp.all(xp.stack(passed)) if passed else xp.convert_to_tensor(True, dtype="bool")


def largest_passing(dtype: str, check: Check) -> float:
    """The largest magnitude that passes a check."""
    return float(LARGEST[dtype] ** (0.5 if check is Check.SQUARES_FINITE else 1.0))


def unscaled(xp: Any, grad: Array, like: Array, unscale: Any) -> Array:
    """A gradient times a number, in the dtype of its accumulator."""
    wide = xp.cast(grad, dtype_of(like))
    return wide if isinstance(unscale, float) and unscale == 1.0 else wide * scalar(xp, unscale, dtype_of(like))


def accumulate(xp: Any, accumulators: Sequence[Array], grads: Sequence[Array], unscale: Any) -> list[Array]:
    """The accumulators with the unscaled gradients added."""
    return [
        accumulator + unscaled(xp, grad, accumulator, unscale)
        for accumulator, grad in zip(accumulators, grads, strict=True)
    ]


class Pass(NamedTuple):
    """What the one pass of an update takes besides parameters and state.

    Attributes:
        gradients: As `update` takes them; None for one that is missing.
        whole: The same, unscaled where there are accumulators, with those added.
        scalars: 0-d, of the dtype of the momentum product.
        factors: What multiplies the gradients; one for all, or one each.
    """

    gradients: Sequence[Array | None]
    whole: Sequence[Array]
    scalars: Scalars
    factors: list[Array]

    def factor(self, i: int) -> Array:
        """What multiplies one gradient."""
        return self.factors[i if len(self.factors) > 1 else 0]

    def scalars_in(self, xp: Any, dtype: str) -> Scalars:
        """The scalars for tensors that are computed in a dtype, not yet cast to it."""
        return self.scalars._replace(eps=eps_in(xp, self.scalars.eps, dtype))


def update(
    xp: Any,
    h: Hyperparameters,
    now: Now,
    updates: Any,
    momentum_product: Any,
    tensors: Sequence[Tensor],
    grads: Sequence[Array | None],
    traits: Sequence[Traits],
    *,
    unscale: Any,
    norms: Array | None = None,
    settle: Callable[[list[Any]], Sequence[Any]] = list,
    one_pass: Callable[[Hyperparameters, Pass, Sequence[Tensor], Sequence[Traits]], dict[int, Tensor]] | None = None,
) -> Outcome:
    """One update.

    Args:
        xp: The array library.
        h: What the user set.
        now: What of it this call uses; numbers or 0-d arrays.
        updates: Integer, updates before this one.
        momentum_product: Of those; 0-d, in the dtype in which the scalars are computed.
        tensors: Parameters and their state.
        grads: A gradient for each, scaled as delivered; None, with accumulation, for one that has none in this call.
        traits: What is known of each.
        unscale: What multiplies the gradients.
        norms: What `norms` gives, where a host has computed it already.
        settle: The compiler's barrier: gives scalars as they are, computed once and not for each element.
        one_pass: A kernel, and which tensors it has updated; for the others the compiler makes loops of the rule.

    Returns:
        The new tensors, accumulators not cleared (or by the kernel), and momentum product; norm and clip factor where
        clipping asked for them.
    """
    m = mathematics(xp)
    dtype = dtype_of(momentum_product)
    steps = h.gradient_accumulation_steps
    spread = 1.0 / steps if steps else unscale
    gradients = _gradients(xp, tensors, grads, unscale)
    factors, grad_norm, factor = [spread], None, None
    if clips_by_norm(h):
        taken = _norms(xp, gradients, dtype, None) if norms is None else norms
        factors, grad_norm, factor = _clip_factors(xp, h, taken * spread, len(gradients), spread)
    betas = (beta if isinstance(beta, float) else scalar(xp, beta, dtype) for beta in (now.beta1, now.beta2))
    settings = h.settings(Now(scalar(xp, now.lr, dtype), *betas))
    settings = settings._replace(ema_momentum=scalar(xp, h.ema_momentum, dtype))
    t = xp.cast(updates, dtype) + 1.0
    s, product = m.scalars(settings, updates + 1, t, momentum_product, unscale, SMALLEST_NORMAL[dtype])
    common = list(settle([scalar(xp, value, dtype) for value in (*s, *factors)]))
    everything = Pass(grads, gradients, Scalars._make(common[: len(s)]), common[len(s) :])
    done = {} if one_pass is None else one_pass(h, everything, tensors, traits)
    new = []
    for i, (tensor, trait) in enumerate(zip(tensors, traits, strict=True)):
        result = done[i] if i in done else updated(xp, h, everything, i, tensor, trait)
        new.append(result if grads[i] is not None else _where_seen(xp, result, tensor))
    return Outcome(new, product, grad_norm, factor)


def updated(xp: Any, h: Hyperparameters, everything: Pass, i: int, tensor: Tensor, trait: Traits) -> Tensor:
    """One tensor after the rule, its constraint and its average, which the compiler makes loops of."""
    m = mathematics(xp)
    # A value for each dtype that is computed in: a float64 scalar would widen a float32 tensor.
    own, kept = dtype_of(tensor.exp_avg), dtype_of(tensor.param)
    s = Scalars._make(xp.cast(value, own) for value in everything.scalars_in(xp, own))
    constraint = trait.constraint

    def stored(param: Array) -> Array:
        narrow = xp.cast(param, kept)
        return xp.cast(narrow if constraint is None else constraint(narrow), own)

    param, exp_avg, exp_avg_sq, ema = m.element(stored)(
        xp.cast(tensor.param, own),
        everything.whole[i],
        tensor.exp_avg,
        tensor.exp_avg_sq,
        tensor.ema,
        None,
        xp.cast(everything.factor(i), own),
        s.decay if trait.decays and h.weight_decay else 0.0,
        s,
        *h.flags._replace(accumulated=False),  # the norm has asked for the sum already
    )
    return Tensor(xp.cast(param, kept), exp_avg, exp_avg_sq, ema, tensor.accumulator)


def clips_by_norm(h: Hyperparameters) -> bool:
    """Whether an update needs the norms of the gradients."""
    return h.clipnorm is not None or h.global_clipnorm is not None


def norms(
    xp: Any,
    tensors: Sequence[Tensor],
    grads: Sequence[Array | None],
    dtype: str,
    *,
    unscale: Any,
    sum_of_squares: Callable[[Array], Array] | None = None,
) -> Array:
    """The norm of each gradient, with its accumulator, before the mean is taken; finite where its values are.

    One pass, and another only after an overflow.

    Args:
        xp: The array library.
        tensors: As of `update`, which takes norms of all of these.
        grads: As of `update`.
        dtype: Of the result.
        unscale: As of `update`.
        sum_of_squares: The library's own, where it has one that reads an array only once.
    """
    return _norms(xp, _gradients(xp, tensors, grads, unscale), dtype, sum_of_squares)


def _gradients(xp: Any, tensors: Sequence[Tensor], grads: Sequence[Array | None], unscale: Any) -> list[Array]:
    """Gradients in the dtype that is computed in, with their accumulators; without one, not unscaled."""
    gradients = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if tensor.accumulator is None:
            gradients.append(xp.cast(grad, dtype_of(tensor.exp_avg)))
        elif grad is None:
            gradients.append(tensor.accumulator)
        else:
            gradients.append(tensor.accumulator + unscaled(xp, grad, tensor.accumulator, unscale))
    return gradients


def _where_seen(xp: Any, new: Tensor, old: Tensor) -> Tensor:
    """The new values of a parameter without a gradient in this call, if it had one earlier in this window."""
    seen = xp.any(old.accumulator != 0)
    kept = [None if n is None else xp.where(seen, n, o) for n, o in zip(new[:4], old[:4], strict=True)]
    return Tensor._make([*kept, old.accumulator])


def _clip_factors(xp: Any, h: Hyperparameters, norms: Array, count: int, spread: Any) -> tuple[list[Any], Array, Array]:
    """What multiplies the gradients, one for all or one each; the norm of all together; the (smallest) clip factor."""
    m = mathematics(xp)
    largest = xp.max(norms)
    relative = norms / xp.maximum(largest, 2.0**-126)
    total = largest * xp.sqrt(xp.sum(relative * relative))
    if h.global_clipnorm is not None:
        factor = m.global_clip_factor(total, h.global_clipnorm)
        return [factor * spread], total, factor
    factors = m.clip_factor(norms, h.clipnorm)
    return [factors[i] * spread for i in range(count)], total, xp.min(factors)


def _norms(xp: Any, gradients: Sequence[Array], dtype: str, sum_of_squares: Callable[[Array], Array] | None) -> Array:
    def all_norms(shrink: bool) -> Array:
        made = []
        for grad in gradients:
            own = dtype_of(grad)
            g = grad * SHRINK[own] if shrink else grad
            norm = xp.sqrt(xp.sum(g * g) if sum_of_squares is None else sum_of_squares(g))
            made.append(xp.cast(norm / SHRINK[own] if shrink else norm, dtype))
        return xp.stack(made or [scalar(xp, 0.0, dtype)])  # of no gradients, 0

    plain = all_norms(shrink=False)
    return xp.cond(xp.all(xp.isfinite(plain)), lambda: plain, lambda: all_norms(shrink=True))
