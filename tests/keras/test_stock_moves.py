"""Runs that Keras's own Nadam, Adam or AdamW begin and ours goes on with, and the way back: by files and from_stock."""

import math

import keras
import numpy as np
import pytest
from across_backends import everything, gradients, numbers, schedule, small_model, train

import nadam
from cases import apart
from nadam.keras import Nadam, from_stock, to_stock
from reference import Reference

K = keras.optimizers
STEPS = 3
COMMON = {"learning_rate": 0.02, "beta_1": 0.9, "weight_decay": 0.1}
STOCK = {"Nadam": K.Nadam, "Adam": K.Adam, "AdamW": K.AdamW}
ULPS = 2 * STEPS  # a rounding of the parameter in each step, and those of the moments
GRADS = gradients(2 * STEPS)
# Keras's own turns a tensor that needs a gradient into a number.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")


def momenta(settings, count, scale=1.0):
    decay = settings.get("momentum_decay", 1.0)
    return scale * math.prod(settings["beta_1"] * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(1, count + 1))


def expected(model, settings, grads, product):
    """Parameters after some steps of the reference, begun from a model's parameters and its optimizer's moments."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    reference = Reference(numbers(model.trainable_variables), **settings)
    reference.m, reference.v = ([x.astype(float) for x in numbers(kept)] for kept in moments(optimizer))
    reference.i, reference.product = STEPS, product
    for each in grads:
        reference.step(each)
    return reference.p


def moments(optimizer):
    return optimizer._momentums, optimizer._velocities


def far(params, reference):
    return max(apart(x, y, 1.0, np.float32) for x, y in zip(params, reference, strict=True))


def of_stock(name, wrap=lambda optimizer: optimizer):
    return train(small_model(wrap(STOCK[name](**COMMON))), GRADS[:STEPS])


def by_from_stock(model, folder, **settings):
    model.optimizer = from_stock(model.optimizer, **settings)
    return model


def by_keras_file(model, folder, **settings):
    """The file brings Keras's own back, which from_stock takes over."""
    model.save(folder / "a.keras")
    return by_from_stock(keras.saving.load_model(folder / "a.keras"), folder, **settings)


def by_weights_file(model, folder, **settings):
    """Read into a model that is compiled with the stock optimizer, which from_stock takes over."""
    model.save_weights(folder / "a.weights.h5")
    other = small_model(type(model.optimizer).from_config(model.optimizer.get_config()), seed=1)
    other.load_weights(folder / "a.weights.h5")
    return by_from_stock(other, folder, **settings)


def by_checkpoint(model, folder, **settings):
    nadam.checkpoint.save(folder / "a.nadam", model.optimizer, model)
    other = small_model(Nadam(**COMMON | settings), seed=1)
    nadam.checkpoint.load(folder / "a.nadam", other.optimizer, other)
    return other


WAYS = [by_from_stock, by_keras_file, by_weights_file, by_checkpoint]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("settings", [{}, {"momentum_decay": 0.004}], ids=["default", "PyTorch's"])
def test_ours_goes_on_from_stock(name, way, settings, tmp_path):
    if settings and name == "Nadam" and way is by_checkpoint:
        pytest.skip("warns that the settings differ")
    model = of_stock(name)
    reference = {
        scale: expected(model, COMMON | settings, GRADS[STEPS:], momenta(COMMON | settings, STEPS, scale))
        for scale in (1.0, 0.98)
    }
    before = numbers(model.trainable_variables)
    other = way(model, tmp_path, **settings)
    assert type(other.optimizer) is Nadam
    assert int(other.optimizer.iterations) == STEPS
    assert all(np.array_equal(x, y) for x, y in zip(numbers(other.trainable_variables), before, strict=True))
    train(other, GRADS[STEPS:])
    params = numbers(other.trainable_variables)
    assert far(params, reference[1.0]) <= ULPS
    assert far(params, reference[0.98]) > 10 * ULPS  # of a wrong momentum product


