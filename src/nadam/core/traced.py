"""What one call does, as in `core.step`, for array libraries whose compiler sees whole programs (JAX, TensorFlow).

There the number of the step and its scalars may be traced, nothing is written through a pointer, and what a call does
is decided inside the compiled program. So these are pure functions, and `call` chooses between them with the control
flow that it is given. ``xp`` is the library's namespace with the names of `keras.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nadam.core.dtypes import SHRINK, SMALLEST_NORMAL
from nadam.core.element import Flags
from nadam.core.gradient import Check, largest_passing
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.core.library import mathematics
from nadam.core.rounding import hash32, step_key
from nadam.core.scalars import Scalars

Array = Any
When = Callable[[Any, Callable[[Any, Any], Any], Any], Any]


class Tensor(NamedTuple):
    """One parameter with its state; moments, average and accumulator have the dtype that the rule computes in.

    But where there are scales the moments are codes of 8 bits (compressed.py).
    """

    param: Array
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None
    accumulator: Array | None
    exp_avg_scale: Array | None = None
    exp_avg_sq_scale: Array | None = None

    @property
    def compute_dtype(self) -> str:
        """What the rule computes in."""
        return dtype_of(self.exp_avg) if self.exp_avg_scale is None else "float32"


class ParamInfo(NamedTuple):
    """What is known of a parameter before the program is compiled."""

    decays: bool
    constraint: Callable[[Array], Array] | None
    layer: int = 0  # in the order of the forward pass: gradients come in the reverse order


Grads = Sequence[Array | None]  # with accumulation None for a tensor that has no gradient in a call
Infos = Sequence[ParamInfo]


class Progress(NamedTuple):
    """The state of a run: calls that were not skipped, momentum product in the dtype of the scalars, tensors."""

    calls: Array
    product: Array
    tensors: list[Tensor]


class Measured(NamedTuple):
    """What a call saw: norm and clip factor where norms are taken, 0 in a call without."""

    grad_norm: Array | None
    clip_factor: Array | None
    skipped: Array | bool


class Outcome(NamedTuple):
    """What an update gives; norm and clip factor are 0 where no norms are taken."""

    tensors: list[Tensor]
    momentum_product: Array
    grad_norm: Array
    clip_factor: Array


class Pass(NamedTuple):
    """What the one pass of an update takes besides parameters and state."""

    gradients: Grads  # as `update` takes them
    whole: Sequence[Array]  # the same, unscaled where there are accumulators, with those added
    scalars: Scalars  # 0-d, of the dtype of the momentum product
    factors: list[Array]  # what multiplies the gradients; one for all, or one each
    flags: Flags
    early: bool  # whether nothing has asked for all gradients together: each is needed only where it is used
    step_key: Array | None = None  # of stochastic rounding, where there are scales

    def keys(self, members: Sequence[int]) -> Array:
        """The keys of these tensors, uint32."""
        return hash32(np.array(members, np.uint32), self.step_key)

    def factor(self, i: int) -> Array:
        """What multiplies one gradient."""
        return self.factors[i if len(self.factors) > 1 else 0]

    def scalars_in(self, xp: Any, dtype: str) -> Scalars:
        """The scalars for tensors that are computed in a dtype, not yet cast to it."""
        return self.scalars._replace(eps=eps_in(xp, self.scalars.eps, dtype))


OnePass = Callable[[Pass, Sequence[Tensor], Infos], dict[int, Tensor]]


class Means(NamedTuple):
    """How a library's compiler does what differs from one to another.

    Attributes:
        when: (condition, function, carry) -> ``function(carry, running)`` where the condition holds, else ``carry``;
            ``running`` is true inside, and not known to the compiler.
        barrier: Gives scalars as they are, computed once and not for each element.
        one_pass: What a kernel makes of which tensors, accumulators cleared; the compiler makes loops for others.
        measure: (tensors, gradients, inv_scale, accumulated, check) -> norms and whether all values pass, by a kernel;
            None where it cannot.
        cleared: A tensor after the update by loops, with its accumulator at zero.
        widened: A tensor with moments of 8 bits with them in float32.
        narrowed: (old tensor, new one, key) -> the new one with its moments in 8 bits again.
    """

    when: When
    barrier: Callable[[list[Any]], Sequence[Any]] = list
    one_pass: OnePass = lambda *_: {}
    measure: Callable[..., tuple[Array, Array] | None] = lambda *_: None
    cleared: Callable[[Tensor, Any], Tensor] = lambda tensor, _: tensor
    widened: Callable[[Tensor], Tensor] = lambda tensor: tensor
    narrowed: Callable[[Tensor, Tensor, Array], Tensor] = lambda _, tensor, key: tensor


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


def call(
    xp: Any,
    h: Hyperparameters,
    infos: Infos,
    means: Means,
    before: Progress,
    grads: Grads,
    now: Now,
    inv_scale: Any,
    seed: int = 0,
) -> tuple[Progress, Measured]:
    """One call: an update, or one more gradient for the accumulators.

    Constants among ``now`` are Python's floats, from which 1 - beta is computed in float64. ``seed`` is that of
    stochastic rounding.
    """
    steps, (calls, product, tensors) = h.gradient_accumulation_steps, before
    given = [i for i, grad in enumerate(grads) if grad is not None]
    check, complete = h.check(), len(given) == len(grads)
    checked = check is not Check.NOTHING
    passed, norms, found = True, None, None
    if complete and (checked or (h.measures_norm and not steps)):
        found = means.measure(tensors, grads, inv_scale, False, check)
        norms = None if found is None or steps else found[0]
    if checked:
        chosen = [grads[i] for i in given], [tensors[i] for i in given]
        passed = usable(xp, *chosen, inv_scale, check) if found is None else found[1]
    accumulates, updates = decided(h, calls, passed)
    if steps:

        def accumulate(accumulators: list[Array], _: Any) -> list[Array]:
            pairs = zip(given, accumulators, strict=True)
            return [kept + unscaled(xp, grads[i], kept, inv_scale) for i, kept in pairs]

        # Only what changes goes through the condition.
        added = means.when(accumulates, accumulate, [tensors[i].accumulator for i in given])
        tensors = list(tensors)
        for i, accumulator in zip(given, added, strict=True):
            tensors[i] = tensors[i]._replace(accumulator=accumulator)

    def updated_state(old: Outcome, running: Any) -> Outcome:
        taken = norms
        if steps and h.measures_norm and complete:
            taken = (means.measure(old.tensors, grads, inv_scale, True, Check.NOTHING) or (None,))[0]
        state = calls // (steps or 1), old.momentum_product, old.tensors
        before = Progress(*state)
        return update(xp, h, infos, means, before, grads, now, inv_scale, norms=taken, running=running, seed=seed)

    begin = Outcome(tensors, product, *[xp.zeros_like(product)] * 2)
    tensors, product, *seen = means.when(updates, updated_state, begin)
    progress = Progress(calls + (xp.where(passed, 1, 0) if checked else 1), product, tensors)
    norm, factor = seen
    skipped = ~passed if checked else False
    return progress, Measured(norm if h.measures_norm else None, factor if h.clips_by_norm else None, skipped)


def decided(h: Hyperparameters, calls: Any, passed: Any) -> tuple[Any, Any]:
    """Whether a call, after so many, only accumulates and whether it updates: neither where its check fails."""
    if h.gradient_accumulation_steps is None:
        return False, passed
    ends = (calls + 1) % h.gradient_accumulation_steps == 0
    return ~ends & passed, ends & passed


def usable(xp: Any, grads: Sequence[Array], tensors: Sequence[Tensor], inv_scale: Any, check: Check) -> Array:
    """Whether all values of all gradients pass a check."""
    passed = []
    for grad, tensor in zip(grads, tensors, strict=True):
        dtype = tensor.compute_dtype
        magnitudes = xp.abs(xp.cast(grad, dtype) * scalar(xp, inv_scale, dtype))
        passed.append(xp.all(magnitudes <= largest_passing(dtype, check)))
    return xp.all(xp.stack(passed)) if passed else xp.convert_to_tensor(True, dtype="bool")


def unscaled(xp: Any, grad: Array, like: Array, inv_scale: Any) -> Array:
    """A gradient times a number, in the dtype of its accumulator."""
    wide = xp.cast(grad, dtype_of(like))
    return wide if isinstance(inv_scale, float) and inv_scale == 1.0 else wide * scalar(xp, inv_scale, dtype_of(like))


def update(
    xp: Any,
    h: Hyperparameters,
    infos: Infos,
    means: Means,
    before: Progress,
    grads: Grads,
    now: Now,
    inv_scale: Any,
    *,
    norms: Array | None = None,
    running: Any = True,
    seed: int = 0,
) -> Outcome:
    """One update; the arguments are those of `call`, but ``before`` counts updates. ``norms``: where they are known."""
    m, steps, (updates, momentum_product, tensors) = mathematics(xp), h.gradient_accumulation_steps, before
    dtype = dtype_of(momentum_product)
    spread = 1.0 / steps if steps else inv_scale
    whole = summed(xp, tensors, grads, inv_scale)
    factors, grad_norm, factor = [spread], *[xp.zeros_like(momentum_product)] * 2
    if h.measures_norm:  # a kernel takes them in float32, whatever the scalars are computed in
        taken = norms_of(xp, whole, dtype) if norms is None else xp.cast(norms, dtype)
        factors, grad_norm, factor = _clip_factors(xp, h, taken * spread, len(whole), spread)
    betas = (beta if isinstance(beta, float) else scalar(xp, beta, dtype) for beta in (now.beta1, now.beta2))
    settings = h.settings(Now(scalar(xp, now.lr, dtype), *betas))
    settings = settings._replace(ema_momentum=scalar(xp, h.ema_momentum, dtype))
    t = xp.cast(updates, dtype) + 1.0
    s, product = m.scalars(settings, updates + 1, t, momentum_product, inv_scale, SMALLEST_NORMAL[dtype])
    early = not (h.measures_norm or h.skip_nonfinite or steps)
    common = list(means.barrier([scalar(xp, value, dtype) for value in (*s, *factors)]))
    everything = Pass(grads, whole, Scalars._make(common[: len(s)]), common[len(s) :], h.flags, early)
    if any(tensor.exp_avg_scale is not None for tensor in tensors):
        (key,) = means.barrier([step_key(seed, updates + 1)])
        everything = everything._replace(step_key=key)
    done = means.one_pass(everything, tensors, infos)
    new = []
    for i, (tensor, info) in enumerate(zip(tensors, infos, strict=True)):
        if i in done:
            result = done[i]
        elif tensor.exp_avg_scale is None:
            result = updated(xp, h, everything, i, tensor, info)
        else:
            wide = updated(xp, h, everything, i, means.widened(tensor), info)
            result = means.narrowed(tensor, wide, everything.keys([i]))
        if grads[i] is None:  # it moves if it had a gradient earlier in this window
            seen = xp.any(tensor.accumulator != 0)
            pairs = zip(result._replace(accumulator=None), tensor, strict=True)
            kept = Tensor._make(None if new is None else xp.where(seen, new, old) for new, old in pairs)
            result = kept._replace(accumulator=tensor.accumulator)
        new.append(means.cleared(result, running) if steps and i not in done else result)
    return Outcome(new, product, grad_norm, factor)


def updated(xp: Any, h: Hyperparameters, everything: Pass, i: int, tensor: Tensor, info: ParamInfo) -> Tensor:
    """One tensor after the rule, its constraint and its average, which the compiler makes loops of."""
    m = mathematics(xp)
    # A value for each dtype that is computed in: a float64 scalar would widen a float32 tensor.
    own, kept = dtype_of(tensor.exp_avg), dtype_of(tensor.param)
    s = Scalars._make(xp.cast(value, own) for value in everything.scalars_in(xp, own))
    constraint = info.constraint

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
        s.decay if info.decays and h.weight_decay else 0.0,
        s,
        *h.flags._replace(accumulated=False),  # the norm has asked for the sum already
    )
    return Tensor(xp.cast(param, kept), exp_avg, exp_avg_sq, ema, tensor.accumulator)


def summed(xp: Any, tensors: Sequence[Tensor], grads: Grads, inv_scale: Any) -> list[Array]:
    """Gradients in the dtype that is computed in, with their accumulators; without one, not unscaled."""
    gradients = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if tensor.accumulator is None:
            gradients.append(xp.cast(grad, tensor.compute_dtype))
        elif grad is None:
            gradients.append(tensor.accumulator)
        else:
            gradients.append(tensor.accumulator + unscaled(xp, grad, tensor.accumulator, inv_scale))
    return gradients


def _clip_factors(xp: Any, h: Hyperparameters, norms: Array, count: int, spread: Any) -> tuple[list[Any], Array, Array]:
    """What multiplies the gradients, one for all or one each; the norm of all together; the (smallest) clip factor."""
    m = mathematics(xp)
    largest = xp.max(norms)
    relative = norms / xp.maximum(largest, 2.0**-126)
    total = largest * xp.sqrt(xp.sum(relative * relative))
    if h.global_clipnorm is not None:
        factor = m.global_clip_factor(total, h.global_clipnorm)
        return [factor * spread], total, factor
    if h.clipnorm is None:
        return [spread], total, xp.zeros_like(total)
    factors = m.clip_factor(norms, h.clipnorm)
    return [factors[i] * spread for i in range(count)], total, xp.min(factors)


def norms_of(
    xp: Any, gradients: Sequence[Array], dtype: str, sum_of_squares: Callable[[Array], Array] | None = None
) -> Array:
    """The norm of each, finite where its values are: one pass, and another after an overflow.

    ``sum_of_squares`` is a library's own that reads an array only once.
    """

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
