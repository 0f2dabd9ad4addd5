"""The hyperparameters of Nadam as attributes under Keras's names, and as configs that JSON can hold."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Self

from nadam.core import schedules
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.names import did_you_mean, refuse
from nadam.core.schedules import known_schedules

# What Keras calls the hyperparameters that have another name in `core`.
SPELLING = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
# What a user sets; the rest of the dataclass takes no part in comparisons.
# What Keras's constructor has no argument for is the PyTorch host's.
_PYTORCHS = {"coupled_weight_decay", "maximize"}
FIELDS = tuple(field.name for field in fields(Hyperparameters) if field.compare and field.name not in _PYTORCHS)


def hyperparameters(given: Mapping[str, Any], spelling: Mapping[str, str] = SPELLING) -> Hyperparameters:
    """The hyperparameters among the arguments of a constructor, as its ``locals()`` has them."""
    names = {field: spelling.get(field, field) for field in FIELDS}
    return Hyperparameters(**{field: given[name] for field, name in names.items() if name in given}, spelling=spelling)


class _Setting:
    """A hyperparameter as an attribute; setting it checks it first."""

    def __init__(self, field: str, *, fixed: bool = False) -> None:
        self._field, self._fixed = field, fixed

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._hyper, self._field)

    def __set__(self, optimizer: Any, value: Any) -> None:
        if self._fixed and getattr(optimizer, "built", False):
            raise ValueError(f"{self._field}={value!r}: can be set only before the optimizer is built")
        optimizer._hyper = replace(optimizer._hyper, **{self._field: value})


class Configured:
    """What the constructor was given, under Keras's names."""

    beta_1 = _Setting("beta1")
    beta_2 = _Setting("beta2")
    epsilon = _Setting("eps")
    weight_decay = _Setting("weight_decay")
    clipnorm = _Setting("clipnorm")
    clipvalue = _Setting("clipvalue")
    global_clipnorm = _Setting("global_clipnorm")
    use_ema = _Setting("use_ema", fixed=True)
    ema_momentum = _Setting("ema_momentum")
    ema_overwrite_frequency = _Setting("ema_overwrite_frequency")
    loss_scale_factor = _Setting("loss_scale_factor")
    gradient_accumulation_steps = _Setting("gradient_accumulation_steps", fixed=True)
    momentum_decay = _Setting("momentum_decay")
    bias_correction = _Setting("bias_correction")
    skip_nonfinite = _Setting("skip_nonfinite")
    track_grad_norm = _Setting("track_grad_norm")

    name: str
    _hyper: Hyperparameters
    _options: tuple[str, ...] = ()  # arguments that are no hyperparameters, and attributes of the same names

    def _kept(self) -> dict[str, Any]:
        """These, by name."""
        return {name: getattr(self, name) for name in self._options}

    def _excluded_patterns(self, names: Iterable[str] | None) -> list[str]:
        """The regular expressions that `exclude_from_weight_decay` was given, checked."""
        if getattr(self, "built", False):
            raise ValueError("exclude_from_weight_decay: can be called only before the optimizer is built")
        patterns = list(names or [])
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"var_names: {pattern!r} is no regular expression: {error}") from None
        return patterns

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold.

        Raises:
            ValueError: A callable that cannot be saved.
        """
        config = {"name": self.name}
        for field in FIELDS:
            name = SPELLING.get(field, field)
            config[name] = to_config(name, getattr(self._hyper, field))
        return {**config, **self._kept()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer made from what `get_config` gave.

        Args:
            config: The constructor's arguments.
            custom_objects: Functions, and schedule classes that are not this package's, by name.
        """
        return cls(**{name: from_config(name, value, custom_objects) for name, value in config.items()})

    def __repr__(self) -> str:
        given = {SPELLING.get(f, f): getattr(self._hyper, f) for f in FIELDS} | self._kept()
        shown = (f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def warn_of_unused(patterns: list[str], names: list[str], others: list[str], what: str) -> None:
    """Warn, at the user's line, of exclusions from weight decay that exclude nothing: patterns, and others as told."""
    fitting = any(re.search(pattern, name) for pattern in patterns for name in names)
    unused = [f"var_names={patterns}"] * bool(patterns and not fitting) + others
    if unused:
        given = "; ".join(unused)
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("nadam", "keras"):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"exclude_from_weight_decay: {given}: not among the {what} {names}", stacklevel=level)


# Other hosts' names, which nothing here would read.
_MISTAKEN = ("lr", "betas", "beta1", "beta2", "b1", "b2", "eps", "wd", "psi")
_KNOWN = ("learning_rate", *vars(Configured))
refuse(Configured, _MISTAKEN, lambda name: did_you_mean(name, _KNOWN).removeprefix(": "))

FUNCTION = "function"
# Where Keras says that its own schedules live; the classes of those names here take the same configs.
_KERAS_MODULE = "keras.optimizers.schedules"


def to_config(name: str, value: Any) -> Any:
    """A hyperparameter as JSON can hold it: a number as it is, a schedule by its config, a function by its name.

    Example:
        >>> to_config("beta_1", lambda: 0.9)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: beta_1=<function <lambda> at ...>: cannot be saved: expected a number, ...
    """
    if not callable(value):
        return value
    if hasattr(value, "get_config"):
        try:
            return serialize(value)
        except NotImplementedError as error:
            raise ValueError(f"{name}={value!r}: cannot be saved: {error}") from None
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module is not None and getattr(sys.modules.get(module), qualname, None) is value:
        return {"class_name": FUNCTION, "module": module, "config": qualname}
    raise ValueError(
        f"{name}={value!r}: cannot be saved: expected a number, an object with get_config() or a function of a module"
    )


def from_config(name: str, value: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The hyperparameter that `to_config` wrote; nothing is imported for it."""
    if not isinstance(value, Mapping):
        return value
    if value.get("class_name") != FUNCTION:
        return deserialize(value, custom_objects)
    function = (custom_objects or {}).get(value["config"])
    if function is None:
        raise ValueError(
            f"{name}: function {value['module']}.{value['config']}: pass custom_objects={{{value['config']!r}: ...}}"
        )
    return function


def serialize(schedule: Any) -> dict[str, Any]:
    """A schedule's class and config, as JSON can hold them."""
    for method in ("get_config", "from_config"):
        if not callable(getattr(schedule, method, None)):
            raise ValueError(f"schedule={schedule!r}: cannot be saved, expected an object with {method}()")
    cls = type(schedule)
    return {"class_name": cls.__qualname__, "module": cls.__module__, "config": schedule.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The schedule that `serialize` described; nothing is imported for it."""
    if not (isinstance(config, Mapping) and isinstance(config.get("class_name"), str) and "config" in config):
        raise ValueError(f"config={config!r}: expected a dict with class_name and config")
    class_name, module, custom = config["class_name"], config.get("module"), custom_objects or {}
    short_name = class_name.rpartition(".")[2]  # the qualified name of a nested class has dots
    if module in (None, _KERAS_MODULE):
        module = schedules.__name__
    cls = custom.get(class_name) or custom.get(short_name) or known_schedules.get((module, class_name))
    if cls is None:
        wanted = f"a schedule already defined in {module}, or custom_objects={{{short_name!r}: {short_name}}}"
        raise ValueError(f"class_name={class_name!r}: expected {wanted}")
    if not callable(getattr(cls, "from_config", None)):
        raise ValueError(f"custom_objects[{short_name!r}]={cls!r}: expected a class with from_config()")
    return cls.from_config(config["config"])
