"""In the training loops and files of others: Flax's nnx and linen, Equinox, orbax."""

from copy import deepcopy

import jax
import optax
import pytest
from jax import numpy as jnp
from jax_training import assert_close, batches, finish, loss, perceptron, read, same, squares, start
from sharded_run import OPTIMIZERS, train

from nadam.jax import fused, nadam, nadamw

BATCHES, GRADIENT = batches(), jax.grad(loss)
HALF = len(BATCHES) // 2
# Another program around the same step: XLA may contract other products and sums.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TWO_PHASE = {
    "optax's": lambda: nadam(0.02),
    "PyTorch's": lambda: nadam(0.02, momentum_decay=0.004),
    "decay": lambda: nadamw(optax.cosine_decay_schedule(0.02, 20), weight_decay=0.1, momentum_decay=0.004),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), nadamw(0.02)),
}
# HALF is no multiple of the window, so that a checkpoint lies inside one.
FUSED = {
    "plain": lambda: fused(0.02),
    "everything": lambda: fused(
        optax.cosine_decay_schedule(0.02, 20),
        global_clipnorm=0.5,
        weight_decay=0.1,
        momentum_decay=0.004,
        use_ema=True,
        gradient_accumulation_steps=3,
        skip_nonfinite=True,
    ),
}
ALL = {**TWO_PHASE, **{f"fused {name}": make for name, make in FUSED.items()}}


def stepping(optimizer, gradient=GRADIENT):
    """(params, state, batch) -> (params, state), not yet compiled."""

    def step(params, state, batch):
        grads = gradient(params, batch)
        if hasattr(optimizer, "finalize"):
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def by_hand(optimizer, params, gradient=GRADIENT, over=BATCHES, state=None):
    """Parameters and state after some batches."""
    step, state = jax.jit(stepping(optimizer, gradient)), optimizer.init(params) if state is None else state
    for batch in over:
        params, state = step(params, state, batch)
    return params, state


@pytest.fixture
def nnx():
    return pytest.importorskip("flax.nnx")


def nnx_perceptron(nnx, seed=0):
    class Perceptron(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.output = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.output(jnp.tanh(self.hidden(x)))

    return Perceptron(nnx.Rngs(seed))


@pytest.mark.parametrize("name", TWO_PHASE)
def test_nnx(nnx, name):
    tx = TWO_PHASE[name]()

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(squares)(model, batch))

    def trained(model, optimizer, over):
        for batch in over:
            step(model, optimizer, batch)
        return model, optimizer

    def begun(seed):
        model = nnx_perceptron(nnx, seed)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    graph, params = nnx.split(nnx_perceptron(nnx))
    expected, _ = by_hand(tx, params, jax.grad(lambda params, batch: squares(nnx.merge(graph, params), batch)))
    model, optimizer = trained(*begun(0), BATCHES)
    assert optimizer.step[...] == len(BATCHES)
    assert_close(nnx.state(model), expected, **CLOSE)

    halfway = [deepcopy(nnx.state(part)) for part in trained(*begun(0), BATCHES[:HALF])]
    resumed = begun(1)
    assert not same(nnx.state(resumed[0]), halfway[0])
    for part, found in zip(resumed, halfway, strict=True):
        nnx.update(part, found)
    for one, other in zip(trained(*resumed, BATCHES[HALF:]), (model, optimizer), strict=True):
        assert same(nnx.state(one), nnx.state(other))


@pytest.mark.parametrize("name", TWO_PHASE)
def test_linen_train_state(name):
    linen, train_state = pytest.importorskip("flax.linen"), pytest.importorskip("flax.training.train_state")
    serialization = pytest.importorskip("flax.serialization")

    class Perceptron(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))

    model, tx = Perceptron(), TWO_PHASE[name]()

    def gradient(params, batch):
        return jax.grad(lambda params: squares(lambda x: model.apply(params, x), batch))(params)

    def begun(seed):
        params = model.init(jax.random.key(seed), BATCHES[0][0])
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(grads=gradient(state.params, batch))

    def trained(state, over):
        for batch in over:
            state = step(state, batch)
        return state

    unbroken = trained(begun(0), BATCHES)
    expected, _ = by_hand(tx, begun(0).params, gradient)
    assert unbroken.step == len(BATCHES)
    assert_close(unbroken.params, expected, **CLOSE)

    saved = serialization.to_bytes(trained(begun(0), BATCHES[:HALF]))
    resumed = trained(serialization.from_bytes(begun(1), saved), BATCHES[HALF:])
    assert same((resumed.params, resumed.opt_state), (unbroken.params, unbroken.opt_state))


