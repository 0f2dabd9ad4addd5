"""keras.optimizers.LossScaleOptimizer around Nadam, mixed precision policies, and half-precision variables."""

import keras
import ml_dtypes
import numpy as np
import pytest
from across_backends import data, everything, gradients, numbers, small_model, train

from cases import apart, same_bits
from nadam.keras import Nadam
from reference import Reference

SCALE = 1024.0
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")


def scaled(growth=2000, **settings):
    return keras.optimizers.LossScaleOptimizer(Nadam(**settings), SCALE, growth)


def near(model, reference, ulps):
    """Whether variables and momentum product are the reference's, within some float32 units of 1."""
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    for variable, wanted in zip(numbers(model.trainable_variables), reference.p, strict=True):
        assert apart(variable, wanted, 1.0, np.float32) <= ulps
    assert apart(numbers([inner.variables[-1]])[0], reference.product, 0.0, np.float32) <= ulps
    assert int(inner._iterations) == reference.i


CASES = {
    "plain": {"learning_rate": 0.05},
    "all": {
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "global_clipnorm": 0.5,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_without_a_scale_and_go_on_from_a_file(case, tmp_path):  # row 4
    settings, grads = CASES[case], gradients(9)
    model = small_model(scaled(**settings))
    reference = Reference(numbers(model.trainable_variables), **settings)
    train(model, grads[:5])
    model.save(tmp_path / "a.keras")
    for g in grads[:5]:
        reference.step(g)
    near(model, reference, 4.0 * 5)  # 4 units a step
    assert reference.product < 0.3
    wanted = everything(train(model, grads[5:]))
    for g in grads[5:]:
        reference.step(g)
    near(model, reference, 4.0 * 9)

    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert type(loaded.optimizer.inner_optimizer) is Nadam
    assert all(same_bits(a, b) for a, b in zip(everything(train(loaded, grads[5:])), wanted, strict=True))


def test_gradients_that_are_not_finite_change_nothing_but_the_scale():
    model = train(small_model(scaled(growth=4)), gradients(2))
    outer, inner = model.optimizer, model.optimizer.inner_optimizer
    before = numbers(model.trainable_variables + inner.variables)
    for bad in (np.nan, np.inf):
        grads = gradients(1)[0]
        grads[1][0] = bad
        train(model, [grads])
    after = numbers(model.trainable_variables + inner.variables)
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert float(outer.dynamic_scale.numpy()) == SCALE / 4
    train(model, gradients(4))
    assert float(outer.dynamic_scale.numpy()) == SCALE / 2
    assert int(inner._iterations) == 6


def test_weights_loaded_before_it_is_built_are_the_state_of_the_inner_optimizer(tmp_path):  # row 17
    model = train(small_model(scaled(use_ema=True)), gradients(3))
    model.save_weights(tmp_path / "a.weights.h5")
    other = small_model(scaled(use_ema=True), seed=1, build=False)
    with pytest.warns(UserWarning, match="Skipping variable loading"):  # Keras's own, for the scale
        other.load_weights(tmp_path / "a.weights.h5")
    other.optimizer.build(other.trainable_variables)
    wanted = numbers(model.optimizer.inner_optimizer.variables)
    found = numbers(other.optimizer.inner_optimizer.variables)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_state_of_keras_own_inside_of_one_loads_with_the_product_that_it_lost(tmp_path):  # row 4
    model = small_model(keras.optimizers.LossScaleOptimizer(keras.optimizers.Nadam(0.05), SCALE))
    train(model, gradients(3)).save_weights(tmp_path / "a.weights.h5")
    other = small_model(scaled(learning_rate=0.05), seed=1)
    with pytest.warns(UserWarning, match="Skipping variable loading"):  # Keras's own, for the scale
        other.load_weights(tmp_path / "a.weights.h5")
    found, wanted = (numbers(m.optimizer.inner_optimizer.variables) for m in (other, model))
    assert len(found) == len(wanted) + 1
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=False))
    product = np.prod([0.9 * (1 - 0.5 * 0.96**step) for step in (1, 2, 3)])
    assert apart(found[-1], product, 0.0, np.float32) <= 0.5


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_fit_under_a_mixed_policy(policy, tmp_path):
    model = small_model(Nadam(0.02), build=False)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    x, y = data()
    losses = model.fit(x, y, batch_size=4, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert {str(v.dtype) for v in model.trainable_variables + inner._momentums} == {"float32"}
    product = 1.0
    for step in range(1, int(inner._iterations) + 1):
        product *= 0.9 * (1 - 0.5 * 0.96**step)
    # A float32 product of so many factors, each within a unit.
    steps = int(inner._iterations)
    assert steps >= 40
    assert apart(numbers([inner.variables[-1]])[0], product, 0.0, np.float32) <= steps
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    for again in (model, loaded):
        again.fit(x, y, batch_size=4, verbose=0, shuffle=False)
    assert all(same_bits(a, b) for a, b in zip(everything(model), everything(loaded), strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_variables_follow_the_reference(dtype):  # rows 5, 6
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 3)).astype(kind)
    variable = keras.Variable(start.astype("float32"), dtype=dtype)
    optimizer = Nadam(0.05)
    optimizer.build([variable])
    moments = [optimizer._momentums[0], optimizer._velocities[0]]
    for _ in range(10):
        # As small as 1e-5, of which the square is no float16.
        grad = (rng.standard_normal((4, 3)) * np.logspace(-5, 2, 12).reshape(4, 3)).astype(kind)
        before = np.float64(np.float32(keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32"))))
        reference = Reference([before], 0.05)
        reference.m, reference.v = ([x.astype(np.float64)] for x in numbers(moments))
        reference.i, reference.product = int(optimizer._iterations), float(numbers([optimizer.variables[-1]])[0])
        optimizer.apply([keras.ops.cast(keras.ops.convert_to_tensor(grad.astype("float32")), dtype)], [variable])
        reference.step([np.float64(grad)])
        found = np.float64(keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32")))
        scale = np.maximum(np.abs(before), reference.reach[0])
        assert apart(found, reference.p[0], scale, kind) <= 1.0
        assert {str(v.dtype) for v in moments} == {"float32"}


@pytest.mark.parametrize("policy", ["float16", "bfloat16"], indirect=True)
def test_a_model_of_half_precision_variables_trains(policy):
    model = small_model(Nadam(0.02), build=False)
    losses = model.fit(*data(), batch_size=4, epochs=12, verbose=0).history["loss"]
    assert {str(v.dtype) for v in model.trainable_variables} == {policy}
    assert losses[-1] < 0.7 * losses[0]
