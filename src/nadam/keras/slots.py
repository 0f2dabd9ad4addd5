"""A variable of Keras with its state: which there are, and how they come to be."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import keras
import numpy as np

from nadam.core.compressed import is_compressed, num_scales
from nadam.core.config import warn_of_unused
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
    exp_avg_scale: Variable | None = None  # of moments of 8 bits (core/compressed.py)
    exp_avg_sq_scale: Variable | None = None


def plain(value: Any) -> Any:
    """A variable's or tensor's value as NumPy has it; anything else as it is."""
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    return value


def path_of(variable: Variable) -> str:
    """Where a variable is in its model; of a tf.Variable, its name."""
    return str(getattr(variable, "path", None) or variable.name)


class Exclusion:
    """What is excluded from weight decay."""

    def __init__(self) -> None:
        self.variables: list[Variable] = []
        self.keys: set[Any] = set()  # of variables that Keras's own optimizer was told to exclude
        self.patterns: list[str] = []

    def decays(self, variable: Variable, key_of: Callable[[Variable], Any]) -> bool:
        """Whether a variable is not excluded."""
        if key_of(variable) in self.keys.union(map(key_of, self.variables)):
            return False
        return not any(re.search(pattern, path_of(variable)) for pattern in self.patterns)

    def warn_of_unused(self, variables: list[Variable], key_of: Callable[[Variable], Any]) -> None:
        """Warn where patterns or variables exclude nothing: what was meant would decay all the same."""
        none = set(map(key_of, variables)).isdisjoint(map(key_of, self.variables))
        strangers = [f"var_list={list(map(path_of, self.variables))}"] * bool(self.variables and none)
        warn_of_unused(self.patterns, list(map(path_of, variables)), strangers, "variables")

    def as_patterns(self) -> list[str]:
        """All of it as patterns, with and without the model's name, which Keras leaves out when it loads the model."""
        exact = []
        for variable in self.variables:
            model, slash, rest = path_of(variable).partition("/")
            exact.append(f"^({re.escape(model + slash)})?{re.escape(rest)}$" if slash else f"^{re.escape(model)}$")
        return [*self.patterns, *exact]


def build(optimizer: Optimizer, variables: list[Variable], backend: Any) -> None:
    """Create the optimizer variables in Keras's order, and leave them where Keras looks for them."""
    dtypes = [_state_dtype(optimizer, variable) for variable in variables]
    if len({optimizer._var_key(variable) for variable in variables}) != len(variables):
        raise ValueError("variables: the same variable twice")
    backend.check_devices(optimizer, variables)
    optimizer._runtime.exclusion.warn_of_unused(variables, optimizer._var_key)

    def add(variable: Variable, dtype: str | None, name: str, initializer: Any = "zeros", shape: Any = None) -> Any:
        if dtype is None:
            return None
        own_name = f"{path_of(variable).replace('/', '_').replace(':', '_')}_{name}"
        layout = getattr(variable, "_layout", None)
        with backend.near(optimizer, variable):
            return optimizer.add_variable(shape or variable.shape, initializer, dtype, layout=layout, name=own_name)

    def present(variable: Variable) -> Any:
        return lambda shape, dtype: keras.ops.cast(keras.ops.copy(getattr(variable, "value", variable)), dtype)

    given = list(zip(variables, dtypes, strict=True))
    kept: dict[str, Any] = {"_trainable_variables": variables}
    kept["_trainable_variables_indices"] = {optimizer._var_key(v): i for i, v in enumerate(variables)}
    averages, accumulators = [None] * len(given), [None] * len(given)
    if optimizer.use_ema:
        averages = [add(variable, dtype, "average", present(variable)) for variable, dtype in given]
        kept["_model_variables_moving_average"] = averages
    if optimizer.gradient_accumulation_steps:
        accumulators = [add(v, dtype or v.dtype, "gradient_accumulator") for v, dtype in given]
        kept["_accumulated_gradients"] = accumulators
    codes = [keeps_codes(optimizer, variable) for variable in variables]
    pairs = [("int8", "uint8") if small else (dtype, dtype) for small, dtype in zip(codes, dtypes, strict=True)]
    moments = [(add(v, a, "momentum"), add(v, b, "velocity")) for v, (a, b) in zip(variables, pairs, strict=True)]
    kept["_momentums"], kept["_velocities"] = map(list, zip(*moments, strict=True)) if moments else ([], [])
    names, scales = ("momentum_scale", "velocity_scale"), [(None, None)] * len(given)
    for i in np.flatnonzero(codes):
        shape = (num_scales(prod(variables[i].shape)),)
        scales[i] = tuple(add(variables[i], "uint8", name, shape=shape) for name in names)
    if any(codes):
        kept["_momentum_scales"], kept["_velocity_scales"] = map(list, zip(*scales, strict=True))
    scalars = "float64" if "float64" in dtypes else "float32" if any(dtypes) else COMPUTE_DTYPE[keras.config.floatx()]
    optimizer._momentum_product = optimizer.add_variable((), "ones", scalars, name="momentum_product")
    if optimizer.skip_nonfinite or optimizer.track_grad_norm:
        optimizer._report = optimizer.add_variable((3,), "zeros", scalars, name="report")
    decays = map(optimizer._use_weight_decay, variables)
    parts = zip(variables, moments, averages, accumulators, decays, scales, strict=True)
    optimizer._runtime.slots = tuple(Slot(variable, *both, *rest, *last) for variable, both, *rest, last in parts)
    optimizer._runtime.overwritten = None in dtypes
    for name, value in kept.items():
        object.__setattr__(optimizer, name, value)  # Keras need not look into these: it has the variables already


def keeps_codes(optimizer: Optimizer, variable: Variable) -> bool:
    """Whether the moments of a variable are kept in 8 bits."""
    if optimizer.state_bits is None:
        return False
    dtype = _state_dtype(optimizer, variable)
    return dtype is not None and is_compressed(prod(variable.shape), dtype)


def _state_dtype(optimizer: Optimizer, variable: Variable) -> str | None:
    """The dtype that a variable's state has; None for one that its gradient overwrites."""
    if optimizer._overwrite_variable_with_gradient(variable):
        return None
    dtype = keras.backend.standardize_dtype(variable.dtype)
    try:
        return COMPUTE_DTYPE[dtype]
    except KeyError:
        raise TypeError(f"{path_of(variable)}: dtype {dtype}: expected one of {', '.join(COMPUTE_DTYPE)}") from None


def check_unmasked(variable: Variable, grad: Any) -> None:
    """That a gradient is no masked array, whose mask a backend would drop."""
    if isinstance(grad, np.ma.MaskedArray):
        raise TypeError(f"grads[{path_of(variable)!r}]: expected an array, got a masked one")


def checked_gradient(variable: Variable, grad: Any) -> Any:
    """A gradient as a tensor, of its variable's shape and of real numbers."""
    tensor = keras.ops.convert_to_tensor(grad)
    shape, own = tuple(tensor.shape), tuple(variable.shape)
    if len(shape) != len(own) or any(n is not None and n != m for n, m in zip(shape, own, strict=True)):
        raise ValueError(f"grads[{path_of(variable)!r}]: shape {shape}, expected that of its variable, {own}")
    if keras.backend.standardize_dtype(tensor.dtype).startswith(("complex", "string")):
        raise TypeError(f"grads[{path_of(variable)!r}]: dtype {tensor.dtype}: expected real numbers")
    return tensor
