"""Every argument of the constructor, alone, in every dtype, against the reference."""

import math

import numpy as np
import pytest

import nadam
from agree import step_against_reference
from arguments import ARGUMENTS, OPTIONS, Case
from cases import DTYPES, draw_grads, draw_params


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])  # which is in test_hosts_agree.py
@pytest.mark.parametrize("option", ARGUMENTS)
def test_an_argument_does_in_every_dtype_what_the_reference_does(option, dtype):
    step_against_reference("numpy", Case(option, OPTIONS[option], dtype))


@pytest.mark.parametrize("argument", [a for a in ARGUMENTS if a not in ("defaults", "skip_nonfinite")])
def test_an_argument_changes_the_result(argument):
    results = []
    for settings in ({}, ARGUMENTS[argument]):
        rng = np.random.default_rng(0)
        params = draw_params(rng, [(50,)], np.float32)
        optimizer = nadam.Nadam(**settings)
        for _ in range(6):
            optimizer.apply(draw_grads(rng, params), params)
        optimizer.finalize_variable_values()
        results.append(params[0])
    assert not np.array_equal(*results)


@pytest.mark.parametrize(
    ("momentum_decay", "bias_correction", "after_1", "after_10", "after_1000"),
    [
        (1.0, "nadam", 0.998937212, 0.995857077, 0.576186592),
        (0.004, "nadam", 0.998943549, 0.995777853, 0.576271844),
        (math.inf, "nadam", 0.998526316, 0.993478193, 0.572792249),
        (math.inf, "adam", 0.998100001, 0.992333526, 0.571510364),
    ],
)
def test_check_values(momentum_decay, bias_correction, after_1, after_10, after_1000):
    param = np.ones(1)
    optimizer = nadam.Nadam(1e-3, momentum_decay=momentum_decay, bias_correction=bias_correction)
    seen = {}
    for t in range(1, 1001):
        optimizer.apply([np.array([0.1 + 0.3 * math.sin(t)])], [param])
        seen[t] = param[0]
    assert [seen[1], seen[10], seen[1000]] == pytest.approx([after_1, after_10, after_1000], abs=6e-10)


def test_weight_decay_comes_before_the_step_and_only_with_a_gradient():
    params = [np.full(3, 2.0), np.full(3, 2.0)]
    nadam.Nadam(0.1, weight_decay=0.5).apply([np.zeros(3), None], params)
    assert params[0].tolist() == [2.0 * (1 - 0.1 * 0.5)] * 3
    assert params[1].tolist() == [2.0] * 3


@pytest.mark.parametrize("by", ["array", "name", "pattern", "both calls"])
def test_excluded_from_weight_decay(by):
    params = {"dense/kernel": np.ones(2), "dense/bias": np.ones(2), "norm/scale": np.ones(2)}
    optimizer = nadam.Nadam(0.1, weight_decay=0.5)
    excluded = ["dense/bias"]
    if by == "array":
        optimizer.exclude_from_weight_decay(var_list=[params["dense/bias"]])
    elif by == "name":
        optimizer.exclude_from_weight_decay(var_names=["dense/bias"])
    elif by == "pattern":
        optimizer.exclude_from_weight_decay(var_names=["^norm/", "bias$"])
        excluded = ["dense/bias", "norm/scale"]
    else:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.exclude_from_weight_decay(var_list=[params["norm/scale"]])
        excluded = ["dense/bias", "norm/scale"]
    optimizer.apply({name: np.zeros(2) for name in params}, params)
    assert {name for name, param in params.items() if param[0] == 1.0} == set(excluded)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def test_all_may_be_excluded():
    params = [np.ones(2)]
    optimizer = nadam.Nadam(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=params)
    optimizer.apply([np.zeros(2)], params)
    assert params[0].tolist() == [1.0, 1.0]


def test_a_schedule_counts_calls_and_the_iterations_count_updates():
    asked = []

    class Recorder(nadam.schedules.LearningRateSchedule):
        def __call__(self, step):
            asked.append(step)
            return 0.1

    params = [np.ones(2)]
    optimizer = nadam.Nadam(Recorder(), gradient_accumulation_steps=2)
    for _ in range(4):
        optimizer.apply([np.ones(2)], params)
    assert asked == [0, 1, 2, 3]
    assert optimizer.iterations == 2


def test_callables_are_called_at_every_step():
    calls = {"lr": 0, "beta_1": 0, "beta_2": 0}

    def value(name, number):
        calls[name] += 1
        return number

    optimizer = nadam.Nadam(lambda: value("lr", 0.1), lambda: value("beta_1", 0.9), lambda: value("beta_2", 0.99))
    for _ in range(5):
        optimizer.apply([np.ones(2)], [np.ones(2)] if not optimizer.built else None)
    assert calls == {"lr": 5, "beta_1": 5, "beta_2": 5}


@pytest.mark.parametrize("value", [1, np.float32(0.25), np.array(0.5), np.int64(1)])
def test_any_real_scalar_is_a_learning_rate(value):
    optimizer = nadam.Nadam(value)
    assert optimizer.learning_rate == float(value)
    optimizer.learning_rate = value
    assert optimizer.learning_rate == float(value)


