"""Complex parameters of `nadam` and `nadamw`: optax's formula, whose second moment is that of |gradient|**2."""

from contextlib import nullcontext
from math import inf

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from agree import wide
from cases import apart
from nadam.jax import from_optax, fused, nadam, nadamw, to_optax

ENABLE_X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
SHAPES = {"bias": (5,), "kernel": (7, 5), "none": (0,), "real": (3, 4), "scale": ()}
MASK = {name: name in ("kernel", "none") for name in SHAPES}
REAL = {"complex64": "float32", "complex128": "float64"}


@pytest.fixture(params=REAL)
def dtype(request):
    """A dtype of complex numbers, with x64 where that needs it."""
    with ENABLE_X64(True) if request.param == "complex128" else nullcontext():
        yield request.param


def draw(seed, dtype="complex64"):
    """A tree of complex leaves and a real one."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape) + 1j * rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {k: jnp.asarray(z.real, REAL[dtype]) if k == "real" else jnp.asarray(z, dtype) for k, z in drawn.items()}


def train(optimizer, steps, dtype="complex64", start=None):
    """Parameters and state after so many compiled updates; or from such a start, the number of the first first."""
    first, params, state = start or (0, draw(0, dtype), optimizer.init(draw(0, dtype)))

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(first, first + steps):
        params, state = step(params, state, draw(i + 1, dtype))
    assert step._cache_size() == 1
    return params, state


def types(tree):
    return jax.tree.map(jax.typeof, tree)


RATE = {"learning_rate": 0.01}
PAIRS = {
    "nadam": (nadam, optax.nadam, RATE),
    "betas": (nadam, optax.nadam, {**RATE, "b1": 0.5, "b2": 0.9, "eps": 1e-3}),
    "eps_root": (nadam, optax.nadam, {**RATE, "eps_root": 1e-2}),
    "schedule": (nadam, optax.nadam, {"learning_rate": optax.linear_schedule(0.02, 0.0, 200)}),
    "nadamw": (nadamw, optax.nadamw, {**RATE, "weight_decay": 0.1}),
    "mask": (nadamw, optax.nadamw, {**RATE, "weight_decay": 0.1, "mask": MASK}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_200_steps_as_optax(name, dtype):
    """Apart by roundings, and in float32 since optax's b2 is 1.3e-8 too much there, as of real numbers."""
    make, peer, settings = PAIRS[name]
    (ours, state), (theirs, stock) = train(make(**settings), 200, dtype), train(peer(**settings), 200, dtype)
    assert types((ours, state)) == types((theirs, stock))
    for key in SHAPES:
        assert apart(wide(ours[key]), wide(theirs[key]), 1.0, REAL[dtype]) < 64
        for part in ("mu", "nu"):
            one, other = (wide(getattr(tree[0], part)[key]) for tree in (state, stock))
            assert apart(one, other, 0.1, REAL[dtype]) < 48
    assert not np.asarray(state[0].nu["kernel"]).imag.any()
    assert apart(wide(ours["kernel"]), wide(draw(0, dtype)["kernel"]), 1.0, REAL[dtype]) > 1000


class Twin:
    """Nadam of one complex parameter in float64, written from optax's formula and the schedule of the momentum."""

    def __init__(self, settings):
        self.s, self.product = settings, 1.0

    def momentum(self, t):
        return 0.9 * (1 - 0.5 * 0.96 ** (t * self.s["momentum_decay"]))

    def step(self, t, p, m, v, g):
        """The update, the moments and the size of the update's terms, of step t from a given start."""
        now, following = self.momentum(t), self.momentum(t + 1)
        self.product *= now
        moment = 0.9 * m + 0.1 * g
        second = 0.999 * v + 0.001 * self.squared(g)
        ahead = following / (1 - self.product * following)
        here = (1 - now) / (1 - self.product)
        root = np.sqrt(second / (1 - 0.999**t) + self.s.get("eps_root", 0.0)) + 1e-8
        update = -self.s["learning_rate"] * ((ahead * moment + here * g) / root + self.s.get("weight_decay", 0.0) * p)
        parts = np.abs(wide(m)) + np.abs(wide(g))
        size = np.abs(wide(p)) * self.s.get("weight_decay", 0.0) + (ahead + here) * parts / root[..., None]
        return update, moment, second, self.s["learning_rate"] * size

    @staticmethod
    def squared(g):
        return g.real**2 + g.imag**2


