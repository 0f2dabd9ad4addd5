"""The comparisons can fail: each is fed something wrong and must turn red."""

import inspect
import math
import sys
from types import FunctionType

import numpy as np
import pytest

from agree import step_against_reference
from arguments import Case
from cases import apart
from nadam.core import element, gradient, rule, scalars, step
from nadam.kernels.cpu import machine_code


def train(settings):
    step_against_reference("numpy", Case("harness", settings))


def without_lookahead(param, grad, exp_avg, exp_avg_sq, decay, w1, w2, exp_avg_step, grad_step, eps):
    exp_avg = exp_avg + (grad - exp_avg) * w1
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * w2
    return param - exp_avg_step * exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq  # noqa: F821


def eps_inside(param, grad, exp_avg, exp_avg_sq, decay, w1, w2, exp_avg_step, grad_step, eps):
    exp_avg = exp_avg + (grad - exp_avg) * w1
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * w2
    step = (exp_avg_step * exp_avg + grad_step * grad) / sqrt(exp_avg_sq + eps)  # noqa: F821
    return param - param * decay - step, exp_avg, exp_avg_sq


def decay_after(param, grad, exp_avg, exp_avg_sq, decay, w1, w2, exp_avg_step, grad_step, eps):
    exp_avg = exp_avg + (grad - exp_avg) * w1
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * w2
    param = param - (exp_avg_step * exp_avg + grad_step * grad) / (sqrt(exp_avg_sq) + eps)  # noqa: F821
    return param - param * decay, exp_avg, exp_avg_sq


WRONG = {
    "no look-ahead": ({}, rule, "update", without_lookahead),
    "eps inside the root": ({"eps": 0.01}, rule, "update", eps_inside),
    "decay after the step": ({"weight_decay": 0.5, "lr": 0.1}, rule, "update", decay_after),
    "no clipping by value": ({"clipvalue": 0.25}, gradient, "clip_by_value", lambda grad, clipvalue: grad),
    "average the wrong way": (
        {"use_ema": True},
        element,
        "average",
        lambda ema, param, momentum, weight: weight * ema + momentum * param,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_mathematics_in_the_kernel_is_seen(wrong, monkeypatch):
    settings, module, name, function = WRONG[wrong]
    train(settings)
    monkeypatch.setattr(module, name, FunctionType(function.__code__, vars(module)))
    machine_code._kernels.clear()
    try:
        with pytest.raises(AssertionError):
            train(settings)
    finally:
        monkeypatch.undo()
        machine_code._kernels.clear()
    train(settings)  # and the wrong code is not served afterwards


def misspelt(function, right, wrong):
    """A function with some of its source exchanged."""
    source, names = inspect.getsource(function), dict(vars(sys.modules[function.__module__]))
    assert source.count(right) == 1
    exec(source.replace(right, wrong), names)
    return names[function.__name__]


STEPS = {
    "no decay": (
        element,
        "decay,\n        s.exp_avg_weight",
        "0 * decay,\n        s.exp_avg_weight",
        {"weight_decay": 0.5},
    ),
    "no accumulator": (element, "accumulator + grad * s", "grad * s", {"gradient_accumulation_steps": 2}),
    "no factor": (element, "grad = grad * factor", "grad = grad", {"global_clipnorm": 0.1, "eps": 0.1}),
    "no limit": (element, "clip_by_value(grad, s.clipvalue)", "grad", {"clipvalue": 0.25}),
    "average of the gradient": (element, "average(ema, param,", "average(ema, grad,", {"use_ema": True}),
    "no overwriting": (element, "s.overwrite != 0", "s.overwrite > 1", {"use_ema": True, "ema_overwrite_frequency": 2}),
    "scalars exchanged": (scalars, "c.exp_avg_step,\n        c.grad_step", "c.grad_step,\n        c.exp_avg_step", {}),
    "weights exchanged": (
        scalars,
        "ema_momentum,\n        1.0 - ema_momentum",
        "1.0 - ema_momentum,\n        ema_momentum",
        {"use_ema": True},
    ),
    "Adam's correction left out": (
        scalars,
        "adam_correction=settings.adam_correction",
        "adam_correction=False",
        {"bias_correction": "adam"},
    ),
    "decay without the rate": (
        scalars,
        "settings.lr * settings.weight_decay",
        "settings.weight_decay",
        {"weight_decay": 0.5},
    ),
}


@pytest.mark.parametrize("wrong", STEPS)
def test_a_wrong_step_around_the_rule_is_seen(wrong, monkeypatch):
    module, right, other, settings = STEPS[wrong]
    settings = {"lr": 0.1, **settings}
    train(settings)
    name = module.__name__.rpartition(".")[2]
    function = misspelt(getattr(module, name), right, other)
    for where in (module, step):
        monkeypatch.setattr(where, name, function, raising=where is module)
    machine_code._kernels.clear()
    try:
        with pytest.raises(AssertionError):
            train(settings)
    finally:
        monkeypatch.undo()
        machine_code._kernels.clear()


@pytest.mark.parametrize("wrong", [0.96001, 0.96**0.004])
def test_a_wrong_momentum_schedule_is_seen(wrong, monkeypatch):
    monkeypatch.setattr(scalars, "MOMENTUM_WARMUP", wrong)
    with pytest.raises(AssertionError):
        train({"lr": 1.0})


def test_a_wrong_average_at_the_first_update_is_seen(monkeypatch):
    monkeypatch.setattr(scalars, "averaging", lambda momentum, frequency, t: (momentum, False))
    with pytest.raises(AssertionError):
        train({"use_ema": True})


def test_a_wrong_clip_factor_is_seen(monkeypatch):
    monkeypatch.setattr(step, "clip_factor", lambda norm, clipnorm: 0.999 * gradient.clip_factor(norm, clipnorm))
    with pytest.raises(AssertionError):
        train({"clipnorm": 0.5, "eps": 0.1})


def test_one_unit_in_the_last_place_is_one():
    x = np.array([1.0, 3.0], np.float32)
    assert apart(np.nextafter(x, np.float32(math.inf)), x, x, np.float32) == 1.0
    assert apart(x, x, x, np.float32) == 0.0
    with pytest.raises(AssertionError):
        apart(np.array([math.nan]), np.array([1.0]), 1.0, np.float32)
