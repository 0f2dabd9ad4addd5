"""Runs that PyTorch's or timm's own optimizers begin and ours go on with, and back: by state_dict and by file."""

import math
import warnings

import numpy as np
import pytest
import torch
from training import Gradients, apart, parameters, timm_optim, train

import cases
import nadam
from nadam.torch import NAdam, NAdamW
from reference import Reference

STEPS = 3
ULPS = 2 * STEPS  # a rounding of the parameter in each step, and those of the moments
COMMON = {"lr": 0.02, "weight_decay": 0.1}
DECOUPLED = {**COMMON, "decoupled_weight_decay": True}
OURS = {"NAdam": lambda params: NAdam(params, **DECOUPLED), "NAdamW": lambda params: NAdamW(params, **COMMON)}
# Those of the same rule as ours.
TWINS = {
    "NAdam": lambda params: torch.optim.NAdam(params, **DECOUPLED),
    "NAdamW": lambda params: timm_optim().NAdamW(params, **COMMON),
}
ADAMS = {
    "Adam": lambda params: torch.optim.Adam(params, **DECOUPLED),
    "AdamW": lambda params: torch.optim.AdamW(params, **COMMON),
}
# What the reference calls our settings.
SETTINGS = {
    "NAdam": {"momentum_decay": 0.004},
    "NAdamW": {"momentum_decay": math.inf, "bias_correction": "adam"},
}


def natively(old, old_params, optimizer, params, path):
    from_adam = type(old).__name__ in ADAMS
    (optimizer.load_adam_state_dict if from_adam else optimizer.load_state_dict)(old.state_dict())
    with torch.no_grad():
        for param, value in zip(params, old_params, strict=True):
            param.copy_(value)


