"""`fused`: the whole of a call as one function of gradients, state and parameters, with no tree of updates between."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple, NoReturn

import jax
import optax
from jax import numpy as jnp
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from nadam.core.compressed import check_state_options
from nadam.core.config import hyperparameters
from nadam.core.hyperparameters import BiasCorrection, Hyperparameters, Now, current
from nadam.core.names import known_arguments
from nadam.core.step import StepReport
from nadam.core.traced import ParamInfo, Progress, Tensor, call
from nadam.jax.checks import SPELLING, alike, check_floating, check_trainable, number
from nadam.jax.fused_state import LAST_COUNT, LIKE_PARAMS, SCALES, FusedState, check_state, columns, new_state
from nadam.jax.step import XP, is_traced, means
from nadam.jax.trees import as_type, chosen, dtype_of, is_weak, layers
from nadam.kernels.xla import ffi

WORTH_A_WARNING = 1 << 20  # elements that are copied at each step
PARTS = (*LIKE_PARAMS, *SCALES)


class Fused(NamedTuple):
    """An optimizer as functions without side effects.

    Attributes:
        init: params -> state.
        step: (grads, state, params, *, learning_rate=None, loss_scale=None) -> (params, state). In a compiled
            function that takes params and state, donated, in the order in which it returns them, nothing is copied.
            ``learning_rate`` takes the place of the one that was set; the gradients are divided by ``loss_scale``.
        finalize: (state, params) -> params: their moving averages, with ``use_ema``.
        settings: What it was made with, checked.
        mask: Which parameters decay, as it was given.
        state_bits: How moments are kept, likewise.
        seed: Of their rounding, likewise.
    """

    init: Callable[[Any], FusedState]
    step: Callable[..., tuple[Any, FusedState]]
    finalize: Callable[[FusedState, Any], Any]
    settings: Hyperparameters
    mask: Any
    state_bits: int | None = None
    seed: int = 0

    @property
    def update(self) -> NoReturn:
        """Not there, since what asks for it expects updates and adds them to the parameters.

        Raises:
            AttributeError: Always; it says what there is instead.
        """
        raise AttributeError(
            "fused has no update, since it gives parameters and not updates: call step(grads, state, params), or where "
            "the two phases of optax are expected, as in optax.chain, Flax or Equinox, hand over fused(...).as_optax()"
        )

    def as_optax(self) -> Any:
        """The same steps in the two phases of optax: for its wrappers, Flax's TrainState and nnx.Optimizer, Equinox.

        Costs a tree of updates, and the passes over memory that make and apply it. In a chain it goes last: averages
        are those of the parameters as it leaves them.

        Returns:
            An `optax.GradientTransformationExtraArgs` with the state of `fused`. The updates have the parameters'
            dtypes. `optax.apply_updates` gives the parameters that `step` gives: exactly, where one keeps its sign and
            at most doubles or halves, else within a unit in the last place of the larger of old and new.
            ``learning_rate`` and ``loss_scale`` are extra arguments of ``update``.

        Example:
            >>> import jax.numpy as jnp, optax
            >>> params = {"w": jnp.ones(2)}
            >>> optimizer = optax.chain(optax.zero_nans(), fused(0.5).as_optax())
            >>> updates, _ = optimizer.update({"w": jnp.full(2, 3.0)}, optimizer.init(params), params)
            >>> [round(float(x), 4) for x in optax.apply_updates(params, updates)["w"]]
            [0.2632, 0.2632]
        """

        def update(
            updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, loss_scale: Any = None, **_: Any
        ) -> tuple[Any, Any]:
            if params is None:
                raise ValueError("params: fused needs them: update(updates, state, params)")
            new, state = self.step(updates, state, params, learning_rate=learning_rate, loss_scale=loss_scale)
            return jax.tree.map(jnp.subtract, new, params), state

        return optax.GradientTransformationExtraArgs(self.init, update)


@known_arguments()
def fused(
    learning_rate: ArrayLike | Callable[..., Any],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    momentum_decay: float | None = None,
    bias_correction: BiasCorrection = "nadam",
    weight_decay: float | None = None,
    mask: Any = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    gradient_accumulation_steps: int | None = None,
    skip_nonfinite: bool = False,
    track_grad_norm: bool = False,
    state_bits: int | None = None,
    seed: int = 0,
) -> Fused:
    """Nadam as one function ``(grads, state, params) -> (params, state)``, from the loss scale to the moving average.

    On a single CPU a compiled call is one pass over memory, by the kernel that the other hosts have; elsewhere XLA
    makes loops. Arithmetic, moments and averages are float32, float64 for float64 parameters.

    Args:
        learning_rate: A number >= 0, or a schedule: a function of the number of calls so far, or of nothing.
        b1: Decay rate of the first moment, in [0, 1).
        b2: Decay rate of the second moment, in [0, 1).
        eps: Added outside the square root, >= 0.
        momentum_decay: How fast the momentum warms up, >= 0: 0.004 is PyTorch's, 1 is Keras's; None or infinity, not at
            all, is optax's.
        bias_correction: "nadam" divides the momentum term by one minus the momentum product of the next step, "adam" by
            that of this step, as AlgoPerf's NadamW.
        weight_decay: learning_rate * weight_decay of each parameter goes at each update, >= 0; None for none.
        mask: Which parameters decay: a tree of bools like the parameters or a prefix of it, or a function that gives
            one; None for all.
        clipnorm: Largest norm of each gradient, > 0. At most one of the three clips is set.
        clipvalue: Largest magnitude of each element of a gradient, > 0.
        global_clipnorm: Largest norm of all gradients together, > 0.
        use_ema: Whether to keep a moving average of the parameters.
        ema_momentum: Share of the old average that is kept, in [0, 1].
        ema_overwrite_frequency: Every so many updates the parameters take their averages; None for never.
        gradient_accumulation_steps: An update every so many calls, with the mean of the gradients; at least 2, or None.
        skip_nonfinite: Whether a call whose gradients hold NaN, infinity or a value whose square overflows changes
            nothing but the number of skipped calls.
        track_grad_norm: Whether ``last_step`` has the norm of all gradients also without clipping, for one more read of
            them.
        state_bits: 8 to keep both moments of each parameter of at least 4,096 elements, none of float64, in a byte
            each, with a byte more for each 32 (core/compressed.py), stochastically rounded; None for the dtype that is
            computed in.
        seed: Of that rounding, ``0 <= seed < 2**32``; it also depends on the step, so a resumed run goes on alike.

    Returns:
        Its functions.

    Raises:
        ValueError: A number out of its range, or two clips; it is named, with what is allowed. A learning rate or loss
            scale that is only computed within a compiled step makes all parameters NaN instead. At a step: trees
            or shapes that do not belong together.
        TypeError: A value that is not a number; parameters that are not real floating-point numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = fused(0.5, global_clipnorm=1.0)
        >>> params = {"w": jnp.ones(2)}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.step({"w": jnp.full(2, 3.0)}, state, params)
        >>> round(float(state.last_step.grad_norm), 3), [round(float(x), 4) for x in params["w"]]
        (4.243, [0.2632, 0.2632])

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam.
    """
    use_ema, skip_nonfinite, track_grad_norm = map(bool, (use_ema, skip_nonfinite, track_grad_norm))
    momentum_decay = float("inf") if momentum_decay is None else momentum_decay
    h = hyperparameters(locals(), SPELLING)
    check_state_options(state_bits, seed)
    for name, value in (("b1", b1), ("b2", b2)):
        if callable(value):
            raise TypeError(f"{name}={value!r}: expected a number")
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def step(
        grads: Any, state: FusedState, params: Any, *, learning_rate: Any = None, loss_scale: Any = None
    ) -> tuple[Any, FusedState]:
        leaves, treedef = jax.tree.flatten(params)
        # Called by JAX itself, `step` is what is compiled, and not a function around it.
        is_compiled = str(sys._getframe(1).f_globals.get("__name__")).startswith("jax.")
        if is_compiled and is_traced(leaves) and sum(map(jnp.size, leaves)) >= WORTH_A_WARNING:
            warn_of_order()
        check_trainable(params)
        check_state(h, state)
        given = alike("grads", grads, "params", treedef, leaves)
        check_floating("grads", given)
        fields, absent = columns(state, state_bits, params, treedef, leaves), [None] * len(leaves)
        rate = number("learning_rate", current(h.lr, state.count) if learning_rate is None else learning_rate)
        inv_scale = 1.0 if loss_scale is None else 1.0 / number("loss_scale", loss_scale)
        known = treedef, *chosen(mask, params, treedef)
        if known not in programs:
            programs[known] = _program(h, list(map(ParamInfo, known[1:], repeat(None), layers(params))), seed)
        tensors = list(map(Tensor, leaves, *(fields.get(name, absent) for name in PARTS)))
        before = Progress(state.count, state.mu_product, tensors)
        after, beyond, seen = programs[known](before, state.beyond, state.last_step, given, rate, inv_scale)
        new = [treedef.unflatten(column) for column in zip(*after.tensors, strict=True)] if leaves else [params] * 7
        kept = {name: tree for name, tree in zip(PARTS, new[1:], strict=True) if getattr(state, name) is not None}
        counters = {"count": after.calls, "mu_product": after.product, "last_step": seen, "beyond": beyond}
        return new[0], state._replace(**counters, **kept)

    def finalize(state: FusedState, params: Any) -> Any:
        if state.ema is None:
            raise RuntimeError("use_ema=False: there is no moving average")
        return jax.tree.map(lambda ema, param: as_type(ema, dtype_of(param), is_weak(param)), state.ema, params)

    return Fused(partial(new_state, h, state_bits), step, finalize, h, mask, state_bits, seed)


@cache
def warn_of_order() -> None:
    """That JAX pairs donated arrays with results in their order, which for `step` itself is not the same."""
    warnings.warn(
        "jax.jit(fused(...).step): where arguments are donated, XLA copies the state. Compile a function that takes "
        "params and state in the order in which it returns them: lambda params, state, g: step(g, state, params)",
        stacklevel=3,
    )


def _period(h: Hyperparameters) -> int:
    """The calls after which accumulation and overwriting are where they were."""
    steps = h.gradient_accumulation_steps or 1
    whole = steps * (h.ema_overwrite_frequency or 1)
    # Half of all that can be counted stays, for the bias corrections; what is overwritten that rarely is no longer.
    return whole if whole <= LAST_COUNT // 2 else steps


def _program(h: Hyperparameters, infos: list[ParamInfo], seed: int) -> Callable[..., Any]:
    """The call, by the kernels where they can be used; under vmap and grad by loops, which JAX can transform."""
    steps, period = h.gradient_accumulation_steps or 1, _period(h)

    def computed(kernels: bool, in_place: bool = True) -> Callable[..., Any]:
        def program(before: Progress, beyond: Any, last: StepReport, grads: Any, rate: Any, inv_scale: Any) -> Any:
            inv_scale, count = XP.cast(inv_scale, dtype_of(before.product).name), before.calls
            stays = count == LAST_COUNT
            before = before._replace(calls=jnp.where(stays, LAST_COUNT - period + beyond, count))
            now = Now(rate, h.beta1, h.beta2)
            given = means(kernels, in_place), before, grads, now, inv_scale
            after, (norm, factor, skipped) = call(XP, h, infos, *given, seed=seed)
            tensors = [_like(old, new) for old, new in zip(before.tensors, after.tensors, strict=True)]
            count += jnp.where(stays | skipped, 0, 1)
            beyond = (beyond + jnp.where(stays & ~jnp.asarray(skipped), 1, 0)) % period
            seen = StepReport(
                step=count // steps,
                learning_rate=XP.cast(rate, dtype_of(last.learning_rate).name),
                grad_norm=norm,
                clip_factor=factor,
                skipped_steps=last.skipped_steps + jnp.where(skipped, 1, 0),
                skipped=jnp.asarray(skipped),
            )
            return after._replace(calls=count, tensors=tensors), beyond, seen

        return program

    loops, differentiable = computed(kernels=False), computed(kernels=False, in_place=False)
    batched = custom_vmap(lambda *given: computed(ffi.usable())(*given))

    def by_loops(size: int, in_batched: Any, *given: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        made = jax.vmap(loops, in_axes=tuple(axes), axis_size=size)(*given)
        return made, jax.tree.map(lambda _: True, made)

    batched.def_vmap(by_loops)
    whole = jax.custom_jvp(lambda *given: batched(*given))
    whole.defjvp(lambda primals, tangents: jax.jvp(differentiable, primals, tangents))
    return jax.jit(whole)  # type: ignore[no-any-return]


def _like(old: Tensor, new: Tensor) -> Tensor:
    """The new values with the types of the old ones, so that a second call is the same program."""
    return Tensor._make(
        None if value is None else as_type(value, dtype_of(like), is_weak(like))
        for like, value in zip(old, new, strict=True)
    )
