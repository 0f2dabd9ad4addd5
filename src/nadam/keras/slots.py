"""A variable of Keras with its state: which there are, and how they come to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from nadam.core.dtypes import COMPUTE_DTYPE

Optimizer = Any
Variable = Any  # a keras.Variable, or a tf.Variable


class Slot(NamedTuple):
    """A trained variable and its optimizer variables; one that its gradient overwrites has no moments and average."""

    variable: Variable
    exp_avg: Variable
    exp_avg_sq: Variable
    ema: Variable | None
    accumulator: Variable | None
    decays: bool


def compute_dtype(dtype: str) -> str:
    """What variables of a dtype are computed in; their moments, average and accumulator have it.

    Example:
        >>> compute_dtype("bfloat16"), compute_dtype("float64")
        ('float32', 'float64')
    """
    return COMPUTE_DTYPE[dtype]


def path_of(variable: Variable) -> str:
    """Where a variable is in its model; of a tf.Variable, its name."""
    return str(getattr(variable, "path", None) or variable.name)


def create(optimizer: Optimizer, variables: Sequence[Variable], backend: Any) -> tuple[tuple[Slot, ...], Variable]:
    """Create the optimizer variables of some variables, in Keras's order."""
    dtypes = [_state_dtype(optimizer, variable) for variable in variables]
    if len({optimizer._var_key(variable) for variable in variables}) != len(variables):
        raise ValueError("variables: the same variable twice")

    def add(variable: Variable, dtype: str | None, name: str, initializer: Any = "zeros") -> Variable | None:
        if dtype is None:
            return None
        own_name = f"{path_of(variable).replace('/', '_').replace(':', '_')}_{name}"
        layout = getattr(variable, "_layout", None)
        with backend.near(optimizer, variable):
            return optimizer.add_variable(variable.shape, initializer, dtype, layout=layout, name=own_name)

    given = list(zip(variables, dtypes, strict=True))
    averages, accumulators = [None] * len(given), [None] * len(given)
    if optimizer.use_ema:
        averages = [add(variable, dtype, "average", backend.initial_value(variable)) for variable, dtype in given]
    if optimizer.gradient_accumulation_steps:
        accumulators = [add(v, dtype or v.dtype, "gradient_accumulator") for v, dtype in given]
    moments = [(add(v, dtype, "momentum"), add(v, dtype, "velocity")) for v, dtype in given]
    scalars = "float64" if "float64" in dtypes else "float32" if any(dtypes) else compute_dtype(keras.config.floatx())
    product = optimizer.add_variable((), "ones", scalars, name="momentum_product")
    decays = [optimizer._use_weight_decay(variable) for variable in variables]
    parts = zip(variables, moments, averages, accumulators, decays, strict=True)
    return tuple(Slot(variable, *both, *rest) for variable, both, *rest in parts), product


def _state_dtype(optimizer: Optimizer, variable: Variable) -> str | None:
    """The dtype that a variable's state has; None for one that its gradient overwrites."""
    if optimizer._overwrite_variable_with_gradient(variable):
        return None
    dtype = keras.backend.standardize_dtype(variable.dtype)
    try:
        return compute_dtype(dtype)
    except KeyError:
        raise TypeError(f"{path_of(variable)}: dtype {dtype}: expected one of {', '.join(COMPUTE_DTYPE)}") from None


def checked_gradient(variable: Variable, grad: Any) -> Any:
    """A gradient, as a tensor."""
    tensor = keras.ops.convert_to_tensor(grad)
    shape, own = tuple(tensor.shape), tuple(variable.shape)
    if len(shape) != len(own) or any(n is not None and n != m for n, m in zip(shape, own, strict=True)):
        raise ValueError(f"grads[{path_of(variable)!r}]: shape {shape}, expected that of its variable, {own}")
    if keras.backend.standardize_dtype(tensor.dtype).startswith(("complex", "string")):
        raise TypeError(f"grads[{path_of(variable)!r}]: dtype {tensor.dtype}: expected real numbers")
    return tensor
