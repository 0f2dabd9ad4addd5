"""Moments of 8 bits in Keras on torch: codes of NumPy's host, saved and resumed bit for bit; refused elsewhere."""

import copy
import json

import keras
import numpy as np
import pytest

import nadam
from nadam import checkpoint
from nadam.core.compressed import SCALES
from nadam.core.portable_formats import wide_moments
from nadam.keras import Nadam, from_stock, to_stock

BACKEND = keras.backend.backend()
CODES = {"state_bits": 8, "seed": 5}
KEPT = dict(zip(SCALES.values(), ("_momentum_scales", "_velocity_scales"), strict=True))
KEPT |= {"exp_avg": "_momentums", "exp_avg_sq": "_velocities"}
needs_torch = pytest.mark.skipif(BACKEND != "torch", reason="is refused there")


def model_of(optimizer):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((64,), name="x"), keras.layers.Dense(80, name="wide"), keras.layers.Dense(1, name="one")]
    model = keras.Sequential(layers, name="model")
    model.compile(optimizer, loss="mse")
    return model


def fit(model, epochs=2, first=0):
    x = np.random.default_rng(first).standard_normal((64, 64)).astype(np.float32)
    model.fit(x, x[:, :1], epochs=epochs, batch_size=16, shuffle=False, verbose=0)
    return model


def arrays(variables):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def equal(one, other):
    """Whether all weights and all of the state are the same, bit for bit."""
    pairs = list(zip(arrays(one.weights), arrays(other.weights), strict=True))
    pairs += zip(arrays(one.optimizer.variables), arrays(other.optimizer.variables), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def codes_of(optimizer, index=0):
    return {name: arrays([getattr(optimizer, kept)[index]])[0] for name, kept in KEPT.items()}


@pytest.mark.skipif(BACKEND == "torch", reason="is there")
def test_other_backends_refuse_it_by_name():
    with pytest.raises(ValueError, match=f"state_bits=8: expected None on the {BACKEND} backend"):
        Nadam(state_bits=8)
    assert Nadam(seed=3).get_config()["seed"] == 3


@pytest.mark.parametrize(("name", "value"), [("state_bits", 4), ("state_bits", True), ("seed", -1), ("seed", 1 << 32)])
def test_values_out_of_their_ranges_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Nadam(**{name: value})


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_leaves_the_codes_and_values_of_numpys(dtype):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in ((70, 60), (7,), (4096,))]
    variables = [keras.Variable(weight, dtype=dtype) for weight in weights]
    settings = {"learning_rate": 2.0**-7, "clipnorm": 1.0, "use_ema": True, **CODES}
    ours, other = Nadam(**settings), nadam.Nadam(**settings)
    ours.build(variables)
    other.build(weights)
    for _ in range(5):
        grads = [rng.standard_normal(weight.shape).astype(dtype) for weight in weights]
        ours.apply([keras.ops.convert_to_tensor(grad) for grad in grads])
        other.apply(grads)
    assert all(map(np.array_equal, arrays(variables), weights))
    for index in (0, 2):
        entry = other._parameters.entries[index].state
        assert all(np.array_equal(array, entry[name]) for name, array in codes_of(ours, index).items())
    assert arrays([ours._momentums[1]])[0].dtype == np.float32
    assert ours._momentum_scales[1] is None
    assert [str(array.dtype) for array in codes_of(ours).values()] == ["uint8", "uint8", "int8", "uint8"]


@needs_torch
def test_another_seed_rounds_otherwise():
    one, other, third = (fit(model_of(Nadam(0.01, state_bits=8, seed=seed))) for seed in (5, 6, 5))
    assert equal(one, third)
    assert not equal(one, other)


@needs_torch
@pytest.mark.parametrize("how", ["keras", "weights", "nadam", "copy"])
def test_a_run_goes_on_bit_for_bit(tmp_path, how):
    model = fit(model_of(Nadam(0.01, **CODES)))
    if how == "keras":
        model.save(tmp_path / "run.keras")
        other = keras.saving.load_model(tmp_path / "run.keras")
    elif how == "weights":
        model.save_weights(tmp_path / "run.weights.h5")
        other = model_of(Nadam(0.01, **CODES))
        other.load_weights(tmp_path / "run.weights.h5")
        other.optimizer.build(other.trainable_variables)
    elif how == "copy":
        other = copy.deepcopy(model)
    else:
        checkpoint.save(tmp_path / "run.nadam", model.optimizer, model)
        other = model_of(Nadam(0.01, **CODES))
        checkpoint.load(tmp_path / "run.nadam", other.optimizer, other)  # a warning would be an error
        assert checkpoint.load(tmp_path / "run.nadam")["groups"][0]["state_bits"] == 8
    assert equal(model, other)
    assert (other.optimizer.state_bits, other.optimizer.seed) == (8, 5)
    fit(model, first=1)
    fit(other, first=1)
    assert equal(model, other)


