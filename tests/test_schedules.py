"""Learning-rate schedules against Keras's, against their formulas, and through saving and loading."""

import inspect
import json
import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest

from nadam.core import schedules
from nadam.core.config import deserialize, serialize
from nadam.core.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

# Learning rates are floats throughout: Keras casts every other argument to the type of initial_learning_rate,
# so that a warm-up from int 0 to 0.1 stays at 0 for ever there (see test_an_int_rate_is_a_number).
CASES = [
    ("ExponentialDecay", (0.1, 100, 0.96), {}),
    ("ExponentialDecay", (0.1, 7, 0.5), {"staircase": True}),
    ("ExponentialDecay", (1e-3, 90, 1.5), {"name": "grow"}),
    ("ExponentialDecay", (2.0, 2.5, 0.99), {}),
    ("InverseTimeDecay", (0.1, 1.0, 0.5), {}),
    ("InverseTimeDecay", (0.3, 13, 2.0), {"staircase": True}),
    ("PiecewiseConstantDecay", ([10, 50, 51], [1.0, 0.5, 0.25, 0.1]), {}),
    ("PiecewiseConstantDecay", ([0], [0.1, 0.01]), {"name": "after one"}),
    ("PiecewiseConstantDecay", ([10.5, 20.0], [0.1, 0.2, 0.3]), {}),
    ("PolynomialDecay", (0.1, 60), {}),
    ("PolynomialDecay", (0.1, 60), {"end_learning_rate": 0.01, "power": 0.5}),
    ("PolynomialDecay", (0.1, 60), {"power": 3.0, "cycle": True}),
    ("PolynomialDecay", (0.01, 49), {"end_learning_rate": 0.1, "cycle": True}),
    ("CosineDecay", (0.1, 150), {}),
    ("CosineDecay", (0.1, 150), {"alpha": 0.2}),
    ("CosineDecay", (0.1, 150), {"warmup_target": 0.4}),
    ("CosineDecay", (0.0, 90), {"alpha": 0.1, "warmup_target": 0.3, "warmup_steps": 30}),
    ("CosineDecay", (0.5, 90), {"warmup_target": 0.1, "warmup_steps": 77}),
    ("CosineDecayRestarts", (0.1, 10), {}),
    ("CosineDecayRestarts", (0.1, 10), {"t_mul": 1.0, "m_mul": 0.9}),
    ("CosineDecayRestarts", (0.1, 8), {"t_mul": 1.5, "alpha": 0.1}),
    ("CosineDecayRestarts", (0.1, 5), {"t_mul": 3.0, "m_mul": 0.5}),
    ("CosineDecayRestarts", (0.2, 20), {"t_mul": 1.1, "m_mul": 1.2, "alpha": 0.05}),
]
NAMES = sorted({name for name, _, _ in CASES})
each_case = pytest.mark.parametrize(
    ("name", "args", "kwargs"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)

# Every step until the first decays end, then a sample: Keras's schedules trace anew at every call on JAX.
STEPS = (*range(120), *range(120, 400, 13))

# Ten ulps: the formulas have up to ten roundings and are not written here as they are in the package.
FLOAT64 = 10 * 2.0**-52


def restart_of(step, first, t_mul):
    """Exact (index, start, length) of the decay that holds a step; t_mul is the decimal that was written."""
    index, start, length = 0, Fraction(0), Fraction(str(first))
    while step >= start + length:
        index, start, length = index + 1, start + length, length * Fraction(str(t_mul))
    return index, start, length


def compared_steps(schedule):
    """All steps, but for those of a restart: on some backends Keras is one step late with them."""
    if not isinstance(schedule, CosineDecayRestarts):
        return STEPS
    restarts = {step for step in STEPS if restart_of(step, schedule.first_decay_steps, schedule.t_mul)[1] == step}
    return [step for step in STEPS if step == 0 or step not in restarts]


def assert_agrees(rates, expected, schedule):
    # Keras rounds every intermediate to float32, half an ulp (6e-8) each, up to eight of them in a row; near
    # the bottom of a curve their sum is small only beside its height. The position inside a geometric row of
    # restarts is a difference of numbers 1 / (t_mul - 1) times as large.
    t_mul = getattr(schedule, "t_mul", 1.0)
    ulps = 4 * max(1.0, 1.0 if t_mul == 1.0 else 1.0 / abs(t_mul - 1.0))
    np.testing.assert_allclose(rates, expected, rtol=0, atol=ulps * 2.0**-23 * np.abs(expected).max())


@pytest.fixture
def stock():
    return pytest.importorskip("keras").optimizers.schedules


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_keras_s(name, stock):
    ours = inspect.signature(getattr(schedules, name)).parameters.values()
    theirs = inspect.signature(getattr(stock, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@each_case
def test_rates_are_keras_s(name, args, kwargs, stock):
    ours, theirs = getattr(schedules, name)(*args, **kwargs), getattr(stock, name)(*args, **kwargs)
    steps = compared_steps(ours)
    rates = np.array([ours(step) for step in steps])
    assert_agrees(rates, np.array([float(theirs(step)) for step in steps]), ours)

    one_step_late = np.array([ours(step + 1) for step in steps])
    with pytest.raises(AssertionError):  # so the comparison can fail
        assert_agrees(one_step_late, rates, ours)


@each_case
def test_a_rate_is_a_plain_float_whatever_the_step_is(name, args, kwargs):
    schedule = getattr(schedules, name)(*args, **kwargs)
    for step in (0, 10, 399):
        rates = [schedule(kind(step)) for kind in (int, float, np.int32, np.int64, np.float32, np.array)]
        assert rates == [schedule(step)] * len(rates)
        assert {type(rate) for rate in rates} == {float}


def test_exponential_decay_at_chosen_steps():
    smooth, stairs = ExponentialDecay(0.1, 100, 0.5), ExponentialDecay(0.1, 100, 0.5, staircase=True)
    assert [smooth(step) for step in (0, 100, 300)] == [0.1, 0.05, 0.0125]
    assert smooth(50) == pytest.approx(0.1 * math.sqrt(0.5), rel=FLOAT64)
    assert [stairs(step) for step in (0, 99, 100, 199, 200)] == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert [ExponentialDecay(0.1, 100, 0.0)(step) for step in (0, 1)] == [0.1, 0.0]
    # Python's own power raises OverflowError there; Keras gives inf.
    assert ExponentialDecay(0.1, 1, 2.0)(5000) == math.inf
    assert ExponentialDecay(0.1, 1, 0.5)(5000) == 0.0


def test_inverse_time_decay_at_chosen_steps():
    smooth, stairs = InverseTimeDecay(0.1, 10, 1.0), InverseTimeDecay(0.1, 10, 1.0, staircase=True)
    assert [smooth(step) for step in (0, 5, 10, 30)] == [0.1, 0.1 / 1.5, 0.05, 0.025]
    assert [stairs(step) for step in (0, 9, 10, 39)] == [0.1, 0.1, 0.05, 0.025]


def test_piecewise_constant_decay_at_its_boundaries():
    schedule = PiecewiseConstantDecay([100, 110], [1.0, 0.5, 0.1])
    assert [schedule(step) for step in (0, 100, 101, 110, 111, 10**9)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    assert PiecewiseConstantDecay([], [0.25])(7) == 0.25


def test_polynomial_decay_at_chosen_steps():
    schedule = PolynomialDecay(0.5, 100, end_learning_rate=0.25, power=2.0)
    assert [schedule(step) for step in (0, 50, 100, 101, 10**9)] == [0.5, 0.3125, 0.25, 0.25, 0.25]
    cycling = PolynomialDecay(0.5, 100, end_learning_rate=0.25, cycle=True)
    # Past the end the line runs from 0.5 at step 0 to 0.25 at the next multiple of decay_steps.
    assert [cycling(step) for step in (0, 50, 100, 150, 200, 225)] == [0.5, 0.375, 0.25, 0.3125, 0.25, 0.3125]
    # 3 / 0.1 need not be whole: neither a complex number nor a negative one may come of it.
    third = PolynomialDecay(0.5, 0.1, end_learning_rate=0.0, power=0.5, cycle=True)
    assert third(3) == pytest.approx(0.0, abs=1e-7)  # the root of an ulp
    assert PolynomialDecay(0.5, 100, power=0.0)(100) == 0.5


def test_cosine_decay_at_chosen_steps():
    schedule = CosineDecay(0.0, 100, alpha=0.25, warmup_target=0.4, warmup_steps=10)
    assert [schedule(step) for step in (0, 5, 10)] == [0.0, 0.2, 0.4]
    assert schedule(9) == pytest.approx(0.36, rel=FLOAT64)
    assert schedule(60) == pytest.approx(0.4 * 0.625, rel=FLOAT64)
    assert schedule(35) == pytest.approx(0.4 * (0.75 * (0.5 + math.sqrt(0.125)) + 0.25), rel=FLOAT64)
    assert [schedule(step) for step in (110, 111, 10**9)] == [0.1, 0.1, 0.1]
    downwards = CosineDecay(0.5, 100, warmup_target=0.25, warmup_steps=4)
    assert [downwards(step) for step in (0, 1, 4, 104)] == [0.5, 0.4375, 0.25, 0.0]
    assert CosineDecay(0.0, 100, warmup_target=0.4)(0) == 0.4  # no steps to warm up in: at the target at once


@pytest.mark.parametrize("t_mul", [0.5, 0.8, 1, 1.0, 1.05, 1.1, 1.25, 1.3, 1.5, 2, 3.0, 7.0, 10.0])
@pytest.mark.parametrize("first", [1, 3, 10, 1000])
def test_restarts_come_at_their_very_step(first, t_mul):
    schedule = CosineDecayRestarts(0.5, first, t_mul=t_mul, m_mul=0.75, alpha=0.125)
    end = first / (1 - Fraction(str(t_mul))) if t_mul < 1 else math.inf
    # With t_mul < 1 the last decays are shorter than a step, and the very last endless in number.
    steps = [step for step in {*range(50), *range(50, 3000, 197)} if step < 0.999 * end]
    if t_mul >= 1:
        start, length = Fraction(0), Fraction(first)
        for _ in range(12):
            start, length, ended = start + length, length * Fraction(str(t_mul)), length
            if start.denominator == 1 and start < 10**9:
                steps += [int(start) - 1, int(start), int(start) + 1]
                assert ended < 2 or schedule(int(start)) > schedule(int(start) - 1)
    for step in steps:
        index, start, length = restart_of(step, first, t_mul)
        height = 0.75**index * (1 + math.cos(math.pi * float((step - start) / length))) / 2
        # The position in a geometric row is a difference of numbers 1 / |t_mul - 1| times as large, and its
        # error counts pi times; with t_mul < 1, relative to decays t_mul**index as long.
        error = FLOAT64 * 4 * max(1, 1 / abs(t_mul - 1) if t_mul != 1 else 1) * max(1, float(first / length))
        assert schedule(step) == pytest.approx(0.5 * (0.875 * height + 0.125), rel=0, abs=error), step


def test_restarts_that_crowd_together_end_at_the_minimum():
    schedule = CosineDecayRestarts(0.5, 4, t_mul=0.5, alpha=0.25)
    assert [schedule(step) for step in (0, 4, 6, 7)] == [0.5, 0.5, 0.5, 0.5]
    assert [schedule(step) for step in (8, 9, 10**9)] == [0.125, 0.125, 0.125]  # Keras: NaN


def test_an_int_rate_is_a_number():
    """Keras casts the target to int, too, and this example of its documentation never leaves 0."""
    schedule = CosineDecay(0, 1000, warmup_target=0.1, warmup_steps=1000)
    assert [schedule(step) for step in (0, 500, 1000)] == [0.0, 0.05, 0.1]
    assert ExponentialDecay(1, 100, 0.5)(100) == 0.5
    assert PiecewiseConstantDecay([5], [1, 0.5])(6) == 0.5


@each_case
def test_configs_are_keras_s_and_make_the_same_schedule(name, args, kwargs, stock):
    ours, theirs = getattr(schedules, name)(*args, **kwargs), getattr(stock, name)(*args, **kwargs)
    config = ours.get_config()
    assert list(config.items()) == list(theirs.get_config().items())
    through_json = json.loads(json.dumps(config))
    assert through_json == config
    again = type(ours).from_config(through_json)
    assert again == ours
    assert [again(step) for step in STEPS] == [ours(step) for step in STEPS]
    assert getattr(stock, name).from_config(config).get_config() == config
    assert deserialize(json.loads(json.dumps(serialize(ours)))) == ours
    assert deserialize(json.loads(json.dumps(stock.serialize(theirs)))) == ours


def test_numpy_arguments_become_plain_numbers():
    config = ExponentialDecay(np.float32(0.5), np.int64(10), np.array(0.25), staircase=np.True_).get_config()
    assert json.loads(json.dumps(config)) == {
        "initial_learning_rate": 0.5,
        "decay_steps": 10,
        "decay_rate": 0.25,
        "staircase": True,
        "name": "ExponentialDecay",
    }
    piecewise = PiecewiseConstantDecay(np.array([1, 2]), (np.float64(0.5), 0.25, np.float32(0.125)))
    assert json.dumps(piecewise.get_config()["values"]) == "[0.5, 0.25, 0.125]"
    assert json.dumps(piecewise.get_config()["boundaries"]) == "[1, 2]"


def test_a_config_is_a_copy():
    boundaries = [5]
    schedule = PiecewiseConstantDecay(boundaries, [0.1, 0.2])
    boundaries[0] = 50
    schedule.get_config()["boundaries"][0] = 500
    assert schedule(6) == 0.2


def test_equality_hash_and_repr():
    schedule = ExponentialDecay(0.1, 100, 0.5)
    assert schedule == ExponentialDecay(0.1, 100.0, 0.5)
    assert hash(schedule) == hash(ExponentialDecay(0.1, 100.0, 0.5))
    assert schedule != ExponentialDecay(0.1, 101, 0.5)
    assert schedule != InverseTimeDecay(0.1, 100, 0.5, name="ExponentialDecay")
    assert schedule != "ExponentialDecay"
    for name, args, kwargs in CASES:
        made = getattr(schedules, name)(*args, **kwargs)
        assert eval(repr(made), vars(schedules)) == made


class Halving(LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / 2**step

    def get_config(self):
        return {"rate": self.rate}


class Doubling:
    """Derives from nothing."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * 2**step

    def get_config(self):
        return {"rate": self.rate}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Unsaved(LearningRateSchedule):
    def __call__(self, step):
        return 0.1


def test_a_schedule_is_described_by_class_and_config():
    assert serialize(Halving(0.5)) == {"class_name": "Halving", "module": __name__, "config": {"rate": 0.5}}


def test_a_subclass_comes_back_by_itself():
    again = deserialize(serialize(Halving(0.5)))
    assert type(again) is Halving
    assert again(3) == 0.0625


def test_a_subclass_in_a_function_comes_back_by_itself_or_by_its_short_name():
    class Local(Halving):
        pass

    class Other(Halving):
        pass

    saved = serialize(Local(0.5))
    assert type(deserialize(saved)) is Local
    assert type(deserialize(saved, custom_objects={"Local": Other})) is Other
    assert type(deserialize(saved, custom_objects={saved["class_name"]: Other})) is Other


def test_two_classes_of_one_name_are_told_apart():
    mine = type("ExponentialDecay", (Halving,), {})
    assert type(deserialize(serialize(mine(0.5)))) is mine
    assert type(deserialize(serialize(ExponentialDecay(0.1, 100, 0.5)))) is ExponentialDecay


def test_custom_objects_come_first():
    class Instead(Halving):
        pass

    assert type(deserialize(serialize(Halving(0.5)), custom_objects={"Halving": Instead})) is Instead


def test_an_object_of_another_family_needs_custom_objects():
    saved = serialize(Doubling(0.5))
    assert deserialize(saved, custom_objects={"Doubling": Doubling})(3) == 4.0
    with pytest.raises(ValueError, match=r"class_name='Doubling': .*custom_objects=\{'Doubling': Doubling\}"):
        deserialize(saved)


def test_a_schedule_of_keras_s_own_can_be_saved(stock):
    saved = serialize(stock.CosineDecay(0.1, 100))
    assert deserialize(saved, custom_objects={"CosineDecay": stock.CosineDecay})(50) == pytest.approx(0.05)


def test_nothing_is_imported():
    assert "this" not in sys.modules
    with pytest.raises(ValueError, match="class_name='Zen'"):
        deserialize({"class_name": "Zen", "module": "this", "config": {}})
    assert "this" not in sys.modules


def test_a_missing_module_means_the_schedules_here():
    saved = {"class_name": "PolynomialDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 10}}
    assert deserialize(saved) == PolynomialDecay(0.1, 10)
    with pytest.raises(ValueError, match=r"class_name='PolynomialDecay': .* already defined in mine"):
        deserialize({**saved, "module": "mine"})


@pytest.mark.parametrize(
    "saved", [None, "CosineDecay", {}, {"class_name": "CosineDecay"}, {"class_name": 3, "config": {}}]
)
def test_what_no_schedule_wrote_is_refused(saved):
    with pytest.raises(ValueError, match=r"config=.*: expected a dict with class_name and config"):
        deserialize(saved)


def test_a_custom_object_must_be_able_to_read_a_config():
    with pytest.raises(ValueError, match=r"custom_objects\['Halving'\]=.*from_config"):
        deserialize(serialize(Halving(0.5)), custom_objects={"Halving": len})


def test_what_cannot_be_saved_says_so():
    with pytest.raises(ValueError, match=r"cannot be saved.*get_config"):
        serialize(lambda step: 0.1)
    with pytest.raises(NotImplementedError, match=r"Unsaved cannot be saved.*get_config"):
        serialize(Unsaved())
    unreadable = type("Unreadable", (), {"get_config": lambda self: {}})()
    with pytest.raises(ValueError, match=r"cannot be saved.*from_config"):
        serialize(unreadable)


def test_the_base_has_no_rates():
    with pytest.raises(NotImplementedError, match=r"LearningRateSchedule must define __call__"):
        LearningRateSchedule()(0)
    with pytest.raises(NotImplementedError, match=r"Silent must define __call__"):
        type("Silent", (LearningRateSchedule,), {})()(0)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("ExponentialDecay", {"decay_steps": 0}, "decay_steps=0: expected decay_steps > 0"),
        ("ExponentialDecay", {"decay_steps": -1.5}, "decay_steps=-1.5: expected decay_steps > 0"),
        ("ExponentialDecay", {"decay_steps": math.inf}, "decay_steps=inf: expected a finite number"),
        ("ExponentialDecay", {"decay_steps": None}, "decay_steps=None: expected a finite number"),
        ("ExponentialDecay", {"decay_steps": 10**400}, f"decay_steps={10**400}: expected a finite number"),
        ("ExponentialDecay", {"decay_rate": -0.5}, "decay_rate=-0.5: expected decay_rate >= 0"),
        ("ExponentialDecay", {"decay_rate": math.nan}, "decay_rate=nan: expected a finite number"),
        (
            "ExponentialDecay",
            {"initial_learning_rate": "0.1"},
            "initial_learning_rate='0.1': expected a finite number",
        ),
        (
            "ExponentialDecay",
            {"initial_learning_rate": 1j},
            "initial_learning_rate=1j: expected a finite number",
        ),
        ("ExponentialDecay", {"decay_rate": True}, "decay_rate=True: expected a finite number"),
        ("ExponentialDecay", {"staircase": "yes"}, "staircase='yes': expected True or False"),
        ("ExponentialDecay", {"staircase": None}, "staircase=None: expected True or False"),
        ("InverseTimeDecay", {"decay_steps": 0}, "decay_steps=0: expected decay_steps > 0"),
        ("InverseTimeDecay", {"decay_rate": -1}, "decay_rate=-1: expected decay_rate >= 0"),
        ("InverseTimeDecay", {"staircase": 2}, "staircase=2: expected True or False"),
        ("PolynomialDecay", {"decay_steps": 0}, "decay_steps=0: expected decay_steps > 0"),
        ("PolynomialDecay", {"power": -1.0}, "power=-1.0: expected power >= 0"),
        (
            "PolynomialDecay",
            {"end_learning_rate": math.inf},
            "end_learning_rate=inf: expected a finite number",
        ),
        ("PolynomialDecay", {"cycle": "no"}, "cycle='no': expected True or False"),
        ("CosineDecay", {"decay_steps": 0}, "decay_steps=0: expected decay_steps > 0"),
        ("CosineDecay", {"warmup_steps": -1}, "warmup_steps=-1: expected warmup_steps >= 0"),
        (
            "CosineDecay",
            {"warmup_steps": 5},
            "warmup_steps=5: expected a warmup_target, the peak, with it",
        ),  # Keras: none
        ("CosineDecay", {"warmup_target": math.nan}, "warmup_target=nan: expected a finite number"),
        ("CosineDecay", {"alpha": None}, "alpha=None: expected a finite number"),
        (
            "CosineDecayRestarts",
            {"first_decay_steps": 0},
            "first_decay_steps=0: expected first_decay_steps > 0",
        ),
        ("CosineDecayRestarts", {"t_mul": 0.0}, "t_mul=0.0: expected t_mul > 0"),
        ("CosineDecayRestarts", {"m_mul": -0.1}, "m_mul=-0.1: expected m_mul >= 0"),
        (
            "PiecewiseConstantDecay",
            {"boundaries": [5, 5]},
            "boundaries=[5, 5]: expected boundaries strictly increasing",
        ),
        (
            "PiecewiseConstantDecay",
            {"boundaries": [5, 3]},
            "boundaries=[5, 3]: expected boundaries strictly increasing",
        ),
        (
            "PiecewiseConstantDecay",
            {"boundaries": [5, math.nan]},
            "boundaries[1]=nan: expected a finite number",
        ),
        ("PiecewiseConstantDecay", {"values": [1.0, None, 0.5]}, "values[1]=None: expected a finite number"),
        ("PiecewiseConstantDecay", {"values": 0.1}, "values=0.1: expected a list of numbers"),
        (
            "PiecewiseConstantDecay",
            {"values": [0.1, 0.2]},
            "values=[0.1, 0.2]: expected len(values) == len(boundaries) + 1 == 3",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_range(name, bad, message):
    good = {
        "ExponentialDecay": {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5},
        "InverseTimeDecay": {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5},
        "PolynomialDecay": {"initial_learning_rate": 0.1, "decay_steps": 10},
        "CosineDecay": {"initial_learning_rate": 0.1, "decay_steps": 10},
        "CosineDecayRestarts": {"initial_learning_rate": 0.1, "first_decay_steps": 10},
        "PiecewiseConstantDecay": {"boundaries": [5, 10], "values": [0.1, 0.2, 0.3]},
    }[name]
    getattr(schedules, name)(**good)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(schedules, name)(**{**good, **bad})
