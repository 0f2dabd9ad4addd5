"""Hyperparameters that are objects -> what JSON can hold, and back."""

import sys
from collections.abc import Mapping
from typing import Any

from nadam.core import schedules
from nadam.core.schedules import known_schedules

FUNCTION = "function"
# Where Keras says that its own schedules live; the classes of those names here take the same configs.
_KERAS_MODULE = "keras.optimizers.schedules"


def to_config(name: str, value: Any) -> Any:
    """What to write for a hyperparameter: a number as it is, a schedule's config, a function's name.

    Args:
        name: Of the hyperparameter, as the host spells it.
        value: A number or a callable.

    Raises:
        ValueError: A callable that has no config and is not a function of a module.

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
    """The hyperparameter that `to_config` wrote.

    Args:
        name: Of the hyperparameter, as the host spells it.
        value: What was written.
        custom_objects: Functions and classes by name, for what is not this package's. Nothing is imported for a config.

    Raises:
        ValueError: A function or class that is not in ``custom_objects``.

    Example:
        >>> from_config("beta_1", 0.9)
        0.9
    """
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
    """Describe a schedule by its class and its config.

    Args:
        schedule: A LearningRateSchedule, or any object with get_config and from_config.

    Returns:
        {"class_name": ..., "module": ..., "config": schedule.get_config()}.

    Raises:
        ValueError: The object has no get_config or no from_config.
        NotImplementedError: It is a LearningRateSchedule that does not define get_config.

    Example:
        >>> serialize(schedules.PiecewiseConstantDecay([5], [0.1, 0.01]))["config"]["values"]
        [0.1, 0.01]
    """
    for method in ("get_config", "from_config"):
        if not callable(getattr(schedule, method, None)):
            raise ValueError(f"schedule={schedule!r}: cannot be saved, expected an object with {method}()")
    cls = type(schedule)
    return {"class_name": cls.__qualname__, "module": cls.__module__, "config": schedule.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Make a schedule from what ``serialize`` gave; imports nothing.

    Args:
        config: From ``serialize``; what Keras's own writes for the schedules of this file is read too.
        custom_objects: Class name -> class, looked at first. Needed for a class that does not derive from
            LearningRateSchedule or is not defined yet.

    Returns:
        The schedule.

    Raises:
        ValueError: The config names no class, or one that is not known, or one without from_config.

    Example:
        >>> deserialize(serialize(schedules.ExponentialDecay(0.1, 100, 0.5)))(100)
        0.05
    """
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