def by_checkpoint(old, old_params, optimizer, params, path):
    nadam.checkpoint.save(path, old, {str(i): param for i, param in enumerate(old_params)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nadam.checkpoint.load(path, optimizer, {str(i): param for i, param in enumerate(params)})


WAYS = pytest.mark.parametrize("way", [natively, by_checkpoint])


def begun(make):
    """An optimizer after some steps, its parameters, and where the gradients of the others come from."""
    params, gradients = parameters(), Gradients()
    optimizer = make(params)
    train(optimizer, params, STEPS, gradients)
    return optimizer, params, gradients


def moved(way, first, second, path, change=lambda optimizer: None):
    """Parameters that one optimizer has begun to train and another one has gone on with."""
    old, old_params, gradients = begun(first)
    params = parameters(seed=7)
    optimizer = second(params)
    way(old, old_params, optimizer, params, path)
    change(optimizer)
    train(optimizer, params, STEPS, gradients)
    return params


def with_wrong_moments(optimizer):
    for entry in optimizer.state.values():
        entry["exp_avg"] *= 1.01


@WAYS
@pytest.mark.parametrize("back", [False, True], ids=["to ours", "to stock"])
@pytest.mark.parametrize("name", TWINS)
def test_a_run_goes_on_with_the_same_rule(name, back, way, tmp_path):
    both = (OURS[name], TWINS[name]) if back else (TWINS[name], OURS[name])
    unbroken, expected, gradients = begun(both[0])
    train(unbroken, expected, STEPS, gradients)
    assert apart(moved(way, *both, tmp_path / "a"), expected) <= 2 * ULPS  # PyTorch rounds several times in a step
    assert apart(moved(way, *both, tmp_path / "a", with_wrong_moments), expected) > 20 * ULPS


def reference(old, old_params, gradients, settings, product):
    """Parameters of the reference that goes on from Adam's moments."""
    run = Reference(
        [param.detach().cpu().numpy() for param in old_params],
        learning_rate=0.02,
        weight_decay=0.1,
        epsilon=1e-8,
        **settings,
    )
    states = [old.state[param] for param in old_params]
    run.m, run.v = ([entry[name].cpu().numpy().astype(float) for entry in states] for name in ("exp_avg", "exp_avg_sq"))
    run.i, run.product = STEPS, product
    for _ in range(STEPS):
        gradients.give(old_params)
        run.step([param.grad.cpu().numpy() for param in old_params])
    return run.p


@WAYS
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", ADAMS)
def test_ours_goes_on_from_adam(source, target, way, tmp_path):
    settings = SETTINGS[target]
    product = math.prod(0.9 * (1 - 0.5 * 0.96 ** (t * settings["momentum_decay"])) for t in range(1, STEPS + 1))
    params = [param.detach().cpu().numpy() for param in moved(way, ADAMS[source], OURS[target], tmp_path / "a")]

    def off(product):
        expected = reference(*begun(ADAMS[source]), settings, product)
        return max(cases.apart(x, y, 1.0, np.float32) for x, y in zip(params, expected, strict=True))

    assert off(product) <= ULPS
    assert off(product * 0.98) > 20 * ULPS


@pytest.mark.parametrize("target", ADAMS)
@pytest.mark.parametrize("source", OURS)
def test_adam_goes_on_from_ours(source, target, tmp_path):
    ours, params, gradients = begun(OURS[source])
    by_hand = parameters(seed=7)
    adam = ADAMS[target](by_hand)
    for param, value in zip(by_hand, params, strict=True):
        param.data.copy_(value)
        kept = {name: ours.state[value][name].clone() for name in ("exp_avg", "exp_avg_sq")}
        adam.state[param] = {"step": torch.tensor(float(STEPS), device="cpu"), **kept}
    train(adam, by_hand, STEPS, gradients)
    for change, equal in ((lambda optimizer: None, True), (with_wrong_moments, False)):
        found = moved(by_checkpoint, OURS[source], ADAMS[target], tmp_path / "a", change)
        assert all(torch.equal(x, y) for x, y in zip(found, by_hand, strict=True)) == equal


@WAYS
@pytest.mark.parametrize("name", ["NAdamW", "AdamW"])
def test_what_only_ours_keeps_is_not_taken_back_from_stock(name, way, tmp_path):
    ours, params, gradients = begun(lambda params: NAdamW(params, use_ema=True, **COMMON))
    stock = {**TWINS, **ADAMS}[name](params)
    if way is natively:
        stock.load_state_dict(ours.state_dict())
        assert "ema" in stock.state[params[0]]
    else:
        nadam.checkpoint.save(tmp_path / "a", ours)
        with pytest.warns(UserWarning, match="averages|settings differ"):
            nadam.checkpoint.load(tmp_path / "a", stock)
    train(stock, params, STEPS, gradients)
    nadam.checkpoint.save(tmp_path / "b", stock)
    back = OURS["NAdamW"](params)
    nadam.checkpoint.load(tmp_path / "b", back)
    for entry in back.state.values():
        assert float(entry["mu_product"]) == pytest.approx(0.9 ** (2 * STEPS))
    with pytest.raises(ValueError, match="no moving average"):
        nadam.checkpoint.load(tmp_path / "b", NAdamW(params, use_ema=True, **COMMON))


def test_state_of_amsgrad_is_refused(tmp_path):
    adam, _, _ = begun(lambda params: torch.optim.Adam(params, amsgrad=True))
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        nadam.checkpoint.save(tmp_path / "a", adam)


def test_amsgrad_does_not_go_on_from_what_lacks_its_state(tmp_path):
    ours, _, _ = begun(lambda params: NAdam(params, lr=0.02))
    adam, params, _ = begun(lambda params: torch.optim.Adam(params, lr=0.02, amsgrad=True))
    nadam.checkpoint.save(tmp_path / "a", ours)
    before = [adam.state[param]["exp_avg"].clone() for param in params]
    with pytest.raises(ValueError, match="amsgrad=True: expected False"):
        nadam.checkpoint.load(tmp_path / "a", adam)
    assert all(torch.equal(x, adam.state[param]["exp_avg"]) for x, param in zip(before, params, strict=True))


def test_settings_that_differ_are_named_but_none_that_adam_has_not(tmp_path):
    ours, _, _ = begun(OURS["NAdamW"])
    nadam.checkpoint.save(tmp_path / "a", ours)
    with pytest.warns(
        UserWarning, match=r"kept: decoupled_weight_decay=False here, True in the state; weight_d.*=0.3 here, 0.1"
    ):
        nadam.checkpoint.load(tmp_path / "a", torch.optim.Adam(parameters(), lr=0.02, weight_decay=0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nadam.checkpoint.load(tmp_path / "a", torch.optim.AdamW(parameters(), lr=0.02, weight_decay=0.1))


@pytest.mark.parametrize("params", [[torch.ones(3)], {"w": 1.0}, {0: torch.ones(3)}, [("w",)]])
def test_parameters_without_names_are_refused(params, tmp_path):
    ours, _, _ = begun(OURS["NAdam"])
    with pytest.raises(TypeError, match="params: expected a model, a dict of tensors by name or pairs"):
        nadam.checkpoint.save(tmp_path / "a", ours, params)
    assert not (tmp_path / "a").exists()
