"""Nadam for Keras 3: the documented optimizer, one class for all backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import keras
from keras import saving

from nadam.core.compressed import check_state_options
from nadam.core.config import FIELDS, SPELLING, Configured, hyperparameters
from nadam.core.dtypes import COMPUTE_DTYPE
from nadam.core.hyperparameters import BiasCorrection, Hyperparameters, Now, current
from nadam.core.names import known_arguments
from nadam.core.step import StepReport
from nadam.keras import calls, slots, state
from nadam.keras.backends import Runtime, backend
from nadam.keras.slots import plain

Number = float | Callable[[], float]
LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule
EXCLUDED = "excluded_from_weight_decay"  # in a config: patterns
# Settings that Keras's own has not, with their defaults, which a config leaves out.
OWN = {"momentum_decay": 1.0, "bias_correction": "nadam", "skip_nonfinite": False, "track_grad_norm": False}
OWN |= {"state_bits": None, "seed": 0}


@saving.register_keras_serializable(package="nadam")
class Nadam(Configured, keras.optimizers.Optimizer):  # type: ignore[misc]
    """Adam with Nesterov momentum, a drop-in for keras.optimizers.Nadam.

        exp_avg    += (grad - exp_avg) * (1 - beta_1)
        exp_avg_sq += (grad**2 - exp_avg_sq) * (1 - beta_2)
        variable   -= learning_rate * m_hat / (sqrt(exp_avg_sq / (1 - beta_2**t)) + epsilon)

    where ``m_hat`` looks one step ahead along the momentum, which warms up (core/scalars.py). Half-precision
    variables are computed in float32 and have float32 moments.

    Args:
        learning_rate: A number >= 0; a keras.optimizers.schedules.LearningRateSchedule, called with the number of
            calls so far; or a callable of no arguments, called at every step.
        beta_1: Decay rate of the first moment, in [0, 1); or a callable of no arguments.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added outside the square root of the bias-corrected second moment, >= 0.
        weight_decay: Decoupled: ``variable -= learning_rate * weight_decay * variable``. None for none.
        clipnorm: Largest norm of each gradient, > 0. At most one of the three clips is set.
        clipvalue: Largest magnitude of each element of a gradient, > 0.
        global_clipnorm: Largest norm of all gradients together, > 0.
        use_ema: Whether to keep a moving average of the variables.
        ema_momentum: Share of the old average that an update keeps, in [0, 1].
        ema_overwrite_frequency: Every so many updates the variables take their averages; None for never.
        loss_scale_factor: What `scale_loss` multiplies by and a step divides the gradients by, > 0.
        gradient_accumulation_steps: Update at every so many calls, with the mean of their gradients; at least 2, or
            None.
        name: Of the optimizer.
        momentum_decay: How fast the momentum warms up, >= 0: 1 is Keras, 0.004 PyTorch, infinity optax.
        bias_correction: "nadam" divides the momentum term by one minus the momentum product of the next step, "adam" by
            that of this step: with ``momentum_decay`` infinite that is the Nadam of AlgoPerf, timm and TensorFlow 1.
        skip_nonfinite: Whether a call with NaN, infinity or a value whose square overflows in the gradients changes
            nothing but ``last_step.skipped_steps``.
        track_grad_norm: Whether ``last_step`` has the norm of all gradients also without clipping, for one more read of
            them.
        state_bits: 8 to keep both moments of each variable of at least 4,096 elements in a byte each, with a byte more
            for each 32 (core/compressed.py), stochastically rounded; None for float32. Only on torch, on the CPU.
        seed: Of that rounding, ``0 <= seed < 2**32``; it also depends on the step, so a resumed run goes on alike.

    Raises:
        ValueError: A value out of its range, two clips, or an unknown argument; it is named, with what is allowed.
            ``state_bits`` on another backend than torch.
        TypeError: A value that is not a number.
        AttributeError: Setting what other hosts call one of these, as ``lr``.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(Nadam(0.01, use_ema=True), loss="mse")

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam.
    """

    _options = ("state_bits", "seed")

    @known_arguments(ValueError)
    def __init__(
        self,
        learning_rate: Any = 0.001,
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
        check_state_options(state_bits, seed)
        if state_bits is not None and not backend.keeps_codes:
            raise ValueError(f"state_bits={state_bits}: expected None on the {keras.backend.backend()} backend")
        hyper = hyperparameters({name: plain(value) for name, value in locals().items()})
        object.__setattr__(self, "_hyper", hyper)  # Keras sets nothing before its own __init__, which sets these
        shared = {field: getattr(hyper, field) for field in FIELDS if field not in (*SPELLING, *OWN)}
        super().__init__(learning_rate=hyper.lr if callable(hyper.lr) else 0.0, name=name, **shared)
        if not callable(hyper.lr):  # in a variable of its own: Keras's has half precision where everything has
            self._untrack_variable(self._learning_rate)
            kind = {"dtype": COMPUTE_DTYPE[keras.config.floatx()], "aggregation": "only_first_replica"}
            initializer = keras.initializers.Constant(hyper.lr)
            self._learning_rate: Any = self.add_variable((), initializer, name="learning_rate", **kind)
        self._state_bits, self._seed = state_bits, seed
        self._runtime = Runtime()
        self._report: Any = None  # the variable of that name, where a setting asks for it

    def __setattr__(self, name: str, value: Any) -> None:
        """For a setting, the value of a variable: Keras would take the variable itself for one of the optimizer's."""
        is_setting = isinstance(value, keras.Variable) and hasattr(type(self), name)
        super().__setattr__(name, plain(value) if is_setting else value)

    @property
    def state_bits(self) -> int | None:
        """How moments are kept; given to the constructor."""
        return self._state_bits

    @property
    def seed(self) -> int:
        """Of their rounding; given to the constructor."""
        return self._seed

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the next call; settable unless it is a schedule's."""
        if isinstance(self._learning_rate, (keras.Variable, LearningRateSchedule)):
            return self._get_current_learning_rate()
        return current(self._learning_rate, int(self._iterations.numpy()))

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if callable(value) and not isinstance(value, keras.Variable):
            if isinstance(self._learning_rate, keras.Variable):
                self._untrack_variable(self._learning_rate)
            self._learning_rate = value
            return
        if isinstance(self._learning_rate, LearningRateSchedule):
            raise TypeError(
                f"learning_rate={value!r}: not settable, since it follows {self._learning_rate!r}; set a schedule"
            )
        if not backend.is_traced(value):
            value = Hyperparameters(lr=plain(value), spelling=SPELLING).lr
        if not isinstance(self._learning_rate, keras.Variable):
            raise TypeError(f"learning_rate={value!r}: not settable, since it is what {self._learning_rate!r} gives")
        self._learning_rate.assign(value)

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables in Keras's order.

        iteration, learning_rate (absent for a schedule or callable), averages, accumulators, per variable first and
        second moment, with ``state_bits`` their scales, momentum product; last, with ``skip_nonfinite`` or
        ``track_grad_norm``, what the last step reports.
        """
        backend.sync_counters(self)
        return list(super().variables)

    @property
    def iterations(self) -> Any:
        """Updates so far: calls, divided by ``gradient_accumulation_steps``."""
        backend.sync_counters(self)
        return super().iterations

    @property
    def last_step(self) -> StepReport:
        """What the last call did; before the first, where the run stands.

        Out of a compiled step of JAX or TensorFlow come only the optimizer's variables: norm and clip factor are then
        None, unless ``track_grad_norm`` or ``skip_nonfinite`` is set, which give them a variable.
        """
        return backend.last_step(self)

    def build(self, variables: Sequence[Any]) -> None:
        """Create the optimizer's variables.

        Args:
            variables: What it is to train, of float16, bfloat16, float32 or float64.

        Raises:
            TypeError: A variable of another dtype.
            ValueError: The same variable twice; state that was loaded before and is not that of these variables.

        Warns:
            UserWarning: Patterns or variables of `exclude_from_weight_decay` fit none of them.
        """
        if getattr(self, "built", False):
            return
        self._runtime.exclusive.run("build", self._build, list(variables))

    def _build(self, variables: list[Any]) -> None:
        if getattr(self, "built", False):  # by another thread meanwhile
            return
        with backend.building():
            slots.build(self, variables, backend)
        backend.built(self)
        self.built = True
        pending, self._runtime.pending = self._runtime.pending, None
        if pending is not None:
            with backend.building():
                state.load(self, pending)

    @property
    def _u_product(self) -> Any:
        """Keras's name for the momentum product."""
        return self._momentum_product

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay; each call adds to the ones before. Only before `build`.

        Args:
            var_list: Variables.
            var_names: Regular expressions; a variable in whose path one is found is left out.

        Raises:
            ValueError: The optimizer is built, or a pattern is no regular expression.
            TypeError: A string instead of a list.

        Example:
            >>> optimizer = Nadam(weight_decay=0.01)
            >>> optimizer.exclude_from_weight_decay(var_names=["bias", "norm"])
        """
        if isinstance(var_names, str):
            raise TypeError(f"var_names={var_names!r}: expected a list of strings")
        patterns = self._excluded_patterns(var_names)
        self._runtime.exclusion.variables += var_list if var_list is not None else ()
        self._runtime.exclusion.patterns += patterns

    def _use_weight_decay(self, variable: Any) -> bool:
        return self._runtime.exclusion.decays(variable, self._var_key)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Do one step.

        Args:
            grads: One gradient per variable, of its shape; None for a variable that is not to move. Left as found.
            trainable_variables: The variables they belong to; needed on the first call, unless `build` was called.

        Raises:
            ValueError: Another count or shape of gradients, no gradient at all, a variable that the optimizer does not
                know or that comes twice, a hyperparameter computed out of range. In each case nothing has changed.
            TypeError: A complex gradient.
        """
        grads = list(grads)
        if not grads:
            return
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        members, grads = calls.paired(self, grads, trainable_variables)
        step = calls.step_and_overwrite if self._runtime.overwritten else backend.step
        backend.alone(self, "apply", step, self, members, grads)

    def _now(self, count: Any) -> Now:
        return calls.now(self, count)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set variables to their moving averages; with ``use_ema=False``, or before the first update, nothing happens.

        Args:
            var_list: Which.

        Raises:
            RuntimeError: A call from within a step, as by a signal handler; another thread's step is waited for.
        """
        backend.alone(self, "finalize_variable_values", self._finalize, var_list)

    def _finalize(self, var_list: Sequence[Any]) -> None:
        if not (self.use_ema and self.built) or int(self._iterations.numpy()) < (self.gradient_accumulation_steps or 1):
            return
        self._check_variables_are_known(var_list)
        for variable in var_list:
            slot = self._runtime.slots[self._get_variable_index(variable)]
            if slot.ema is not None:
                backend.copy(self, slot.ema, variable)

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Sequence[Any]) -> None:
        self.finalize_variable_values(trainable_variables)

    def save_own_variables(self, store: Any) -> None:
        """Write the state into a store of Keras: what keras.optimizers.Nadam writes, each array labelled.

        Raises:
            RuntimeError: A call from within a step, as by a signal handler; another thread's step is waited for.
        """
        backend.alone(self, "save_own_variables", state.save, self, store)

    def load_own_variables(self, store: Any) -> None:
        """Read the state from a store of Keras, of this class or keras.optimizers.Nadam.

        Before `build` it is kept until then.

        Raises:
            ValueError: The state is another optimizer's, of other variables or arguments, or damaged; it says what is
                wrong, and nothing has changed.
            RuntimeError: A call from within a step, as by a signal handler; another thread's step is waited for.
        """
        backend.alone(self, "load_own_variables", state.load_or_keep, self, store)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that Keras can save.

        What Keras's own has not (``momentum_decay``, ``bias_correction``, ``skip_nonfinite``, ``track_grad_norm``,
        ``state_bits``, ``seed``) or forgets, the exclusions from weight decay, is left out where there is nothing to
        say: keras.optimizers.Nadam then takes the config as well.
        """
        rate = self._learning_rate
        config = super(Configured, self).get_config()
        config["learning_rate"] = float(rate.numpy()) if isinstance(rate, keras.Variable) else _serialized(rate)
        config.update({"beta_1": _serialized(self.beta_1), "beta_2": _serialized(self.beta_2), "epsilon": self.epsilon})
        ours = {name: getattr(self, name) for name in OWN}
        config.update({name: value for name, value in ours.items() if value != OWN[name]})
        excluded = self._runtime.exclusion.as_patterns()
        return {**config, EXCLUDED: excluded} if excluded else config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer made from what `get_config`, here or of keras.optimizers.Nadam, gave."""
        made = dict(config)
        for name in ("learning_rate", "beta_1", "beta_2"):
            if isinstance(made.get(name), dict):
                made[name] = saving.deserialize_keras_object(made[name], custom_objects=custom_objects)
        excluded = made.pop(EXCLUDED, None)
        optimizer = cls(**made)
        optimizer.exclude_from_weight_decay(var_names=excluded)
        return optimizer

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {len(self._runtime.slots)} variables>"


Nadam.__module__ = "nadam.keras"  # where a saved model finds it
backend.finish(Nadam)


def _serialized(value: Any) -> Any:
    return saving.serialize_keras_object(value) if callable(value) else value
