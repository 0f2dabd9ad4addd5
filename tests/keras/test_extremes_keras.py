"""nadam.keras.Nadam at the ends of its dtypes' range, beside Keras's own (rows 9 and 37); see extremes.py."""

import keras
import pytest
from test_numbers import BACKEND, FIRST_COMPILED, ROUTES, STOCK_ROUTE, numpy, tensors

from extremes import EPSILONS, STOCK_ULPS, check_epsilon, check_overflow, check_remedies
from nadam.keras import Nadam
from nadam.keras.backends import Backend
from nadam.kernels.xla import ffi


def trainer(cls, route, variables=1):
    """Trains the last of some variables that are alike."""

    def train(start, all_grads, **settings):
        params, after = [keras.Variable(start, dtype=start.dtype.name) for _ in range(variables)], []
        step = route(cls(**settings), params)
        for grads in all_grads:
            step([tensors([grads])[0] for _ in params])
            after.append(numpy(params)[-1])
        return after

    return train


@pytest.fixture(params=[*ROUTES, "keras.ops", *(["packed"] if BACKEND == "tensorflow" else [])])
def train(request, monkeypatch):
    """What computes a step."""
    if request.param == "packed":  # small variables, side by side
        return trainer(Nadam, ROUTES["tf.function"], 9)
    if request.param == "keras.ops":
        if BACKEND == "tensorflow":
            pytest.skip("a compiled step has its own way there")
        monkeypatch.setattr("nadam.keras.backends.backend.step", Backend().step)
        return trainer(Nadam, ROUTES["apply"])
    return trainer(Nadam, ROUTES[request.param])


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon(epsilon, train):
    check_epsilon(train, epsilon)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_epsilon_of_other_dtypes(dtype):
    route = trainer(Nadam, ROUTES[FIRST_COMPILED])
    if BACKEND == "jax" and dtype == "float64":
        import jax

        with jax.enable_x64(True):
            return check_epsilon(route, 5e-324, dtype)
    return check_epsilon(route, 1e-40, dtype)


@pytest.mark.skipif(BACKEND != "jax", reason="of XLA's loops and kernels, on JAX")
@pytest.mark.parametrize("kernels", [False, True])
def test_compiled_with_kernels_and_without(kernels, monkeypatch):
    assert ffi.usable()
    if not kernels:
        monkeypatch.setattr(ffi, "usable", lambda: False)
    check_epsilon(trainer(Nadam, STOCK_ROUTE), 1e-60)
    check_overflow(trainer(Nadam, STOCK_ROUTE))


def test_a_gradient_whose_square_overflows(train):
    check_overflow(train)
    check_remedies(train)


def test_what_keras_does_with_one():
    """On torch it is another formula than on the other backends."""
    stock = trainer(keras.optimizers.Nadam, STOCK_ROUTE)
    check_overflow(stock, frozen=BACKEND == "torch", ulps=STOCK_ULPS)


def test_keras_without_epsilon():
    check_epsilon(trainer(keras.optimizers.Nadam, STOCK_ROUTE), 0.0, ulps=STOCK_ULPS, beta_2=0.999)