class OfTwoReals(Twin):
    """What PyTorch does with complex parameters, and ours does not: each part has a second moment of its own."""

    @staticmethod
    def squared(g):
        return 2 * g.real**2


def farthest(twin, make, settings, dtype):
    """How far single steps are from the twin's, in units in the last place of what is rounded."""
    optimizer, twins, found = make(**settings), {key: twin(settings) for key in SHAPES}, 0.0
    params = draw(0, dtype)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(30):
        grads, moments = draw(i + 1, dtype), state[0]
        updates, state = update(grads, state, params)
        for key, each in twins.items():
            p, m, v, g = (np.asarray(tree[key], complex) for tree in (params, moments.mu, moments.nu, grads))
            move, moment, second, size = each.step(i + 1, p, m, v.real, g)
            terms = np.maximum(np.abs(wide(m)), np.abs(wide(g)))
            ours = (np.asarray(tree[key], complex) for tree in (updates, state[0].mu, state[0].nu))
            twice = zip(ours, (move, moment, second.astype(complex)), (size, terms, 0), strict=True)
            found = max(found, *(apart(wide(a), wide(b), scale, REAL[dtype]) for a, b, scale in twice))
        params = optax.apply_updates(params, updates)
    return found


CASES = {
    "optax": (nadam, {**RATE, "momentum_decay": inf}),
    "pytorch": (nadam, {**RATE, "momentum_decay": 0.004}),
    "keras": (nadam, {**RATE, "momentum_decay": 1.0}),
    "eps_root": (nadam, {**RATE, "momentum_decay": 1.0, "eps_root": 0.01}),
    "decay": (nadamw, {**RATE, "momentum_decay": 0.004, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_update_as_a_twin_in_float64(name):
    """The scalars of a step are computed in float32, some roundings each, and moments and update are rounded again."""
    assert farthest(Twin, *CASES[name], "complex64") <= 6.0
    assert farthest(OfTwoReals, *CASES[name], "complex64") > 1000


def test_a_run_of_optax_goes_on():
    whole, _ = train(nadam(0.01), 40)
    params, state = train(optax.nadam(0.01), 20)
    for begun in (state, from_optax(state, nadam(0.01).init(params))):
        found, _ = train(nadam(0.01), 20, start=(20, params, begun))
        for key in SHAPES:
            assert apart(wide(found[key]), wide(whole[key]), 1.0, "float32") < 16
    with pytest.raises(TypeError, match=r"state \(mu\): leaf 0 is complex64, expected real"):
        from_optax(state, nadam(0.01).init(jax.tree.map(jnp.real, params)))
    warm = nadam(0.01, momentum_decay=1.0)
    params, state = train(warm, 20, start=(20, params, from_optax(state, warm.init(params), momentum_decay=1.0)))
    assert types(to_optax(state, params)) == types(optax.nadam(0.01).init(params))


@pytest.mark.parametrize(("mu_dtype", "of_complex", "of_real"), [
    (None, "complex64", "float32"),
    ("bfloat16", "complex64", "bfloat16"),
    ("float32", "complex64", "float32"),
    ("complex64", "complex64", "float32"),
])  # fmt: skip
def test_the_dtype_of_the_first_moments(mu_dtype, of_complex, of_real):
    """optax drops the imaginary part where the dtype is real."""
    params, state = train(nadam(0.01, mu_dtype=mu_dtype), 20)
    expected, _ = train(nadam(0.01), 20)
    assert {key: leaf.dtype.name for key, leaf in state[0].mu.items()} == {
        key: of_real if key == "real" else of_complex for key in SHAPES
    }
    assert np.array_equal(params["kernel"], expected["kernel"])


@pytest.mark.parametrize("name", ["nadam", "eps_root", "nadamw"])
def test_injected_hyperparameters(name):
    """inject_hyperparams makes them complex, as the parameters are."""
    make, _, settings = PAIRS[name]
    ours, state = train(optax.inject_hyperparams(make)(**settings), 20)
    theirs, _ = train(make(**settings), 20)
    assert state.hyperparams["learning_rate"].dtype == "complex64"
    for key in SHAPES:
        assert apart(wide(ours[key]), wide(theirs[key]), 1.0, "float32") < 16
    with pytest.raises(ValueError, match="learning_rate=nan"):
        make(jnp.asarray(0.1 + 0.1j))
    wrong = jax.jit(lambda rate: make(rate).update(draw(1), make(0.1).init(draw(0)), draw(0))[0])(0.1 + 0.1j)
    assert np.isnan(wrong["kernel"]).all()


def test_transformations_of_jax():
    params, grads = draw(0), draw(1)

    def moved(grads, params):
        optimizer = nadamw(0.01, eps_root=1e-8, weight_decay=0.1)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        expected = moved(grads, params)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (grads, params))
    found = jax.vmap(moved)(*twice)
    for key in SHAPES:
        assert apart(wide(found[key][1]), wide(expected[key]), 1.0, "float32") < 4
    zeros = jax.tree.map(jnp.zeros_like, grads)
    slopes = jax.grad(lambda grads: sum(jnp.abs(leaf).sum() for leaf in moved(grads, params).values()))(zeros)
    assert all(np.isfinite(leaf).all() and (leaf != 0).all() for leaf in slopes.values())


def test_numbers_of_python():
    """They are weak, and stay so; optax's update refuses them."""
    optimizer, tree = nadam(0.1), {"a": 1.0 + 2.0j, "b": 2.0}
    begin = optimizer.init(tree)
    updates, state = optimizer.update(tree, begin, tree)
    assert types((updates, state)) == types((tree, begin))


def test_real_gradients_of_complex_parameters():
    optimizer, real = nadam(0.01), jax.tree.map(jnp.real, draw(1))
    state = optimizer.init(draw(0))
    found, _ = optimizer.update(real, state)
    expected, _ = optimizer.update(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), real, draw(0)), state)
    assert types(found) == types(expected) == types(draw(0))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


