"""State out and in: exact resumption, and what is refused, by name, with nothing changed."""

import copy
import json
import pickle

import numpy as np
import pytest

import nadam
from arguments import ARGUMENTS
from cases import BFLOAT16, draw_grads, draw_params, same_bits
from test_faults import unchanged

SHAPES = [(4, 3), (7,)]


def built(settings, seed=0, named=False, dtype=np.float32):
    params = draw_params(np.random.default_rng(seed), SHAPES, dtype)
    optimizer = nadam.Nadam(**settings)
    optimizer.build({"kernel": params[0], "bias": params[1]} if named else params)
    return optimizer, params


def some_grads(params, steps, seed=1):
    rng = np.random.default_rng(seed)
    return [draw_grads(rng, params) for _ in range(steps)]


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_training_goes_on_bit_for_bit(argument, steps):
    settings = ARGUMENTS[argument]
    optimizer, params = built(settings)
    grads = some_grads(params, 9)
    for g in grads[:steps]:
        optimizer.apply(g)
    state, kept = optimizer.state_dict(), [p.copy() for p in params]
    for g in grads[steps:]:
        optimizer.apply(g)
    resumed = nadam.Nadam(**settings)
    resumed.build(kept)
    resumed.load_state_dict(state)
    for g in grads[steps:]:
        resumed.apply(g)
    assert all(same_bits(a, b) for a, b in zip(params, kept, strict=True))
    assert all(same_bits(a, b) for a, b in zip(optimizer.variables, resumed.variables, strict=True))


def test_the_state_is_a_copy():
    optimizer, params = built({})
    optimizer.apply(some_grads(params, 1)[0])
    state = optimizer.state_dict()
    before = state["state"]["0"]["exp_avg"].copy()
    optimizer.apply(some_grads(params, 1)[0])
    assert np.array_equal(before, state["state"]["0"]["exp_avg"])


def test_parameters_are_matched_by_name():
    optimizer, params = built({}, named=True)
    optimizer.apply(some_grads(params, 1)[0])
    state = optimizer.state_dict()
    state["state"] = dict(reversed(state["state"].items()))
    other = nadam.Nadam()
    other.build({"bias": params[1].copy(), "kernel": params[0].copy()})
    other.load_state_dict(state)
    assert other._parameters.entries[0].exp_avg.shape == params[1].shape
    assert same_bits(other._parameters.entries[0].exp_avg, optimizer._parameters.entries[1].exp_avg)


def test_float32_state_stays_float32_beside_bfloat16_parameters():  # 24
    optimizer, params = built({}, dtype=BFLOAT16)
    optimizer.apply(some_grads(params, 1)[0])
    other, _ = built({}, dtype=BFLOAT16)
    other.load_state_dict(optimizer.state_dict())
    assert other._parameters.entries[0].exp_avg.dtype == np.float32
    assert same_bits(other._parameters.entries[0].exp_avg, optimizer._parameters.entries[0].exp_avg)


def change(state, path, value):
    *folders, last = path
    for folder in folders:
        state = state[folder]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value(state[last]) if callable(value) else value


def with_nan(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


FIRST = ("state", "kernel", "exp_avg")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optimizer",), "adam", "optimizer='adam'"),
        (("format",), 2, "format=2"),
        (("iteration",), -1, "iteration=-1"),
        (("iteration",), 1.5, "iteration=1.5"),
        (("iteration",), KeyError, "iteration=None"),
        (("momentum_product",), 1.5, "momentum_product=1.5"),
        (("momentum_product",), float("nan"), "momentum_product=nan"),
        (("skipped_steps",), None, "skipped_steps=None"),
        (("learning_rate",), -1.0, "learning_rate=-1.0"),
        (("state",), KeyError, "'state' is missing"),
        (("state", "bias"), KeyError, r"missing \['bias'\]"),
        (("state", "more"), {}, r"not expected \['more'\]"),
        (FIRST, KeyError, r"slots of 'kernel': missing \['exp_avg'\]"),
        (("state", "kernel", "ema"), np.zeros((4, 3)), r"not expected \['ema'\]"),
        (FIRST, lambda a: a.T, "kernel.exp_avg: shape"),
        (FIRST, lambda a: a[:-1], "kernel.exp_avg: shape"),
        (FIRST, lambda a: a.astype(np.float64), "kernel.exp_avg: dtype float64"),
        (FIRST, with_nan, "kernel.exp_avg: not all of its values are finite"),
        (("state", "kernel", "exp_avg_sq"), lambda a: -a, "kernel.exp_avg_sq: a negative value"),
        (("accumulated",), ["none"], "no parameters with an accumulator"),
        (("accumulated",), ["kernel"], "no parameters with an accumulator"),
    ],
)
def test_a_state_that_is_wrong_is_refused(path, value, message):  # 23
    optimizer, params = built({}, named=True)
    optimizer.apply(some_grads(params, 1)[0])
    state = optimizer.state_dict()
    if value is KeyError or path[-1] not in ("more", "ema"):
        change(state, path, value)
    else:
        change({"x": state}, ("x", *path[:-1]), lambda d: {**d, path[-1]: value})
    optimizer.apply(some_grads(params, 1)[0])
    with unchanged(optimizer, params), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_an_ema_state_does_not_load_into_accumulation():
    optimizer, _params = built({"use_ema": True})
    other, other_params = built({"gradient_accumulation_steps": 2})
    with unchanged(other, other_params), pytest.raises(ValueError, match=r"accumulator.*ema"):
        other.load_state_dict(optimizer.state_dict())


