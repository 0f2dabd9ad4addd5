"""nadam.jax at the ends of its dtypes' range, beside optax (rows 9 and 37); see extremes.py."""

from functools import partial
from math import inf

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from extremes import EPSILONS, STOCK_ULPS, check_epsilon, check_overflow, check_remedies
from nadam.jax import fused, nadam, nadamw
from nadam.kernels.xla import ffi

ENABLE_X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
PSI = {"momentum_decay": inf}


def transforming(make):
    """Trains by a gradient transformation."""

    def train(start, all_grads, learning_rate, epsilon, beta_2, momentum_decay):
        assert momentum_decay == inf  # as it is where none is given
        optimizer = make(learning_rate, b2=beta_2, eps=epsilon)
        params, after = jnp.asarray(start), []
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for grads in all_grads:
            updates, state = update(jnp.asarray(grads), state, params)
            params = optax.apply_updates(params, updates)
            after.append(np.array(params))
        return after

    return train


def whole(start, all_grads, learning_rate, epsilon, beta_2, compiled=True, **settings):
    """Trains by `fused`."""
    optimizer = fused(learning_rate, b2=beta_2, eps=epsilon, **settings)
    params, after = jnp.asarray(start), []
    state = optimizer.init(params)
    step = jax.jit(optimizer.step, donate_argnums=(1, 2)) if compiled else optimizer.step
    for grads in all_grads:
        params, state = step(jnp.asarray(grads), state, params)
        after.append(np.array(params))
    return after


WAYS = {
    "kernel": whole,
    "loops": whole,
    "eagerly": partial(whole, compiled=False),
    "nadam": transforming(nadam),
    "nadamw": transforming(partial(nadamw, weight_decay=0.0)),
}


@pytest.fixture(params=WAYS)
def train(request, monkeypatch):
    """What computes a step."""
    assert ffi.usable()
    if request.param == "loops":
        monkeypatch.setattr(ffi, "usable", lambda: False)
    return WAYS[request.param]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon(epsilon, train):
    check_epsilon(train, epsilon, **PSI)


def test_epsilon_of_bfloat16(train):
    check_epsilon(train, 1e-40, "bfloat16", **PSI)


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 0.0), ("float32", 1e-60), ("float64", 5e-324)])
def test_epsilon_where_scalars_are_float64(dtype, epsilon, train):
    with ENABLE_X64(True):
        check_epsilon(train, epsilon, dtype, **PSI)


def test_a_gradient_whose_square_overflows(train):
    check_overflow(train, **PSI)
    if train is whole or isinstance(train, partial):
        check_remedies(train, **PSI)


def test_a_float64_gradient_whose_square_overflows(train):
    with ENABLE_X64(True):
        check_overflow(train, "float64", **PSI)


def test_what_optax_does():
    stock = transforming(optax.nadam)
    check_epsilon(stock, 0.0, ulps=STOCK_ULPS, beta_2=0.999, **PSI)
    check_overflow(stock, frozen=True, ulps=STOCK_ULPS, **PSI)
