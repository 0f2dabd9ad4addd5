"""`fused` at the limits: with float64 switched on, and of trees without arrays."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax_training import assert_close

from nadam.jax import fused

ENABLE_X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
SETTINGS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 3},
    "skip": {"skip_nonfinite": True},
    "everything": {
        "clipnorm": 0.5,
        "weight_decay": 0.1,
        "momentum_decay": 0.004,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
        "skip_nonfinite": True,
    },
}
TREES = {
    "float32": ["float32", "float32"],
    "bfloat16": ["bfloat16", "bfloat16"],
    "float64": ["float64", "float64"],
    "mixed": ["float32", "bfloat16", "float64"],
}
EMPTY = {"dict": {}, "list": [], "None": {"x": None}, "no elements": {"x": jnp.zeros((0, 3))}}


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("params", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", None])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("steps", [None, 2])
def test_no_parameters(params, clip, skip, steps):
    optimizer = fused(0.1, **({clip: 1.0} if clip else {}), skip_nonfinite=skip, gradient_accumulation_steps=steps)
    for step in (optimizer.step, jax.jit(optimizer.step)):
        found, state = params, optimizer.init(params)
        for _ in range(4):
            found, state = step(params, state, found)
        assert types(found) == types(params)
        assert types(state) == types(optimizer.init(params))
        seen = state.last_step
        assert (int(state.count), int(seen.step), int(seen.skipped_steps)) == (4, 4 // (steps or 1), 0)
        if clip:
            assert (float(seen.grad_norm), float(seen.clip_factor)) == (0.0, 1.0)


def scanned(dtypes, settings, loss_scale):
    """Parameters and state after six calls: in a scan of three, twice; and as calls that are compiled themselves."""
    optimizer = fused(0.1, **settings)
    params = [jnp.asarray(np.linspace(-1.0, 2.0, 5 + i) + 0.05).astype(dtype) for i, dtype in enumerate(dtypes)]
    begin, grads = (params, optimizer.init(params)), jax.tree.map(jnp.sin, params)

    def step(carry, scale):
        return optimizer.step(grads, carry[1], carry[0], loss_scale=scale), None

    scan = jax.jit(lambda carry, scale: lax.scan(step, carry, jnp.stack([scale] * 3))[0])
    single, both = jax.jit(lambda carry, scale: step(carry, scale)[0]), []
    for function, times in ((scan, 2), (single, 6)):
        carry = begin
        for _ in range(times):
            carry = function(carry, loss_scale)
            assert types(carry) == types(begin)
        assert function._cache_size() == 1
        both.append(carry)
    assert_close(*both, rtol=1e-2 if "bfloat16" in dtypes else 1e-6, atol=1e-6)
    return both[0]


@pytest.mark.parametrize("dtypes", TREES.values(), ids=TREES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_with_float64_switched_on(settings, dtypes):
    with jax.numpy_dtype_promotion("strict"):  # nothing is widened on the way either
        with ENABLE_X64(True):
            params, state = scanned(dtypes, settings, jnp.float32(4.0))
            assert [leaf.dtype for leaf in params] == dtypes
            assert state.mu_product.dtype == state.last_step.learning_rate.dtype == np.float64
        if "float64" not in dtypes:  # whose scalars are then of another width, and nothing else is
            with ENABLE_X64(False):
                narrow, _ = scanned(dtypes, settings, jnp.float32(4.0))
            assert_close(params, narrow, rtol=1e-2 if "bfloat16" in dtypes else 1e-6, atol=1e-6)
