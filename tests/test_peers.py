"""The real optimizers that each member of the family stands for, in the same process."""

import math

import numpy as np
import pytest

import nadam
from cases import apart, draw_grads, draw_params

STEPS = 100
SHAPES = [(40,), (5, 7)]


def ours(params, all_grads, **settings):
    params = [p.copy() for p in params]
    optimizer = nadam.Nadam(**settings)
    for grads in all_grads:
        optimizer.apply(grads, params)
    assert optimizer.iterations * (optimizer.gradient_accumulation_steps or 1) == len(all_grads)
    return params


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = draw_params(rng, SHAPES, np.float64)
    return params, [draw_grads(rng, params) for _ in range(STEPS)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch(problem, decay):
    torch = pytest.importorskip("torch")
    params, all_grads = problem
    theirs = [torch.tensor(p, requires_grad=True) for p in params]
    optimizer = torch.optim.NAdam(theirs, lr=0.01, weight_decay=decay, decoupled_weight_decay=True)
    for grads in all_grads:
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    mine = ours(params, all_grads, learning_rate=0.01, epsilon=1e-8, weight_decay=decay, momentum_decay=0.004)
    for a, b in zip(mine, theirs, strict=True):
        # torch keeps the momentum product in float32, whatever the parameters.
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=1e-9)


def test_optax(problem):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    params, all_grads = problem
    with jax.enable_x64(True):
        optimizer = optax.nadam(0.01)
        theirs = [jax.numpy.asarray(p) for p in params]
        state = optimizer.init(theirs)
        for grads in all_grads:
            updates, state = optimizer.update([jax.numpy.asarray(g) for g in grads], state)
            theirs = optax.apply_updates(theirs, updates)
        theirs = [np.asarray(p) for p in theirs]
    mine = ours(params, all_grads, learning_rate=0.01, epsilon=1e-8, momentum_decay=math.inf)
    for a, b in zip(mine, theirs, strict=True):
        assert apart(a, b, 1.0, np.float64) <= 2000  # a hundred steps of rounding, in another order


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-4},
        {"weight_decay": 0.1},
        {"clipnorm": 0.7},
        {"clipvalue": 0.5},
        {"global_clipnorm": 0.7},
        {"use_ema": True, "ema_overwrite_frequency": 7},
        {"loss_scale_factor": 128.0},
        {"gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_keras(problem, settings):
    keras = pytest.importorskip("keras")
    params, all_grads = problem
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        theirs = [keras.Variable(p, dtype="float64") for p in params]
        optimizer = keras.optimizers.Nadam(learning_rate=0.01, **settings)
        for grads in all_grads:
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads], theirs)
    finally:
        keras.config.set_floatx(before)
    mine = ours(params, all_grads, learning_rate=0.01, **settings)
    for a, b in zip(mine, theirs, strict=True):
        # The learning rate is a float32 variable there.
        np.testing.assert_allclose(a, keras.ops.convert_to_numpy(b), rtol=0, atol=3e-7)