@pytest.mark.parametrize("value", [complex(inf, 1), complex(1, np.nan), complex(1e25, 1)])
def test_a_gradient_that_is_not_finite(value):
    """Both parts are NaN from the next step on, since they have one second moment; other elements go on."""
    optimizer, params = nadam(0.01), jnp.ones(2, "complex64")
    state = optimizer.init(params)
    for grad in (jnp.asarray([value, 1j], "complex64"), jnp.ones(2, "complex64")):
        updates, state = optimizer.update(grad, state, params)
    assert np.isnan(wide(updates)[0]).all()
    assert np.isfinite(wide(updates)[1]).all()


def test_what_is_refused():  # row 17
    with pytest.raises(TypeError, match=r"params\['bias'\]: complex64, expected float16, .* or float64$"):
        fused(0.01).init(draw(0))
    real = jax.tree.map(jnp.real, draw(0))
    with pytest.raises(TypeError, match="updates: leaf 0 is complex64, expected real floating-point numbers"):
        nadam(0.01).update(draw(1), nadam(0.01).init(real), real)
    # A first moment without its imaginary part, as optax makes it.
    with pytest.raises(TypeError, match="updates: leaf 0 is complex64, expected real floating-point numbers"):
        nadam(0.01).update(draw(1), optax.nadam(0.01, mu_dtype="float32").init(draw(0)))
