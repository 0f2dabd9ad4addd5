"""`fused` at the limits: of trees without arrays."""

import jax
import pytest
from jax import numpy as jnp

from nadam.jax import fused

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