def test_a_tensor_beta():
    assert nadam.Nadam(beta_1=np.array(0.5, np.float32)).beta_1 == 0.5


def test_the_average_starts_at_the_parameter_and_is_finalized():
    param = np.full(2, 3.0)
    optimizer = nadam.Nadam(0.1, use_ema=True)
    optimizer.build([param])
    optimizer.finalize_variable_values([param])
    assert param.tolist() == [3.0, 3.0]
    for _ in range(3):
        optimizer.apply([np.ones(2)])
    average = optimizer._parameters.entries[0].ema.copy()
    assert not np.array_equal(average, param)
    optimizer.finalize_variable_values([param])
    assert np.array_equal(average, param)
    with pytest.raises(ValueError, match=r"variables\[0\]"):
        optimizer.finalize_variable_values([np.ones(2)])


def test_a_missing_gradient_counts_as_zero_in_the_mean_of_its_window():
    one, two = np.ones(2), np.ones(2)
    optimizer = nadam.Nadam(0.1, gradient_accumulation_steps=2, epsilon=1.0)
    optimizer.apply([np.full(2, 4.0), None], [one, two])
    optimizer.apply([None, np.full(2, 4.0)])
    whole = [np.ones(2), np.ones(2)]
    nadam.Nadam(0.1, epsilon=1.0).apply([np.full(2, 2.0)] * 2, whole)
    assert one.tolist() == whole[0].tolist()
    assert two.tolist() == whole[1].tolist()


def test_one_bad_gradient_does_not_outlast_its_window():
    param = np.ones(2)
    optimizer = nadam.Nadam(0.1, gradient_accumulation_steps=2)
    optimizer.apply([np.full(2, np.nan)], [param])
    optimizer.apply([np.ones(2)])
    assert not optimizer._parameters.entries[0].accumulator.any()


def test_variables_are_in_the_order_of_keras():
    optimizer = nadam.Nadam(0.5, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build([np.full(2, 7.0), np.zeros((3, 1))])
    shapes = [v.shape for v in optimizer.variables]
    assert shapes == [(), (), (2,), (3, 1), (2,), (3, 1), (2,), (2,), (3, 1), (3, 1), ()]
    assert optimizer.variables[1] == 0.5
    assert optimizer.variables[2].tolist() == [7.0, 7.0]
    assert optimizer.variables[-1] == 1.0
    assert len(nadam.Nadam(lambda step: 0.1).variables) == 1


def test_apply_gradients_takes_pairs():
    params, other = [np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)]
    grads = [np.ones(2), np.ones(3)]
    assert nadam.Nadam().apply_gradients(zip(grads, params, strict=True)) == 1
    nadam.Nadam().apply(grads, other)
    assert all(np.array_equal(a, b) for a, b in zip(params, other, strict=True))


def test_a_part_of_the_parameters_may_be_trained():
    params = [np.ones(2), np.ones(3)]
    optimizer = nadam.Nadam(0.1)
    optimizer.build(params)
    optimizer.apply([np.ones(3)], [params[1]])
    assert params[0].tolist() == [1.0, 1.0]
    assert params[1][0] < 1.0


def test_last_step_tells_what_was_done():
    optimizer = nadam.Nadam(lambda step: 0.1 * (step + 1), global_clipnorm=1.0, skip_nonfinite=True)
    assert optimizer.last_step == nadam.StepReport(0, 0.1, None, None, 0)
    param = np.ones(2)
    optimizer.apply([np.array([3.0, 4.0])], [param])
    assert optimizer.last_step == nadam.StepReport(1, 0.1, 5.0, 0.2, 0, skipped=False)
    optimizer.apply([np.array([np.inf, 4.0])])
    assert optimizer.last_step == nadam.StepReport(1, 0.2, None, None, 1, skipped=True, nonfinite_param="0")
    plain = nadam.Nadam()
    plain.apply([np.ones(2)], [param])
    assert plain.last_step == nadam.StepReport(1, 0.001, None, None, 0)


def test_scale_loss():
    assert nadam.Nadam(loss_scale_factor=8.0).scale_loss(2.0) == 16.0
    assert nadam.Nadam().scale_loss(2.0) == 2.0


def test_the_name_is_nadam():
    assert nadam.Nadam().name == "nadam"


def test_gradients_are_held_until_the_step_is_done():
    def fresh():
        yield np.full(100_000, 2.0, np.float32)
        yield np.full(3, 4.0, np.float32)

    params, other = [np.ones(100_000, np.float32), np.ones(3, np.float32)], [np.ones(100_000, np.float32), np.ones(3)]
    optimizer = nadam.Nadam(0.1)
    for _ in range(3):
        optimizer.apply(fresh(), params)
    expected = nadam.Nadam(0.1)
    grads = list(fresh())
    for _ in range(3):
        expected.apply(grads, other)
    assert np.array_equal(params[0], other[0])
