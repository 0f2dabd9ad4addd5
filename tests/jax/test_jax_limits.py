"""`fused` at the limits: with float64 switched on, of trees without arrays, and where int32 ends."""

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax import numpy as jnp
from jax_training import assert_close, same

from nadam.jax import from_optax, fused, nadam, nadamw

ENABLE_X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
LAST = 2**31 - 1
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


def counting_from(optimizer, count, calls):
    """What each call gives, of an optimizer that has done so many."""
    params = {"w": jnp.linspace(-1.0, 2.0, 5)}
    state = optimizer.init(params)
    moments = {"mu": {"w": jnp.full(5, 0.1)}, "nu": {"w": jnp.full(5, 0.2)}, "mu_product": jnp.zeros(())}
    state, step, rng = (
        state._replace(count=jnp.int32(count), **moments),
        jax.jit(optimizer.step),
        np.random.default_rng(1),
    )
    for i in range(calls):
        grads = {"w": jnp.asarray(rng.normal(size=5), "float32").at[0].set(np.nan if i == 7 else 1.0)}
        params, state = step(grads, state, params)
        yield params, state


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("frequency", [None, 1, 2, 5])
def test_the_count_of_fused_stays_where_int32_ends(steps, frequency, before):
    """Windows and overwriting go on as in a run that is at the same place in both, and far from the end."""
    optimizer = fused(
        lambda count: jnp.where(count >= 0, 0.1, jnp.nan),
        use_ema=True,
        ema_overwrite_frequency=frequency,
        gradient_accumulation_steps=steps,
        skip_nonfinite=True,
    )
    first, calls, kept = LAST - before, 24, []
    runs = [counting_from(optimizer, count, calls) for count in (first, first - 2 * 3 * 5 * 10**7)]
    for i, ((params, state), (expected, other)) in enumerate(zip(*runs, strict=True)):
        kept.append(min(first + i + (i < 7), LAST))  # the eighth call is skipped
        assert int(state.count) == kept[-1]
        assert int(state.last_step.step) == kept[-1] // (steps or 1)
        assert same(params, expected)
        for name in ("mu", "nu", "ema", "accumulator"):
            assert same(getattr(state, name), getattr(other, name))
    assert len(kept) == calls
    assert kept[-1] == LAST
    assert int(state.last_step.skipped_steps) == 1


def test_what_is_overwritten_more_rarely_than_can_be_counted():
    optimizer = fused(
        0.1, use_ema=True, ema_overwrite_frequency=2**30, gradient_accumulation_steps=2, skip_nonfinite=True
    )
    far = counting_from(optimizer, LAST - 10**6, 9)
    for (params, state), (expected, _) in zip(counting_from(optimizer, LAST, 9), far, strict=True):
        assert same(params, expected)
        assert int(state.count) == LAST


@pytest.mark.parametrize("decay", [None, 0.004])
@pytest.mark.parametrize("make", [nadam, nadamw])
def test_the_counts_of_the_transformations_stay_where_int32_ends(make, decay):
    optimizer, params = make(optax.constant_schedule(0.1), momentum_decay=decay), {"w": jnp.linspace(-1.0, 2.0, 5)}
    runs = []
    for count in (LAST - 1, LAST - 10**6):
        tree, state = params, optimizer.init(params)
        state = jax.tree.map(lambda leaf, count=count: jnp.int32(count) if leaf.dtype == jnp.int32 else leaf, state)
        for _ in range(4):
            updates, state = jax.jit(optimizer.update)(params, state, tree)
            tree = optax.apply_updates(tree, updates)
        runs.append(tree)
        counts = [int(leaf) for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
        assert counts == [min(count + 4, LAST)] * 2
    assert same(*runs)
    assert not same(runs[0], params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(runs))


def test_more_calls_than_can_be_counted_come_from_optax():
    like = fused(0.1, gradient_accumulation_steps=3).init({"w": jnp.ones(2)})
    theirs = optax.nadam(0.1).init({"w": jnp.ones(2)})
    theirs = optax.tree_utils.tree_set(theirs, count=jnp.int32(LAST))
    state = from_optax(theirs, like, gradient_accumulation_steps=3)
    assert int(state.count) == LAST // 3 * 3  # a window that begins
    assert int(state.last_step.step) == LAST
