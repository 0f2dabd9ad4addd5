"""`fused` where optax's two phases are expected: an error as it is, and right as `as_optax` gives it."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax_training import assert_close, batches, loss, perceptron, same, squares

from nadam.jax import FusedState, fused

BATCHES, GRADIENT = batches(), jax.grad(loss)
REFUSED = r"fused has no update.*call step\(grads, state, params\).*fused\(\.\.\.\)\.as_optax\(\)"
# Another program around the same step: XLA may contract other products and sums.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SETTINGS = {
    "plain": {},
    "everything": {
        "global_clipnorm": 0.5,
        "weight_decay": 0.1,
        "momentum_decay": 0.004,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
        "skip_nonfinite": True,
    },
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def optimizer(request):
    return fused(optax.cosine_decay_schedule(0.02, 20), **request.param)


def by_step(optimizer, params, gradient=GRADIENT):
    """Parameters and state after all batches, in one phase."""
    step = jax.jit(lambda params, state, batch: optimizer.step(gradient(params, batch), state, params))
    state = optimizer.init(params)
    for batch in BATCHES:
        params, state = step(params, state, batch)
    return params, state


def by_optax(tx, params, gradient=GRADIENT, apply_updates=optax.apply_updates, **given):
    """The same in two phases, compiled."""

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params, **given)
        return apply_updates(params, updates), state

    state = tx.init(params)
    for batch in BATCHES:
        params, state = step(params, state, batch)
    assert step._cache_size() == 1
    return params, state


def with_linen(tx):
    """Flax's TrainState after all batches, where it began, and the gradient."""
    linen, train_state = pytest.importorskip("flax.linen"), pytest.importorskip("flax.training.train_state")

    class Perceptron(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))

    model = Perceptron()

    def gradient(params, batch):
        return jax.grad(lambda params: squares(lambda x: model.apply(params, x), batch))(params)

    begin = model.init(jax.random.key(0), BATCHES[0][0])
    state = train_state.TrainState.create(apply_fn=model.apply, params=begin, tx=tx)
    step = jax.jit(lambda state, batch: state.apply_gradients(grads=gradient(state.params, batch)))
    for batch in BATCHES:
        state = step(state, batch)
    return state.params, begin, gradient