def test_state_needs_a_built_optimizer():
    with pytest.raises(ValueError, match="not built"):
        nadam.Nadam().state_dict()
    with pytest.raises(ValueError, match="not built"):
        nadam.Nadam().load_state_dict({})
    optimizer, _ = built({})
    with pytest.raises(ValueError, match="optimizer"):
        optimizer.load_state_dict([1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_on_by_themselves(duplicate, steps):
    optimizer, params = built({"use_ema": True, "gradient_accumulation_steps": 2})
    grads = some_grads(params, 6)
    for g in grads[:steps]:
        optimizer.apply(g)
    optimizer2, params2 = duplicate((optimizer, params))
    for g in grads[steps:]:
        optimizer2.apply(g)
    assert not same_bits(params[0], params2[0])
    for g in grads[steps:]:
        optimizer.apply(g)
    assert all(same_bits(a, b) for a, b in zip(params, params2, strict=True))


class Warm(nadam.schedules.LearningRateSchedule):
    def __init__(self, peak):
        self.peak = peak

    def __call__(self, step):
        return self.peak * min(1.0, (step + 1) / 10)

    def get_config(self):
        return {"peak": self.peak}


def half():
    return 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 0.1, "beta_1": 0.8, "clipnorm": 1.0, "use_ema": True, "name": "mine"},
        {"learning_rate": nadam.schedules.CosineDecay(0.0, 100, warmup_target=0.1, warmup_steps=10)},
        {"learning_rate": nadam.schedules.PiecewiseConstantDecay([3, 5], [0.1, 0.01, 0.001])},
        {"learning_rate": Warm(0.1), "momentum_decay": 0.004, "bias_correction": "adam", "skip_nonfinite": True},
        {"beta_1": half, "beta_2": half},
    ],
    ids=["defaults", "numbers", "cosine", "piecewise", "own schedule", "functions"],
)
def test_a_config_makes_the_same_optimizer(settings):
    optimizer = nadam.Nadam(**settings)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = nadam.Nadam.from_config(config, custom_objects={"half": half})
    assert again.get_config() == optimizer.get_config()
    params, other = [np.ones(3)], [np.ones(3)]
    for _ in range(5):
        optimizer.apply([np.full(3, 2.0)], params)
        again.apply([np.full(3, 2.0)], other)
    assert same_bits(params[0], other[0])


def test_a_callable_that_cannot_be_saved_says_so():
    with pytest.raises(ValueError, match=r"learning_rate=.*lambda.*cannot be saved"):
        nadam.Nadam(lambda: 0.1).get_config()

    class Own(nadam.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    with pytest.raises(ValueError, match=r"learning_rate=.*cannot be saved"):
        nadam.Nadam(Own()).get_config()
    with pytest.raises(ValueError, match="custom_objects"):
        nadam.Nadam.from_config(nadam.Nadam(beta_1=half).get_config())


def test_the_learning_rate_of_a_schedule_is_not_settable():
    optimizer = nadam.Nadam(Warm(1.0))
    assert optimizer.learning_rate == 0.1
    with pytest.raises(TypeError, match=r"learning_rate=0\.5: not settable"):
        optimizer.learning_rate = 0.5
    optimizer.learning_rate = Warm(2.0)
    assert optimizer.learning_rate == 0.2


def test_the_learning_rate_is_part_of_the_state():
    optimizer, _ = built({})
    optimizer.learning_rate = 0.125
    other, _ = built({})
    other.load_state_dict(optimizer.state_dict())
    assert other.learning_rate == 0.125
