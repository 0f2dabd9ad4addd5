"""Nadam for NumPy arrays: arrays in, arrays updated in place; the constructor and the methods of Keras."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.compressed import check_state_options
from nadam.core.config import Configured, hyperparameters
from nadam.core.exclusive import Exclusive, loading
from nadam.core.hyperparameters import BiasCorrection, current, is_schedule
from nadam.core.names import Closed, known_arguments
from nadam.core.schedules import LearningRateSchedule
from nadam.core.step import Bucket, StepReport, step
from nadam.numpy.parameters import Exclusion, Parameters

Number = float | Callable[[], float]


class Nadam(Configured, Closed):
    """Adam with Nesterov momentum for NumPy arrays, with the arguments, methods and numbers of keras.optimizers.Nadam.

        exp_avg    += (grad - exp_avg) * (1 - beta_1)
        exp_avg_sq += (grad**2 - exp_avg_sq) * (1 - beta_2)
        param      -= learning_rate * m_hat / (sqrt(exp_avg_sq / (1 - beta_2**t)) + epsilon)

    where ``m_hat`` looks one step ahead along the momentum, which warms up (core/scalars.py).

    Args:
        learning_rate: A number >= 0; a schedule, called with the number of calls so far; or a callable of no arguments.
        beta_1: Decay rate of the first moment, in [0, 1); or a callable of no arguments.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added outside the square root of the bias-corrected second moment, >= 0.
        weight_decay: Decoupled: ``param -= learning_rate * weight_decay * param`` before the step. None for none.
        clipnorm: Largest norm of each gradient, > 0. At most one of the three clips is set.
        clipvalue: Largest magnitude of each element of a gradient, > 0.
        global_clipnorm: Largest norm of all gradients together, > 0.
        use_ema: Whether to keep a moving average of the parameters.
        ema_momentum: Share of the old average that an update keeps, in [0, 1].
        ema_overwrite_frequency: Every so many updates the parameters take their averages; None for never.
        loss_scale_factor: What `scale_loss` multiplies by and a step divides the gradients by, > 0.
        gradient_accumulation_steps: Update at every so many calls, with the mean of their gradients; at least 2, or
            None.
        name: For `get_config`.
        momentum_decay: How fast the momentum warms up, >= 0: 1 is Keras, 0.004 PyTorch, infinity optax.
        bias_correction: "nadam" divides the momentum term by one minus the momentum product of the next step, "adam" by
            that of this step: with ``momentum_decay`` infinite that is the Nadam of AlgoPerf, timm and TensorFlow 1.
        skip_nonfinite: Whether a call with NaN, infinity or a value whose square overflows in the gradients changes
            nothing but ``last_step.skipped_steps``.
        track_grad_norm: Whether ``last_step`` has the norm of all gradients also without clipping, for one more read of
            them.
        state_bits: 8 to keep both moments of each float16 or float32 array of at least 4,096 elements in a byte each,
            with a byte more for each 32 (core/compressed.py), stochastically rounded; None for the dtype that is
            computed in.
        seed: Of that rounding, ``0 <= seed < 2**32``; it also depends on the step, so a resumed run goes on alike.

    Attributes:
        built: Whether the optimizer knows its arrays.

    Raises:
        ValueError: A value out of its range, two clips, or an unknown argument; it is named, with what is allowed.
        TypeError: A value that is not a number.
        AttributeError: Setting an attribute that it has not.

    Example:
        >>> weights = {"kernel": np.ones((2, 2)), "bias": np.zeros(2)}
        >>> optimizer = Nadam(0.1)
        >>> optimizer.apply({"kernel": np.ones((2, 2)), "bias": np.ones(2)}, weights)
        >>> weights["bias"].round(4).tolist()
        [-0.1063, -0.1063]

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam.
    """

    _options = ("state_bits", "seed")
    _own = ("name",)

    @known_arguments(ValueError)
    def __init__(
        self,
        learning_rate: float | LearningRateSchedule | Callable[..., float] = 0.001,
        beta_1: Number = 0.9,
        beta_2: Number = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "nadam",
        *,
        momentum_decay: float = 1.0,
        bias_correction: BiasCorrection = "nadam",
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        state_bits: int | None = None,
        seed: int = 0,
    ) -> None:
        self._hyper = hyperparameters(locals())
        check_state_options(state_bits, seed)
        self._state_bits, self._seed = state_bits, seed
        self.name = name
        self._last_step: StepReport | None = None
        self._parameters: Parameters | None = None
        self._exclusion = Exclusion([], [])
        self._exclusive = Exclusive()

    @property
    def state_bits(self) -> int | None:
        """How moments are kept; given to the constructor."""
        return self._state_bits

    @property
    def seed(self) -> int:
        """Of their rounding; given to the constructor."""
        return self._seed

    @property
    def built(self) -> bool:
        """Whether the optimizer knows its arrays."""
        return self._parameters is not None

    @property
    def last_step(self) -> StepReport:
        """What the last call did; before the first, where the run stands.

        The learning rate is then NaN where a callable gives it, which is not called once more for this.
        """
        if self._last_step is not None:
            return self._last_step
        called = callable(self._hyper.lr) and not is_schedule(self._hyper.lr)
        skipped = 0 if self._parameters is None else self._parameters.counters.skipped
        return StepReport(self.iterations, nan if called else self.learning_rate, None, None, skipped)

    @property
    def iterations(self) -> int:
        """Updates so far: calls, divided by ``gradient_accumulation_steps``."""
        calls = 0 if self._parameters is None else self._parameters.counters.calls
        return calls // (self._hyper.gradient_accumulation_steps or 1)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next call; settable unless it is a schedule's."""
        calls = 0 if self._parameters is None else self._parameters.counters.calls
        return float(current(self._hyper.lr, calls))

    @learning_rate.setter
    def learning_rate(self, value: float | LearningRateSchedule | Callable[..., float]) -> None:
        if is_schedule(self._hyper.lr) and not callable(value):
            raise TypeError(
                f"learning_rate={value!r}: not settable, since it follows {self._hyper.lr!r}; set a schedule"
            )
        self._hyper = replace(self._hyper, lr=value)

    @property
    def variables(self) -> list[NDArray[Any]]:
        """The state in Keras's order; the arrays are the optimizer's own, the counters copies.

        iteration, learning_rate (absent for a schedule or callable), averages, accumulators, per parameter first and
        second moment (and of moments of 8 bits the scales of either), momentum product.
        """
        scalars = [] if callable(self._hyper.lr) else [np.float32(self._hyper.lr)]
        if self._parameters is None:
            return [np.asarray(0), *map(np.asarray, scalars)]
        entries, counters = self._parameters.entries, self._parameters.counters
        averages = [entry.ema for entry in entries if entry.ema is not None]
        accumulators = [entry.accumulator for entry in entries if entry.accumulator is not None]
        kept = [(e.exp_avg, e.exp_avg_sq, e.exp_avg_scale, e.exp_avg_sq_scale) for e in entries]
        moments = [array for own in kept for array in own if array is not None]
        before = [np.asarray(counters.calls), *map(np.asarray, scalars)]
        return [*before, *averages, *accumulators, *moments, np.asarray(counters.momentum_product)]

    def build(self, variables: Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]]) -> None:
        """Tell the optimizer its arrays, before the first call of `apply` does.

        Args:
            variables: Arrays of float16, bfloat16 (of ml_dtypes), float32, float64 or complex, of any shape, strides
                and memory order; a list, or a dict by name. They are updated in place.

        Raises:
            TypeError: Something else among them, or a generator of them.
            ValueError: A read-only array, one that overlaps itself or another, or other arrays than those it was built
                with.

        Warns:
            UserWarning: Patterns of `exclude_from_weight_decay` fit no name of theirs, or an array is none of them.
        """
        self._exclusive.run("build", self._build, variables)

    def _build(self, variables: Any) -> None:
        if self._parameters is None:
            self._parameters = self._prepared(variables)
        elif not self._parameters.are(variables):
            raise ValueError("variables: the optimizer is built with other arrays already; make a new one for these")

    def _prepared(self, variables: Any) -> Parameters:
        h = self._hyper
        accumulate = h.gradient_accumulation_steps is not None
        with loading():  # all that a first step imports
            from numpy import ma  # noqa: F401

            from nadam.kernels.cpu import plan, pointers  # noqa: F401
        return Parameters(
            variables,
            average=h.use_ema,
            accumulate=accumulate,
            exclusion=self._exclusion,
            state_bits=self.state_bits,
            seed=self.seed,
        )

    def exclude_from_weight_decay(
        self, var_list: Iterable[NDArray[Any]] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave parameters out of weight decay; each call adds to the ones before. Only before `build`.

        Args:
            var_list: Arrays.
            var_names: Regular expressions; a parameter in whose name one is found is left out. The parameters of a list
                are named by their position.

        Raises:
            ValueError: The optimizer is built, or a pattern is no regular expression.
            TypeError: A string, or a single array, instead of a list.

        Example:
            >>> optimizer = Nadam(weight_decay=0.01)
            >>> optimizer.exclude_from_weight_decay(var_names=["bias", "norm"])
        """
        if isinstance(var_list, np.ndarray) or isinstance(var_names, str):
            raise TypeError("exclude_from_weight_decay: expected lists of arrays and of strings")
        patterns = self._excluded_patterns(var_names)
        self._exclusion.arrays.extend(var_list or [])
        self._exclusion.patterns.extend(patterns)

    def apply(
        self,
        grads: Mapping[str, Any] | Sequence[Any],
        variables: Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Do one step.

        Args:
            grads: One gradient per parameter, of its shape and any real dtype, in the order of the parameters or by
                name; None, or a name left out, for a parameter that is not to move. Left as found.
            variables: The arrays they belong to; needed on the first call, unless `build` was called.

        Raises:
            ValueError: Another count or shape of gradients, no gradient at all, an array that the optimizer does not
                know or that comes twice, one that has taken a parameter's place in the list or dict, memory that
                overlaps, a read-only array, a hyperparameter computed out of range. In each case nothing has changed.
            TypeError: Something that is not an array of numbers.
        """
        self._step(grads, variables, self._hyper.loss_scale_factor or 1.0, must_be_finite=False)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, NDArray[Any]]]) -> int:
        """As `apply`, with pairs of gradient and array; gives `iterations`."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [array for _, array in pairs])
        return self.iterations

    def _step(self, grads: Any, variables: Any, loss_scale: float, *, must_be_finite: bool) -> bool:
        """Do one step; gives whether it was not skipped."""
        return self._exclusive.run("apply", self._step_alone, grads, variables, loss_scale, must_be_finite)

    def _step_alone(self, grads: Any, variables: Any, loss_scale: float, must_be_finite: bool) -> bool:
        parameters = self._parameters
        if parameters is None:
            if variables is None:
                raise ValueError("variables: expected the arrays to train, on the first call or in build() before it")
            parameters = self._prepared(variables)
        now = self._hyper.at(parameters.counters.calls)
        plan, held = parameters.plan(grads, variables)
        self._parameters = parameters
        bucket = Bucket(self._hyper, now, parameters.counters, plan)
        report = step([bucket], loss_scale=loss_scale, must_be_finite=must_be_finite)
        if report.skipped:
            name = parameters.nonfinite(plan.members, held, 1.0 / loss_scale, self._hyper.check(must_be_finite))
            report = report._replace(nonfinite_param=name)
        self._last_step = report
        return not report.skipped

    def scale_loss(self, loss: Any) -> Any:
        """The loss times ``loss_scale_factor``."""
        return loss if self._hyper.loss_scale_factor is None else loss * self._hyper.loss_scale_factor

    def finalize_variable_values(
        self, variables: Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]] | None = None
    ) -> None:
        """Set parameters to their moving averages; with ``use_ema=False`` nothing happens.

        Args:
            variables: Which; None for all.

        Raises:
            ValueError: An array that the optimizer does not know.
        """
        if not self._hyper.use_ema or self._parameters is None:
            return
        self._exclusive.run("finalize_variable_values", self._finalize, self._parameters, variables)

    @staticmethod
    def _finalize(parameters: Parameters, variables: Any) -> None:
        chosen: Sequence[int] = range(len(parameters.entries))
        if variables is None:
            parameters.check_source()
        else:
            items = variables.items() if isinstance(variables, Mapping) else enumerate(variables)
            chosen = [parameters.index_of(array, label) for label, array in items]
        for i in chosen:
            entry = parameters.entries[i]
            entry.array[...] = entry.ema

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, copied: counters and, by the parameters' names, arrays.

        Raises:
            ValueError: The optimizer is not built.
        """
        return self._exclusive.run("state_dict", self._state_dict)

    def _state_dict(self) -> dict[str, Any]:
        from nadam.numpy import state as states

        lr = None if callable(self._hyper.lr) else self._hyper.lr
        return states.state_dict(self._built("state_dict"), lr)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; parameters are matched by name.

        Args:
            state: What `state_dict` gave, of an optimizer with the same parameters and slots (averages, accumulators).
                Moments of 8 bits become float32 ones, exactly, and float32 ones are rounded to 8 bits, as they are kept
                here.

        Raises:
            ValueError: The optimizer is not built, or the state is another's, incomplete, damaged or not finite; it
                says what is wrong, and nothing has changed.

        Warns:
            UserWarning: Moments were rounded to 8 bits.
        """
        self._exclusive.run("load_state_dict", self._load_state_dict, state)

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        from nadam.numpy import state as states

        lr = states.load_state_dict(self._built("load_state_dict"), state)
        if lr is not None and not callable(self._hyper.lr):
            self._hyper = replace(self._hyper, lr=lr)

    def _built(self, method: str) -> Parameters:
        if self._parameters is None:
            raise ValueError(f"{method}: the optimizer is not built yet: call build(variables) first")
        return self._parameters

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; a lock has no copy."""
        return {name: value for name, value in self.__dict__.items() if name != "_exclusive"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._exclusive = Exclusive()
