"""Bad input that means the same on every host: the error, and that nothing has changed by it, bit for bit."""

import math
import re
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from cases import same_bits
from hosts import HOSTS

EVERYTHING = {"weight_decay": 0.1, "global_clipnorm": 1.0, "use_ema": True, "gradient_accumulation_steps": 2}
KERAS = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
SPELLING = {
    "numpy": KERAS,
    "keras": KERAS,
    "torch": {"beta1": "betas[0]", "beta2": "betas[1]"},
    "jax": {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"},
}
# Row, allowed range and values out of it, by core's names.
OUT_OF_RANGE = {
    "lr": (1, "0 <= {} < inf", [math.nan, math.inf, -0.1]),
    "eps": (1, "0 <= {} < inf", [math.nan, math.inf, -1e-8]),
    "beta1": (2, "0 <= {} < 1", [1.0, -0.1, math.nan]),
    "beta2": (2, "0 <= {} < 1", [1.0, 1.2, math.nan]),
    "weight_decay": (3, "0 <= {} < inf", [-0.1, math.inf, math.nan]),
    "clipnorm": (3, "{} > 0", [0.0, -1.0]),
    "clipvalue": (3, "{} > 0", [0.0, -1.0]),
    "global_clipnorm": (3, "{} > 0", [-1.0, math.nan]),
    "loss_scale_factor": (3, "0 < {} < inf", [0.0, math.inf]),
    "gradient_accumulation_steps": (3, "{} >= 2", [2.5, 1, 0, True]),
    "ema_overwrite_frequency": (3, "{} >= 1", [0, 2.5]),
    "ema_momentum": (3, "0 <= {} <= 1", [1.5]),
    "momentum_decay": (3, "{} >= 0", [-1.0, math.nan]),
    "bias_correction": (3, "'nadam' or 'adam'", ["Adam", None]),
}
# Of PyTorch's groups, which may be set between steps.
OF_GROUPS = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay")
GRADS = [np.full((3, 4), 0.5, np.float32), np.ones(5, np.float32)]


class Bad(NamedTuple):
    """A gradient of the second parameter, whose shape is (5,), or all gradients.

    Attributes:
        row: Of the table.
        grads: What is given, or a function that makes it.
        expected: The error and what its message has, by a host's name or the first word of it.
    """

    row: int
    grads: Any
    expected: dict


def shaped(shape):
    said = re.escape(str(shape))
    ours = ValueError, f"shape {said}|that of updates, {said}"
    by_pytorch = RuntimeError, "size"  # when it is assigned
    return Bad(15, np.ones(shape, np.float32), dict.fromkeys(("numpy", "keras", "jax"), ours) | {"torch": by_pytorch})


def bcoo():
    from jax.experimental import sparse

    return sparse.BCOO.fromdense(GRADS[1])


STRUCTURE = ValueError, "its structure is not that of"
COUNT = ValueError, "gradients, expected one for each of 2"
NOT_REAL = TypeError, "expected real"
BY_PYTORCH = RuntimeError, "grad"
GRADIENTS = {
    **{f"of shape {shape}": shaped(shape) for shape in [(6,), (1,), (), (1, 5), (5, 1), (0,)]},
    "too few": Bad(15, GRADS[:1], {"numpy": COUNT, "keras": COUNT, "jax": STRUCTURE}),
    "too many": Bad(15, [*GRADS, GRADS[1]], {"numpy": COUNT, "keras": COUNT, "jax": STRUCTURE}),
    "missing": Bad(15, None, {"jax": STRUCTURE}),
    "integers": Bad(16, np.ones(5, np.int32), {"jax": NOT_REAL, "torch": BY_PYTORCH}),
    "bools": Bad(16, np.ones(5, bool), {"numpy": NOT_REAL, "jax": NOT_REAL, "torch": BY_PYTORCH}),
    "complex": Bad(
        17, np.ones(5, np.complex64), dict.fromkeys(("numpy", "keras", "jax"), NOT_REAL) | {"torch": BY_PYTORCH}
    ),
    "sparse": Bad(18, bcoo, {"jax": STRUCTURE}),
    "float64": Bad(20, np.ones(5), {"torch": BY_PYTORCH}),
}


def by_host(table, name):
    """What a table has for a host, or for the hosts of its framework."""
    return table.get(name, table.get(name.split()[0]))


def has(name, argument):
    """Whether a host's constructor takes it; a loss scale is GradScaler's in PyTorch, an argument of `step` in JAX."""
    apart = argument == "loss_scale_factor" and name.split()[0] in ("torch", "jax")
    return argument in HOSTS[name]().options and not apart


def message(name, argument, value):
    """What the error says: the value and the range, with the argument as the host spells it."""
    spelled = SPELLING[name.split()[0]].get(argument, argument)
    return re.escape(f"{value!r}: expected ") + ".*" + re.escape(OUT_OF_RANGE[argument][1].format(spelled))


def built(name, **settings):
    host = HOSTS[name]()
    host.build([np.ones(g.shape, np.float32) for g in GRADS], {"lr": 0.01, **settings})
    return host


@cache
def trained(name):
    """A host in the middle of a window, for calls that must not change it."""
    host = built(name, **{argument: value for argument, value in EVERYTHING.items() if has(name, argument)})
    for _ in range(3):
        host.step(GRADS)
    return host


def settings_of(host):
    if hasattr(host.optimizer, "get_config"):
        return host.optimizer.get_config()
    groups = getattr(host.optimizer, "param_groups", [])
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def same(one, other):
    return one.keys() == other.keys() and all(
        same_bits(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


@contextmanager
def unchanged(host):
    """Parameters, state, counters and settings are the same afterwards; and a step that is right still does one."""
    before, settings = host.state(), settings_of(host)
    yield
    assert same(before, host.state())
    assert settings_of(host) == settings
    host.step(GRADS)
    assert not same(before, host.state())


def set_on(host, name, argument, value):
    """A value set between steps, and in PyTorch the step that looks at it."""
    if name != "torch":
        setattr(host.optimizer, SPELLING[name.split()[0]].get(argument, argument), value)
        return
    group = host.optimizer.param_groups[0]
    key = "betas" if argument.startswith("beta") else argument
    good = group[key]
    group[key] = {"beta1": (value, good[1]), "beta2": (good[0], value)}[argument] if key == "betas" else value
    try:
        host.step(GRADS)
    finally:
        group[key] = good


def settable(name, argument):
    """JAX's optimizers have no settings that could change."""
    return has(name, argument) and (argument in OF_GROUPS if name == "torch" else not name.startswith("jax"))


def arguments(names, chosen=has):
    return [
        (name, argument, value)
        for name in names
        for argument, (_, _, values) in OUT_OF_RANGE.items()
        for value in values
        if chosen(name, argument)
    ]


def gradients(names):
    return [(name, kind) for name in names for kind, bad in GRADIENTS.items() if by_host(bad.expected, name)]


def rows(name):
    """The rows that are cases here, on a host."""
    found = {OUT_OF_RANGE[argument][0] for _, argument, _ in arguments([name])} | {4}
    found |= {5 for _ in arguments([name], settable)}
    return found | {GRADIENTS[kind].row for _, kind in gradients([name])}


def check_argument(name, argument, value):
    with pytest.raises(ValueError, match=message(name, argument, value)):
        built(name, **{argument: value})


def check_setting(name, argument, value):
    host = trained(name)
    fixed = re.escape(f"{value!r}: can be set only before the optimizer is built")
    with unchanged(host), pytest.raises(ValueError, match=f"{message(name, argument, value)}|{fixed}"):
        set_on(host, name, argument, value)


def check_unknown_argument(name):
    with pytest.raises((TypeError, ValueError), match="amsgrad"):
        built(name, amsgrad=True)
    if has(name, "clipnorm"):
        with pytest.raises(ValueError, match=r"clipnorm=1.0, clipvalue=2.0: expected at most one of clipnorm, clipv"):
            built(name, clipnorm=1.0, clipvalue=2.0)


def check_gradient(name, kind):
    bad, host = GRADIENTS[kind], trained(name)
    error, said = by_host(bad.expected, name)
    second = bad.grads() if callable(bad.grads) else bad.grads
    grads = second if isinstance(second, list) else [GRADS[0], second]
    with unchanged(host), pytest.raises(error, match=said):
        host.step(grads)
