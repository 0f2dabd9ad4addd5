"""In a jitted training step a large tensor is updated as soon as its gradient and those of the layer before exist."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from nadam.jax import fused
from nadam.kernels.xla import ffi

pytestmark = pytest.mark.skipif(not ffi.usable(), reason="XLA does not take the kernels here")
LAYERS, WIDTH = 12, 300
SIZE = 4 * WIDTH * WIDTH  # bytes of a layer


def model(named=True):
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32) for _ in range(LAYERS)]
    params = [{"bias": jnp.zeros(WIDTH), "weight": weight} for weight in weights]
    return {f"layer_{i}": layer for i, layer in enumerate(params)} if named else params


def loss(params, inputs):
    for i in range(LAYERS):
        layer = params[f"layer_{i}" if isinstance(params, dict) else i]
        inputs = jax.nn.relu(inputs @ layer["weight"] + layer["bias"])
    return jnp.mean((inputs - 1.0) ** 2)


def compiled(optimizer, params):
    def train(params, state, inputs):
        return optimizer.step(jax.grad(loss)(params, inputs), state, params)

    arguments = params, optimizer.init(params), jnp.ones((8, WIDTH))
    return jax.jit(train, donate_argnums=(0, 1)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("named", [True, False])
def test_gradients_do_not_wait_for_one_another(named):
    step, _ = compiled(fused(0.01), model(named))
    assert step.as_text().count("nadam-one_pass") == LAYERS + 1  # the biases have one call
    assert step.memory_analysis().temp_size_in_bytes < 5 * SIZE


@pytest.mark.parametrize("settings", [{"global_clipnorm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_where_all_gradients_are_needed_together_there_is_one_call(settings):
    step, _ = compiled(fused(0.01, **settings), model())
    assert step.as_text().count("nadam-one_pass") == 1
    assert step.memory_analysis().temp_size_in_bytes > LAYERS * SIZE


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "use_ema": True, "clipvalue": 0.01}], ids=str)
def test_the_numbers_are_those_of_a_step_by_itself(settings):
    optimizer = fused(0.01, **settings)
    step, (params, state, inputs) = compiled(optimizer, model())
    expected = optimizer.step(jax.jit(jax.grad(loss))(params, inputs), state, params)
    found = step(*jax.tree.map(jnp.copy, (params, state)), inputs)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # XLA may sum the gradients in another order in another program.
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-4, atol=1e-6)
