"""The real optimizers that each member of the family stands for, in the same process; a published run of one."""

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


class QuadraticDeep:
    """DeepOBS's problem of that name, seed 42: a quadratic of 100 dimensions with noisy minima."""

    def __init__(self):
        rng = np.random.RandomState(42)
        curvatures = np.concatenate([rng.uniform(0, 1, 90), rng.uniform(30, 60, 10)])
        rotation = self.rotation(rng)
        self.hessian = rotation.T @ np.diag(curvatures) @ rotation
        self.minima, self.tested = (np.random.RandomState(seed).normal(0, 0.6, (1000, 100)) for seed in (42, 43))

    @staticmethod
    def rotation(rng):
        """A random one, by the subgroup algorithm of Diaconis and Shahshahani."""
        angle = 2 * np.pi * rng.uniform()
        made = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for size in range(3, 101):
            mirror = -rng.normal(size=size)
            mirror /= np.linalg.norm(mirror)
            mirror[0] += 1
            mirror /= np.linalg.norm(mirror)
            wider = np.eye(size)
            wider[1:, 1:] = made
            made = wider - 2 * np.outer(mirror, mirror @ wider)
        return -made

    def loss(self, params):
        away = params - self.tested[:896]
        return float((away @ self.hessian * away).sum(axis=1).mean() / 2)

    def losses(self, epochs, **settings):
        """Test losses before and after each epoch of 7 batches of 128, in a fixed order."""
        params, optimizer = np.ones(100), nadam.Nadam(1e-3, **settings)
        found = [self.loss(params)]
        for _ in range(epochs):
            for batch in range(7):
                mean = self.minima[128 * batch : 128 * (batch + 1)].mean(axis=0)
                optimizer.apply([self.hessian @ (params - mean)], [params])
            found.append(self.loss(params))
        return found


def test_tensorflow_1_as_published():
    """By Schmidt et al. (2021), Descending through a Crowded Valley; their order of batches is not known."""
    losses = QuadraticDeep().losses(100, momentum_decay=math.inf, bias_correction="adam")
    assert losses[0] == pytest.approx(353.446764, abs=5e-6)  # theirs is of float32
    assert losses[1] == pytest.approx(342.6978, abs=0.05)
    assert losses[100] == pytest.approx(106.5976, abs=0.02)


@pytest.mark.parametrize("momentum_decay", [math.inf, 0.004, 1.0])
def test_no_other_member_is_what_was_published(momentum_decay):
    assert QuadraticDeep().losses(1, momentum_decay=momentum_decay)[1] > 342.6978 + 1
