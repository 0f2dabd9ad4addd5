"""Dynamic loss scaling around Nadam for NumPy arrays, as keras.optimizers.LossScaleOptimizer documents it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from numpy.typing import NDArray

from nadam.core.loss_scale import LARGEST, SMALLEST, DynamicLossScale
from nadam.core.names import Closed, known_arguments
from nadam.core.step import StepReport
from nadam.numpy.optimizer import Nadam

Arrays = Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]]


class LossScaleOptimizer(Closed):
    """Keeps small float16 gradients from vanishing: the loss is scaled up, the gradients down again in the step.

    A call with NaN or infinity in its gradients changes nothing and halves the scale; ``dynamic_growth_steps`` calls in
    a row without double it. Unscaling and the check cost nothing beyond one read of the gradients.

    Args:
        inner_optimizer: Does the steps; its own ``loss_scale_factor`` is set to None.
        initial_scale: Of the loss, between ``2**-126`` and ``2**127``, which it never leaves.
        dynamic_growth_steps: Calls, at least 1.
        name: For `get_config`.

    Raises:
        ValueError: An argument out of its range, or unknown: what Keras takes here belongs to the inner optimizer.
        TypeError: An inner optimizer that is not a Nadam.

    Example:
        >>> import numpy as np
        >>> weights = [np.ones(2, np.float16)]
        >>> optimizer = LossScaleOptimizer(Nadam(0.01))
        >>> loss_scale = optimizer.scale_loss(1.0)
        >>> optimizer.apply([np.full(2, 1e-4 * loss_scale, np.float16)], weights)
        >>> weights[0].tolist(), loss_scale
        ([0.9892578125, 0.9892578125], 32768.0)
    """

    _own = ("inner_optimizer", "initial_scale", "dynamic_growth_steps", "name")

    @known_arguments(ValueError, "; give it to the inner optimizer")
    def __init__(
        self,
        inner_optimizer: Nadam,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str = "loss_scale_optimizer",
    ) -> None:
        if not isinstance(inner_optimizer, Nadam):
            raise TypeError(f"inner_optimizer={inner_optimizer!r}: expected a nadam.Nadam")
        if isinstance(initial_scale, bool) or not SMALLEST <= initial_scale <= LARGEST:
            raise ValueError(f"initial_scale={initial_scale!r}: expected 2**-126 <= initial_scale <= 2**127")
        steps = dynamic_growth_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"dynamic_growth_steps={steps!r}: expected an integer, dynamic_growth_steps >= 1")
        self.inner_optimizer = inner_optimizer
        self.initial_scale, self.dynamic_growth_steps, self.name = float(initial_scale), steps, name
        inner_optimizer.loss_scale_factor = None
        self._scaling = DynamicLossScale(self.initial_scale, steps)

    @property
    def dynamic_scale(self) -> float:
        """What the loss is multiplied by now."""
        return self._scaling.scale

    @property
    def learning_rate(self) -> float:
        """The inner optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self) -> int:
        """The inner optimizer's: calls that were skipped are not counted."""
        return self.inner_optimizer.iterations

    @property
    def last_step(self) -> StepReport:
        """The inner optimizer's."""
        return self.inner_optimizer.last_step

    @property
    def built(self) -> bool:
        """Whether the inner optimizer knows its arrays."""
        return self.inner_optimizer.built

    @property
    def variables(self) -> list[NDArray[Any]]:
        """Calls since the scale changed, the scale, then the inner optimizer's."""
        import numpy as np

        own = [np.asarray(self._scaling.good_steps), np.asarray(self._scaling.scale, np.float32)]
        return [*own, *self.inner_optimizer.variables]

    def build(self, variables: Arrays) -> None:
        """As `Nadam.build`."""
        self.inner_optimizer.build(variables)

    def apply(self, grads: Mapping[str, Any] | Sequence[Any], variables: Arrays | None = None) -> None:
        """As `Nadam.apply`, for gradients of the scaled loss."""
        finite = self.inner_optimizer._step(grads, variables, self._scaling.scale, must_be_finite=True)
        self._scaling.update(finite)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, NDArray[Any]]]) -> int:
        """As `Nadam.apply_gradients`, for gradients of the scaled loss."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [array for _, array in pairs])
        return self.iterations

    def scale_loss(self, loss: Any) -> Any:
        """The loss times the scale."""
        return loss * self._scaling.scale

    def finalize_variable_values(self, variables: Arrays | None = None) -> None:
        """As `Nadam.finalize_variable_values`."""
        self.inner_optimizer.finalize_variable_values(variables)

    def exclude_from_weight_decay(
        self, var_list: Iterable[NDArray[Any]] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """As `Nadam.exclude_from_weight_decay`."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold."""
        return {
            "name": self.name,
            "inner_optimizer": self.inner_optimizer.get_config(),
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer made from what `get_config` gave; custom_objects as in `Nadam.from_config`."""
        inner = Nadam.from_config(config["inner_optimizer"], custom_objects)
        return cls(**{**config, "inner_optimizer": inner})

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, with ``dynamic_scale`` and ``step_counter``."""
        own = {"dynamic_scale": self._scaling.scale, "step_counter": self._scaling.good_steps}
        return {**self.inner_optimizer.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; as `Nadam.load_state_dict`."""
        scale, good = state.get("dynamic_scale"), state.get("step_counter")
        if not isinstance(scale, float) or not SMALLEST <= scale <= LARGEST:
            raise ValueError(f"dynamic_scale={scale!r}: expected 2**-126 <= dynamic_scale <= 2**127")
        if isinstance(good, bool) or not isinstance(good, int) or not 0 <= good < self.dynamic_growth_steps:
            raise ValueError(f"step_counter={good!r}: expected 0 <= step_counter < {self.dynamic_growth_steps}")
        self.inner_optimizer.load_state_dict(state)
        self._scaling.scale, self._scaling.good_steps = scale, good