def with_nnx(tx):
    """A model in nnx after all batches, where it began, and the gradient."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
    graph, begin = nnx.split(model)
    begin = jax.tree.map(jnp.copy, begin)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(squares)(model, batch))

    for batch in BATCHES:
        step(model, optimizer, batch)
    return nnx.state(model), begin, jax.grad(lambda params, batch: squares(nnx.merge(graph, params), batch))


def with_equinox(tx):
    """A model in Equinox after all batches, where it began, and the gradient."""
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 1, 8, 1, jnp.tanh, key=jax.random.key(0))
    begin, static = equinox.partition(model, equinox.is_inexact_array)
    state = tx.init(begin)

    @equinox.filter_jit
    def step(model, state, batch):
        grads = equinox.filter_grad(lambda model: squares(jax.vmap(model), batch))(model)
        updates, state = tx.update(grads, state, equinox.filter(model, equinox.is_inexact_array))
        return equinox.apply_updates(model, updates), state

    def gradient(params, batch):
        return jax.grad(lambda params: squares(jax.vmap(equinox.combine(params, static)), batch))(params)

    for batch in BATCHES:
        model, state = step(model, state, batch)
    return equinox.filter(model, equinox.is_inexact_array), begin, gradient


LOOPS = {"linen": with_linen, "nnx": with_nnx, "equinox": with_equinox}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_two_phases_is_refused(name):
    with pytest.raises(AttributeError, match=REFUSED):
        LOOPS[name](fused(0.1))


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_the_wrappers_of_optax_it_is_refused(name):
    with pytest.raises(AttributeError, match=REFUSED):
        by_optax(WRAPPERS[name](fused(0.1)), perceptron())


def test_there_is_no_update():
    with pytest.raises(AttributeError, match=REFUSED):
        fused(0.1).update  # noqa: B018
    assert not hasattr(fused(0.1), "update")


@pytest.mark.parametrize("name", LOOPS)
def test_as_optax_in_the_loops_of_others(name, optimizer):
    found, begin, gradient = LOOPS[name](optimizer.as_optax())
    expected, _ = by_step(optimizer, begin, gradient)
    assert_close(found, expected, **CLOSE)
    assert not same(jax.tree.leaves(found), jax.tree.leaves(begin))


@pytest.mark.parametrize("name", WRAPPERS)
def test_as_optax_inside_the_wrappers_of_optax(name, optimizer):
    found, state = by_optax(WRAPPERS[name](optimizer.as_optax()), perceptron())
    expected = by_step(optimizer, perceptron())
    assert_close(found, expected[0], **CLOSE)
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, FusedState))
    (kept,) = [part for part in parts if isinstance(part, FusedState)]
    assert_close(kept, expected[1], rtol=1e-5, atol=1e-6)
    if kept.ema is not None:
        assert_close(optimizer.finalize(kept, found), optimizer.finalize(expected[1], expected[0]), **CLOSE)


def test_after_others_in_a_chain():
    tx = optax.chain(optax.scale(1e3), optax.clip_by_global_norm(0.5), fused(0.02).as_optax())
    found, _ = by_optax(tx, perceptron())

    def gradient(params, batch):
        grads = GRADIENT(params, batch)
        norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        return jax.tree.map(lambda leaf: leaf * (0.5 / norm), grads)

    assert_close(found, by_step(fused(0.02), perceptron(), gradient)[0], **CLOSE)
    assert not same(found, by_step(fused(0.02), perceptron())[0])


def test_extra_arguments():
    optimizer = fused(0.5)
    grads = jax.tree.map(lambda leaf: leaf * 4.0, perceptron(1))
    given = {"learning_rate": 0.02, "loss_scale": 4.0}
    expected, _ = optimizer.step(grads, optimizer.init(perceptron()), perceptron(), **given)
    tx = optax.chain(optax.identity(), optimizer.as_optax())
    updates, _ = tx.update(grads, tx.init(perceptron()), perceptron(), value=1.0, **given)  # value is not for it
    assert_close(optax.apply_updates(perceptron(), updates), expected, **CLOSE)
    with pytest.raises(ValueError, match="params: fused needs them"):
        tx.update(grads, tx.init(perceptron()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_applied_are_the_parameters_of_step(dtype, optimizer):
    """Exactly, where one keeps its sign and at most doubles or halves; else within an ulp of the larger."""
    rng = np.random.default_rng(3)
    params = {
        "w": jnp.asarray(rng.normal(size=2000) * 10.0 ** rng.uniform(-4, 1, 2000), dtype),
        "b": jnp.zeros(9, dtype),
    }
    tx, state, kinds = optimizer.as_optax(), optimizer.init(params), np.zeros(2, int)
    for _ in range(12):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), params)
        expected, after = optimizer.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        found = optax.apply_updates(params, updates)
        assert same(state, after)
        for one, other, update, old in zip(*map(jax.tree.leaves, (found, expected, updates, params)), strict=True):
            assert one.dtype == other.dtype == update.dtype == old.dtype == dtype
            new, old = (np.asarray(leaf, np.float64) for leaf in (other, old))
            apart = np.abs(np.asarray(one, np.float64) - new)
            near = (new * old > 0) & (np.abs(new) <= 2 * np.abs(old)) & (np.abs(old) <= 2 * np.abs(new))
            larger = np.maximum(np.abs(new), np.abs(old))
            ulp = 2.0 ** (np.floor(np.log2(np.maximum(larger, 1e-4))) - jnp.finfo(dtype).nmant)
            assert (apart[near] == 0).all()
            assert (apart <= ulp).all()
            kinds += near.sum(), (~near & (new != old)).sum()
        params = found
    assert (kinds > 100).all()


def test_the_dtypes_of_a_model_stay_where_updates_are_only_added():
    equinox = pytest.importorskip("equinox")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), perceptron())
    found, _ = by_optax(fused(0.02).as_optax(), params, apply_updates=equinox.apply_updates)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}


def test_updates_are_zero_within_a_window():
    tx = fused(0.1, gradient_accumulation_steps=2, weight_decay=0.1).as_optax()
    updates, state = tx.update(perceptron(1), tx.init(perceptron()), perceptron())
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    updates, _ = tx.update(perceptron(1), state, perceptron())
    assert all(leaf.all() for leaf in jax.tree.leaves(updates))