@pytest.mark.parametrize("name", FUSED)
def test_flax_writes_the_state_of_fused(name):
    serialization = pytest.importorskip("flax.serialization")
    optimizer = FUSED[name]()
    halfway = by_hand(optimizer, perceptron(), over=BATCHES[:HALF])
    like = perceptron(1), optimizer.init(perceptron(1))
    params, state = serialization.from_bytes(like, serialization.to_bytes(halfway))
    assert same((params, state), halfway)
    assert same(by_hand(optimizer, params, over=BATCHES[HALF:], state=state), by_hand(optimizer, perceptron()))


@pytest.mark.parametrize("name", ALL)
def test_equinox(tmp_path, name):
    equinox = pytest.importorskip("equinox")
    optimizer = ALL[name]()

    def begun(seed):
        model = equinox.nn.MLP(3, 1, 8, 1, jnp.tanh, key=jax.random.key(seed))
        return model, optimizer.init(equinox.filter(model, equinox.is_inexact_array))

    model_loss = equinox.filter_grad(lambda model, batch: squares(jax.vmap(model), batch))

    @equinox.filter_jit
    def step(model, state, batch):
        params, static = equinox.partition(model, equinox.is_inexact_array)
        assert None in jax.tree.leaves(params, is_leaf=lambda leaf: leaf is None)  # such as the activation
        gradient = lambda params, batch: model_loss(equinox.combine(params, static), batch)  # noqa: E731
        params, state = stepping(optimizer, gradient)(params, state, batch)
        return equinox.combine(params, static), state

    def trained(model, state, over):
        for batch in over:
            model, state = step(model, state, batch)
        return model, state

    params, static = equinox.partition(begun(0)[0], equinox.is_inexact_array)
    arrays, treedef = jax.tree.flatten(params)  # a list, without None

    def gradient(arrays, batch):
        model = equinox.combine(treedef.unflatten(arrays), static)
        return jax.tree.leaves(model_loss(model, batch))

    expected, _ = by_hand(optimizer, arrays, gradient)
    unbroken = trained(*begun(0), BATCHES)
    assert_close(equinox.filter(unbroken[0], equinox.is_inexact_array), expected, **CLOSE)

    equinox.tree_serialise_leaves(tmp_path / "halfway.eqx", trained(*begun(0), BATCHES[:HALF]))
    resumed = trained(*equinox.tree_deserialise_leaves(tmp_path / "halfway.eqx", begun(1)), BATCHES[HALF:])
    assert same(*[equinox.filter(run, equinox.is_array) for run in (resumed, unbroken)])


@pytest.mark.parametrize("name", ALL)
def test_orbax(tmp_path, name):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer = ALL[name]()
    halfway = by_hand(optimizer, perceptron(), over=BATCHES[:HALF])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "halfway", halfway)
    with ocp.StandardCheckpointer() as checkpointer:
        like = perceptron(1), optimizer.init(perceptron(1))
        found = checkpointer.restore(tmp_path / "halfway", jax.eval_shape(lambda: like))
    assert same(found, halfway)
    resumed = by_hand(optimizer, found[0], over=BATCHES[HALF:], state=found[1])
    unbroken = by_hand(optimizer, perceptron())
    assert same(resumed, unbroken)
    assert not same(unbroken[0], halfway[0])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Saved half-way on a mesh of four devices by one process, restored onto one of eight, split otherwise."""
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("moved")
    finish(start(4, "save", folder))
    finish(start(8, "restore", folder))
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_orbax_onto_another_mesh(moved, name):
    saved, restored, resumed = (read(moved / f"{when} {name}.npz") for when in ("saved", "restored", "resumed"))
    assert same(restored[:2], saved[:2])
    assert resumed[2]["placed before"].all()
    assert resumed[2]["placed after"].all()
    assert not same(resumed[0], restored[0])
    for found, expected in zip(resumed, train(name)[:2], strict=False):
        assert_close(found, expected, rtol=1e-6, atol=1e-6)