@pytest.mark.parametrize("way", WAYS)
def test_nadam_goes_on_as_stock_would(way, tmp_path):
    model, stock = of_stock("Nadam"), train(small_model(K.Nadam(**COMMON)), GRADS)
    other = train(way(model, tmp_path), GRADS[STEPS:])
    # Keras's own computes its scalars in float32.
    assert far(numbers(other.trainable_variables), numbers(stock.trainable_variables)) <= 2 * ULPS


def back_by_to_stock(model, cls, folder):
    model.optimizer = to_stock(model.optimizer, cls)
    return model


def back_by_checkpoint(model, cls, folder):
    nadam.checkpoint.save(folder / "a.nadam", model.optimizer, model)
    other = small_model(cls(**COMMON), seed=1)
    nadam.checkpoint.load(folder / "a.nadam", other.optimizer, other)
    return other


@pytest.mark.parametrize("way", [back_by_to_stock, back_by_checkpoint])
@pytest.mark.parametrize("name", STOCK)
def test_stock_goes_on_from_ours(name, way, tmp_path):
    begun = train(small_model(Nadam(**COMMON)), GRADS[:STEPS])
    alone = begin_with_moments(STOCK[name](**COMMON), begun)
    other = way(begun, STOCK[name], tmp_path)
    assert isinstance(other.optimizer, STOCK[name])
    got, wanted = (numbers(train(each, GRADS[STEPS:]).trainable_variables) for each in (other, alone))
    assert far(got, wanted) <= 4  # the momentum product is rounded otherwise
    for variable in other.optimizer._momentums:
        variable.assign(variable * 1.01)
    assert far(*(numbers(train(each, GRADS[:1]).trainable_variables) for each in (other, alone))) > 40


def begin_with_moments(optimizer, begun):
    """A model whose stock optimizer got each number by hand."""
    model = small_model(optimizer)
    pairs = [(model.trainable_variables, begun.trainable_variables)]
    pairs += zip(moments(optimizer), moments(begun.optimizer), strict=True)
    for mine, theirs in pairs:
        for variable, value in zip(mine, numbers(theirs), strict=True):
            variable.assign(value)
    optimizer._iterations.assign(STEPS)
    if hasattr(optimizer, "_u_product"):
        optimizer._u_product.assign(momenta(COMMON, STEPS))
    return model


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_within_a_loss_scale_optimizer(name):
    model = of_stock(name, lambda inner: K.LossScaleOptimizer(inner, 1024.0, 2))
    reference = expected(model, COMMON, GRADS[STEPS:], momenta(COMMON, STEPS))
    scaled = model.optimizer
    model.optimizer = from_stock(scaled)
    assert isinstance(model.optimizer.inner_optimizer, Nadam)
    for mine in ("dynamic_scale", "step_counter"):
        assert float(getattr(model.optimizer, mine).numpy()) == float(getattr(scaled, mine).numpy())
    assert float(scaled.dynamic_scale.numpy()) == 2048.0
    train(model, GRADS[STEPS:])
    assert far(numbers(model.trainable_variables), reference) <= ULPS


def test_settings_go_along_with_adams_state():
    optimizer = K.AdamW(schedule(), weight_decay=0.3, use_ema=True, ema_momentum=0.8, gradient_accumulation_steps=3)
    model = train(small_model(optimizer), gradients(4))
    made = from_stock(optimizer, bias_correction="adam")
    for name in ("weight_decay", "use_ema", "ema_momentum", "gradient_accumulation_steps"):
        assert getattr(made, name) == getattr(optimizer, name)
    assert (made.bias_correction, made.momentum_decay, made.name) == ("adam", 1.0, "nadam")
    assert int(made._iterations.numpy()) == 4  # in the middle of a window
    for name in ("_model_variables_moving_average", "_accumulated_gradients"):
        pairs = zip(numbers(getattr(made, name)), numbers(getattr(optimizer, name)), strict=True)
        assert all(np.array_equal(x, y) for x, y in pairs)
        assert any(x.any() for x in numbers(getattr(made, name)))
    back = to_stock(made, K.AdamW)
    assert type(back) is type(optimizer)
    model.optimizer = back
    before = everything(model)
    model.optimizer = optimizer
    assert all(np.array_equal(x, y) for x, y in zip(before, everything(model), strict=True))


