"""Runs that optax's optimizers begin and ours go on with, and the way back: by from_optax, to_optax and by file."""

import math

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import nadam
from cases import apart
from nadam.jax import from_optax, fused, nadamw, to_optax
from nadam.jax import nadam as plain
from reference import Reference

STEPS = 3
ULPS = 2 * STEPS  # a rounding of the parameter in each step, and those of the moments
RATE, DECAY = 0.02, 0.1
STOCK = {
    "nadam": (optax.nadam, {}),
    "nadamw": (optax.nadamw, {"weight_decay": DECAY}),
    "adam": (optax.adam, {}),
    "adamw": (optax.adamw, {"weight_decay": DECAY}),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = {name: rng.standard_normal(shape) for name, shape in {"kernel": (7, 5), "bias": (5,), "scale": ()}.items()}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), draw)


GRADS = [tree(seed) for seed in range(1, 2 * STEPS + 1)]


def train(optimizer, params, state, all_grads):
    for grads in all_grads:
        if hasattr(optimizer, "step"):
            params, state = optimizer.step(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def begun(optimizer):
    params = tree(0)
    return train(optimizer, params, optimizer.init(params), GRADS[:STEPS])


def ours(name, kind, momentum_decay):
    settings = {**STOCK[name][1], "momentum_decay": momentum_decay}
    return (kind or (nadamw if "weight_decay" in settings else plain))(RATE, **settings)


def converted(state, params, optimizer, momentum_decay, path):
    return params, from_optax(state, optimizer.init(params), momentum_decay=momentum_decay)


def by_file(state, params, optimizer, momentum_decay, path):
    nadam.checkpoint.save(path, state, params)
    empty = jax.tree.map(jnp.zeros_like, params)
    like = optimizer.init(empty)
    state, params = nadam.checkpoint.load(path, (optimizer, like) if hasattr(optimizer, "step") else like, empty)
    return params, state


def by_file_and_converted(state, params, optimizer, momentum_decay, path):
    params, state = by_file(state, params, optax.adam(RATE), momentum_decay, path)
    return converted(state, params, optimizer, momentum_decay, path)


def as_it_is(state, params, optimizer, momentum_decay, path):
    return params, state


def far(params, expected):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    return max(apart(x, y, 1.0, np.float32) for x, y in pairs)


def reference(params, state, settings, scale):
    """Parameters of the reference that goes on from optax's moments, and a momentum product that is scaled."""
    (moments,) = (each for each in state if isinstance(each, optax.ScaleByAdamState))
    run = Reference(jax.tree.leaves(params), learning_rate=RATE, epsilon=1e-8, **settings)
    run.m, run.v = ([np.asarray(leaf, float) for leaf in jax.tree.leaves(each)] for each in (moments.mu, moments.nu))
    decay = settings["momentum_decay"]
    run.product = scale * math.prod(0.9 * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(1, STEPS + 1))
    run.i = STEPS
    for grads in GRADS[STEPS:]:
        run.step(jax.tree.leaves(grads))
    return run.p


@pytest.mark.parametrize("momentum_decay", [math.inf, 0.004])
@pytest.mark.parametrize("way", [converted, by_file])
@pytest.mark.parametrize("kind", [fused, None], ids=["fused", "optax"])
@pytest.mark.parametrize("name", STOCK)
def test_ours_goes_on_from_optax(name, kind, way, momentum_decay, tmp_path):
    cls, settings = STOCK[name]
    params, state = begun(cls(RATE, **settings))
    settings = {**settings, "momentum_decay": momentum_decay}
    if way is by_file and kind is None and momentum_decay < math.inf:
        with pytest.raises(
            ValueError, match=r"no momentum product: .* load into a state of optax\.adam, and .*from_optax"
        ):
            way(state, params, ours(name, kind, momentum_decay), momentum_decay, tmp_path / "a")
        way = by_file_and_converted
    expected = {scale: reference(params, state, settings, scale) for scale in (1.0, 0.98)}
    optimizer = ours(name, kind, momentum_decay)
    found, _ = train(optimizer, *way(state, params, optimizer, momentum_decay, tmp_path / "a"), GRADS[STEPS:])
    assert far(found, expected[1.0]) <= ULPS
    assert far(found, expected[0.98]) > 20 * ULPS


@pytest.mark.parametrize("way", [converted, by_file, as_it_is])
@pytest.mark.parametrize("name", ["nadam", "nadamw"])
def test_ours_goes_on_as_optax_would(name, way, tmp_path):
    cls, settings = STOCK[name]
    stock, optimizer = cls(RATE, **settings), ours(name, None, math.inf)
    params, state = begun(stock)
    expected, _ = train(stock, params, state, GRADS[STEPS:])
    found, _ = train(optimizer, *way(state, params, optimizer, None, tmp_path / "a"), GRADS[STEPS:])
    assert far(found, expected) <= 2 * ULPS


@pytest.mark.parametrize("kind", [fused, None], ids=["fused", "optax"])
@pytest.mark.parametrize("name", STOCK)
def test_optax_goes_on_from_ours(name, kind, tmp_path):
    cls, settings = STOCK[name]
    optimizer, stock = ours(name, kind, 0.004), cls(RATE, **settings)
    params, state = begun(optimizer)
    moments = to_optax(state)
    moments = moments if kind is fused else moments[0]
    by_hand = (moments, *stock.init(params)[1:])
    nadam.checkpoint.save(tmp_path / "a", (optimizer, state) if kind is fused else state, params)
    empty = jax.tree.map(jnp.zeros_like, params)
    state, params = nadam.checkpoint.load(tmp_path / "a", stock.init(empty), empty)
    assert jax.tree.structure(state) == jax.tree.structure(by_hand)
    expected, _ = train(stock, params, by_hand, GRADS[STEPS:])
    found, _ = train(stock, params, state, GRADS[STEPS:])
    assert far(found, expected) == 0
    assert int(state[0].count) == STEPS
    wrong = jax.tree.map(lambda leaf: leaf * 1.01 if leaf.dtype == jnp.float32 else leaf, state)
    assert far(train(stock, params, wrong, GRADS[STEPS:])[0], expected) > 20 * ULPS


def test_a_state_alone_does_not_tell_the_settings_of_fused(tmp_path):
    params, state = begun(optax.adam(RATE))
    nadam.checkpoint.save(tmp_path / "a", state)
    with pytest.raises(ValueError, match=r"momentum_decay: .*give \(fused, state\)"):
        nadam.checkpoint.load(tmp_path / "a", fused(RATE).init(params))