@needs_torch
def test_a_config_has_it():
    optimizer = Nadam(0.01, **CODES)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()
    assert (again.state_bits, again.seed) == (8, 5)
    assert not {"state_bits", "seed"} & set(Nadam().get_config())
    with pytest.raises(AttributeError, match="seed"):
        again.seed = 3


@needs_torch
@pytest.mark.parametrize("there", [CODES, {}])
def test_a_file_of_the_other_kind_is_refused(tmp_path, there):
    here = {} if there else CODES
    fit(model_of(Nadam(0.01, **there))).save_weights(tmp_path / "run.weights.h5")
    other = fit(model_of(Nadam(0.01, **here)))
    before = arrays(other.optimizer.variables)
    with pytest.raises(ValueError, match=r"arrays 'momentum_scale', expected"):
        other.load_weights(tmp_path / "run.weights.h5")
    assert all(map(np.array_equal, before, arrays(other.optimizer.variables)))


@needs_torch
@pytest.mark.parametrize(
    ("slot", "value", "message"),
    [
        ("momentum_scale", np.full(192, 255, np.uint8), "values <= 248"),
        ("velocity_scale", np.full(192, 240, np.uint8), "values <= 239"),
        ("momentum", np.ones((64, 80), np.float32), "dtype float32, expected int8"),
        ("velocity", np.ones((64, 80), np.int8), "dtype int8, expected uint8"),
        ("momentum_scale", np.ones(64, np.uint8), "shape"),
    ],
)
def test_damaged_codes_are_refused(slot, value, message):
    optimizer = fit(model_of(Nadam(0.01, **CODES))).optimizer
    store, before = {}, arrays(optimizer.variables)
    optimizer.save_own_variables(store)
    marks = {key: array.attrs for key, array in store.items()}
    key = next(k for k, m in marks.items() if m["slot"] == slot and "wide/kernel" in m["variable"])
    store[key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_own_variables(store)
    assert all(map(np.array_equal, before, arrays(optimizer.variables)))


@needs_torch
def test_an_optimizer_that_was_saved_before_it_was_built_begins_anew(tmp_path):
    store = {}
    Nadam(0.25, **CODES).save_own_variables(store)
    other = Nadam(0.01, **CODES)
    other.load_own_variables(store)
    other.build(model_of(Nadam()).trainable_variables)
    assert float(other.learning_rate) == 0.25
    assert not any(array.any() for array in codes_of(other).values())


@needs_torch
def test_keras_own_gets_wide_moments_and_gives_them():
    model = fit(model_of(Nadam(0.01, **CODES)))
    stock = to_stock(model.optimizer)
    expected = wide_moments(codes_of(model.optimizer))
    assert np.array_equal(arrays([stock._momentums[0]])[0], expected["exp_avg"])
    assert np.array_equal(arrays([stock._velocities[0]])[0], expected["exp_avg_sq"])
    back = from_stock(stock, **CODES)  # without a warning, since these values are codes'
    assert all(np.array_equal(a, expected[name]) for name, a in wide_moments(codes_of(back)).items())
    stock = fit(model_of(keras.optimizers.Nadam(0.01))).optimizer
    with pytest.warns(UserWarning, match="state_bits=8: the moments of .*wide/kernel.* are rounded"):
        from_stock(stock, **CODES)


@needs_torch
def test_accumulation_skipping_and_constraints_work_on_codes():
    settings = {"gradient_accumulation_steps": 2, "skip_nonfinite": True, "use_ema": True, **CODES}
    variable = keras.Variable(np.ones((70, 60), np.float32), name="w")
    variable.constraint = keras.constraints.NonNeg()
    optimizer = Nadam(0.5, **settings)
    optimizer.build([variable])
    rng = np.random.default_rng(0)
    for _ in range(6):
        optimizer.apply([keras.ops.convert_to_tensor(rng.standard_normal((70, 60)).astype(np.float32))])
    before = arrays([variable, *optimizer.variables[:-1]])
    optimizer.apply([keras.ops.convert_to_tensor(np.full((70, 60), np.nan, np.float32))])
    assert optimizer.last_step.nonfinite_param == variable.path
    assert all(map(np.array_equal, before, arrays([variable, *optimizer.variables[:-1]])))
    assert before[0].min() == 0
    assert codes_of(optimizer)["exp_avg"].any()


@needs_torch
def test_stateless_apply_is_refused_by_name():
    variable = keras.Variable(np.ones((70, 60), np.float32))
    optimizer = Nadam(0.5, **CODES)
    optimizer.build([variable])
    values = [v.value for v in optimizer.variables]
    with pytest.raises(RuntimeError, match="state_bits=8: expected None in stateless_apply"):
        optimizer.stateless_apply(values, [variable.value], [variable.value])


@needs_torch
def test_variables_elsewhere_than_on_the_cpu_are_refused_by_name():
    import torch

    variable = keras.Variable(np.ones((70, 60), np.float32))
    variable._value = torch.nn.Parameter(torch.ones((70, 60), device="meta"))
    optimizer = Nadam(0.5, **CODES)
    with pytest.raises(ValueError, match="state_bits=8: expected None with variables on meta"):
        optimizer.build([variable])
    assert not optimizer.built
