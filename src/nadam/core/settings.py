"""The hyperparameters of Nadam as attributes under Keras's names, and as a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Self

from nadam.core.hyperparameters import Hyperparameters
from nadam.core.saving import from_config, to_config

# What Keras calls the hyperparameters that have another name in `core`.
SPELLING = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
# What a user sets; the rest of the dataclass takes no part in comparisons.
# What Keras's constructor has no argument for is the PyTorch host's.
_PYTORCHS = {"coupled_weight_decay", "maximize"}
_FIELDS = tuple(field.name for field in fields(Hyperparameters) if field.compare and field.name not in _PYTORCHS)


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


class Settings:
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
    skip_nonfinite = _Setting("skip_nonfinite")

    name: str
    _hyper: Hyperparameters

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold.

        Raises:
            ValueError: A callable that cannot be saved.
        """
        config = {"name": self.name}
        for field in _FIELDS:
            name = SPELLING.get(field, field)
            config[name] = to_config(name, getattr(self._hyper, field))
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer made from what `get_config` gave.

        Args:
            config: The constructor's arguments.
            custom_objects: Functions, and schedule classes that are not this package's, by name.
        """
        return cls(**{name: from_config(name, value, custom_objects) for name, value in config.items()})

    def __repr__(self) -> str:
        shown = (f"{SPELLING.get(f, f)}={getattr(self._hyper, f)!r}" for f in _FIELDS)
        return f"{type(self).__name__}({', '.join(shown)})"
