"""LossScaleOptimizer: beside Keras's, and at the ends of its range."""

import json

import numpy as np
import pytest

import nadam
from cases import same_bits


def test_beside_keras():
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(10).astype(np.float32)
    mine, theirs = start.copy(), keras.Variable(start)
    ours = nadam.LossScaleOptimizer(nadam.Nadam(0.01), initial_scale=1024.0, dynamic_growth_steps=3)
    stock = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Nadam(0.01), initial_scale=1024.0, dynamic_growth_steps=3
    )
    ours.build([mine])
    stock.build([theirs])
    for step in range(20):
        grad = rng.standard_normal(10).astype(np.float32)
        if step in (4, 5, 11):
            grad[step % 3] = (np.nan, np.inf, -np.inf)[step % 3]
        assert ours.scale_loss(1.0) == float(stock.scale_loss(1.0))
        ours.apply([grad * np.float32(ours.dynamic_scale)])
        stock.apply([keras.ops.convert_to_tensor(grad * np.float32(float(stock.dynamic_scale)))])
        assert ours.dynamic_scale == float(stock.dynamic_scale)
        assert ours.iterations == int(stock.iterations)
        np.testing.assert_allclose(mine, keras.ops.convert_to_numpy(theirs), atol=2e-6)
    assert ours.iterations == 17
    assert ours.last_step.skipped_steps == 3


def test_a_skipped_call_changes_nothing():
    param = np.ones(3, np.float16)
    optimizer = nadam.LossScaleOptimizer(nadam.Nadam(0.1, use_ema=True))
    optimizer.apply([np.ones(3, np.float16)], [param])
    before = [a.copy() for a in optimizer.variables[2:]], param.copy()
    optimizer.apply([np.array([1, np.inf, 1], np.float16)])
    assert all(same_bits(a, b) for a, b in zip(before[0], optimizer.variables[2:], strict=True))
    assert same_bits(before[1], param)
    assert optimizer.dynamic_scale == 2.0**14


def test_the_scale_never_reaches_zero_or_infinity():
    optimizer = nadam.LossScaleOptimizer(nadam.Nadam(), dynamic_growth_steps=1)
    param = np.ones(1, np.float32)
    for _ in range(300):
        optimizer.apply([np.array([np.nan], np.float32)], [param])
    assert optimizer.dynamic_scale == 2.0**-126
    assert param[0] == 1.0
    for _ in range(600):
        optimizer.apply([np.ones(1, np.float32)], [param])
    assert optimizer.dynamic_scale == 2.0**127
    assert np.isfinite(np.float32(optimizer.dynamic_scale))


def test_unscaling_is_exact():
    one, two = np.ones(5, np.float32), np.ones(5, np.float32)
    plain, scaled = nadam.Nadam(0.1, clipnorm=1.0), nadam.LossScaleOptimizer(nadam.Nadam(0.1, clipnorm=1.0))
    grad = np.linspace(-1, 1, 5, dtype=np.float32)
    for _ in range(5):
        plain.apply([grad], [one])
        scaled.apply([grad * np.float32(scaled.dynamic_scale)], [two])
    assert same_bits(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_scale": 0.0}, "initial_scale=0.0"),
        ({"initial_scale": float("inf")}, "initial_scale=inf"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps=0"),
        ({"dynamic_growth_steps": 2.5}, "dynamic_growth_steps=2.5"),
        ({"clipnorm": 1.0}, "clipnorm"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nadam.LossScaleOptimizer(nadam.Nadam(), **arguments)


def test_it_wraps_only_our_own():
    with pytest.raises(TypeError, match="inner_optimizer"):
        nadam.LossScaleOptimizer("nadam")


def test_config_and_state_go_round():
    param, other = np.ones(3), np.ones(3)
    optimizer = nadam.LossScaleOptimizer(nadam.Nadam(0.1), initial_scale=8.0, dynamic_growth_steps=2)
    grads = [np.ones(3), np.array([1.0, np.nan, 1.0]), np.ones(3), np.ones(3), np.ones(3)]
    for grad in grads[:3]:
        optimizer.apply([grad], [param])
    other[...] = param
    again = nadam.LossScaleOptimizer.from_config(json.loads(json.dumps(optimizer.get_config())))
    assert again.get_config() == optimizer.get_config()
    again.build([other])
    again.load_state_dict(optimizer.state_dict())
    for grad in grads[3:]:
        optimizer.apply([grad])
        again.apply([grad])
    assert same_bits(param, other)
    assert again.dynamic_scale == optimizer.dynamic_scale == 8.0
    with pytest.raises(ValueError, match="dynamic_scale"):
        again.load_state_dict(optimizer.inner_optimizer.state_dict())


def test_what_belongs_to_the_inner_optimizer_is_passed_on():
    params = [np.ones(2), np.ones(2)]
    optimizer = nadam.LossScaleOptimizer(nadam.Nadam(0.1, use_ema=True, weight_decay=0.5, loss_scale_factor=2.0))
    assert optimizer.inner_optimizer.loss_scale_factor is None
    optimizer.exclude_from_weight_decay(var_list=[params[1]])
    optimizer.learning_rate = 0.25
    assert optimizer.apply_gradients([(np.zeros(2), params[0]), (np.zeros(2), params[1])]) == 1
    assert (params[0][0], params[1][0], optimizer.learning_rate) == (1 - 0.5 * 0.25, 1.0, 0.25)
    optimizer.finalize_variable_values(params)
    assert optimizer.built