def test_variables_of_one_path_keep_their_own_state():
    variables = [keras.Variable(np.zeros(2, "float32"), name="same") for _ in range(2)]
    assert variables[0].path == variables[1].path
    optimizer = K.Adam(0.1)
    optimizer.build(variables)
    optimizer.apply([keras.ops.convert_to_tensor(np.full(2, x, "float32")) for x in (1.0, 2.0)])
    found = numbers(from_stock(optimizer)._momentums)
    assert [x[0] for x in found] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("cls", [keras.optimizers.SGD, "adam", None])
def test_to_stock_has_three_targets(cls):
    with pytest.raises(TypeError, match=r"cls=.*expected keras\.optimizers\.Nadam, Adam or AdamW"):
        to_stock(Nadam(), cls)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Triton, which PyTorch's loads, aborts after TensorFlow")
def test_a_run_goes_from_pytorchs_adamw_to_numpy_and_on_to_keras(tmp_path):
    import torch

    model = small_model(Nadam(**COMMON))
    kernels, start = ("first/kernel", "second/kernel"), numbers(model.trainable_variables)
    params = [torch.nn.Parameter(torch.tensor(value.T, device="cpu")) for value in start]
    adam = torch.optim.AdamW(params, lr=COMMON["learning_rate"], weight_decay=COMMON["weight_decay"], eps=1e-7)
    for grads in GRADS[:STEPS]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad.T, device="cpu")
        adam.step()
    names = [f"small/{name}" for name in ("first/kernel", "first/bias", "second/kernel", "second/bias")]
    transpose = [name for name in names if name.endswith(kernels)]
    nadam.checkpoint.save(tmp_path / "a", adam, dict(zip(names, params, strict=True)))

    arrays = {name: np.zeros_like(value) for name, value in zip(names, start, strict=True)}
    optimizer = nadam.Nadam(**COMMON)
    nadam.checkpoint.load(tmp_path / "a", optimizer, arrays, transpose=transpose)
    reference = Reference(list(arrays.values()), **COMMON)
    states = [adam.state[param] for param in params]
    reference.m, reference.v = ([s[name].numpy().T.astype(float) for s in states] for name in ("exp_avg", "exp_avg_sq"))
    reference.i, reference.product = STEPS, momenta(COMMON, STEPS)
    optimizer.apply(dict(zip(names, GRADS[STEPS], strict=True)))
    nadam.checkpoint.save(tmp_path / "b", optimizer, arrays)

    nadam.checkpoint.load(tmp_path / "b", model.optimizer, model)
    train(model, GRADS[STEPS + 1 :])
    for grads in GRADS[STEPS:]:
        reference.step(grads)
    assert far(numbers(model.trainable_variables), reference.p) <= ULPS
    reference.p[0] += 1e-5
    assert far(numbers(model.trainable_variables), reference.p) > 10 * ULPS


def test_parameters_may_be_a_dict_of_variables(tmp_path):
    model = of_stock("Adam")
    nadam.checkpoint.save(tmp_path / "a", model.optimizer, model.trainable_variables)
    other = small_model(Nadam(**COMMON), seed=1, build=False)
    named = {variable.path: variable for variable in other.trainable_variables}
    nadam.checkpoint.load(tmp_path / "a", other.optimizer, named)
    assert int(other.optimizer.iterations) == STEPS
    pairs = zip(numbers(other.trainable_variables), numbers(model.trainable_variables), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)
