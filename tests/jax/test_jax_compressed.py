"""`fused` with moments of 8 bits: by the kernel and by XLA's loops, the codes of the format and of the NumPy host."""

import math
import pickle

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax_training import assert_close, same

import nadam
from nadam.core.compressed import narrowed, num_scales, widened
from nadam.core.rounding import keys
from nadam.jax import from_optax, fused, to_optax
from nadam.kernels.xla import ffi

ENABLE_X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
# Not all of whole blocks of 2,048, and one of several chunks; "small" stays as it is.
SHAPES = {"matrix": (64, 128), "odd": (70_001,), "rest": (3, 1500), "small": (4095,)}
SEED = 5
HOST = {"learning_rate": 0.01, "momentum_decay": 1.0}  # whose other defaults are the NumPy host's
SETTINGS = {
    "plain": {},
    "average": {"weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 2, "clipvalue": 0.5},
    "accumulation": {"global_clipnorm": 1.0, "gradient_accumulation_steps": 2},
    "skip": {"skip_nonfinite": True},
}
KERNEL = pytest.param(True, marks=pytest.mark.skipif(not ffi.usable(), reason="XLA does not take the kernels here"))
BOTH = pytest.mark.parametrize("kernels", [KERNEL, False], ids=["kernel", "loops"])


@pytest.fixture
def by(monkeypatch):
    return lambda kernels: None if kernels else monkeypatch.setattr(ffi, "usable", lambda: False)


def draw(step, dtype="float32"):
    """Values of many magnitudes."""
    rng = np.random.default_rng(step)
    values = {k: rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0, shape) for k, shape in SHAPES.items()}
    return jax.tree.map(lambda value: value.astype(jnp.dtype(dtype)), values)


def make(**settings):
    return fused(eps=1e-7, state_bits=8, seed=SEED, **HOST, **settings)


def compiled(optimizer):
    return jax.jit(lambda params, state, grads: optimizer.step(grads, state, params), donate_argnums=(0, 1))


def train(optimizer, steps, start=None, dtype="float32"):
    params = jax.tree.map(jnp.asarray, draw(100, dtype))
    carry = start or (params, optimizer.init(params))
    step = compiled(optimizer)
    for i in steps:
        carry = step(*carry, draw(i, dtype))
    assert step._cache_size() == 1
    return carry


def assert_codes_close(found, wanted):
    """The same but where a moment's last bit is another, which moves about one code of a million by one."""
    for scales in ("mu_scale", "nu_scale"):
        assert same(getattr(found, scales), getattr(wanted, scales))
    for name in ("mu", "nu"):
        for key, one in getattr(found, name).items():
            one, other = np.asarray(one), np.asarray(getattr(wanted, name)[key])
            assert one.dtype == other.dtype
            if key == "small":
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
            else:
                difference = np.abs(one.astype(int) - other)
                assert difference.max() <= 1
                assert (difference > 0).mean() < 1e-4


@pytest.mark.skipif(not ffi.usable(), reason="XLA does not take the kernels here")
@pytest.mark.parametrize(
    ("settings", "dtype"), [*((name, "float32") for name in SETTINGS), ("plain", "bfloat16"), ("average", "float16")]
)
def test_kernel_and_loops_give_the_same_codes(by, settings, dtype):
    by(True)
    params, state = train(make(**SETTINGS[settings]), range(4), dtype=dtype)
    by(False)
    others, other = train(make(**SETTINGS[settings]), range(4), dtype=dtype)
    assert_codes_close(state, other)
    unit = float(jnp.finfo(dtype).eps)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(np.float64(one), np.float64(two), rtol=4 * unit, atol=0.1 * unit)


@BOTH
def test_the_codes_are_those_of_the_numpy_host(by, kernels):
    by(kernels)
    params, state = train(make(), range(4))
    values = draw(100)
    host = nadam.Nadam(0.01, state_bits=8, seed=SEED)
    names = sorted(values)  # the order in which JAX has them
    host.build([values[name] for name in names])
    for step in range(4):
        grads = draw(step)
        host.apply([grads[name] for name in names])
    slots = {"mu": "exp_avg", "nu": "exp_avg_sq", "mu_scale": "exp_avg_scale", "nu_scale": "exp_avg_sq_scale"}
    entries = dict(zip(names, host._parameters.entries, strict=True))
    theirs = {field: {name: getattr(e, slot) for name, e in entries.items()} for field, slot in slots.items()}
    assert_codes_close(state, state._replace(**theirs))
    for name in names:
        np.testing.assert_allclose(params[name], values[name], rtol=1e-5, atol=1e-6)


@BOTH
def test_a_step_is_a_wide_one_and_the_format(by, kernels):
    """The codes are those of core/compressed.py, of what a step with float32 moments makes of the same ones."""
    by(kernels)
    optimizer, wide = make(), fused(eps=1e-7, **HOST)
    params, state = train(optimizer, range(3))
    moments = to_optax(state)
    before = wide.init(params)._replace(
        count=state.count, mu=moments.mu, nu=moments.nu, mu_product=state.mu_product, last_step=state.last_step
    )
    grads = draw(3)
    expected, full = jax.jit(wide.step)(grads, before, params)
    found, state = jax.jit(optimizer.step)(grads, state, params)
    fields = "mu", "nu", "mu_scale", "nu_scale"
    made = {field: dict(getattr(state, field)) for field in fields}
    for member, name in enumerate(sorted(SHAPES)):
        codes = [np.asarray(full.mu[name]), np.asarray(full.nu[name]), None, None]
        if name != "small":
            codes = narrowed(*codes[:2], key=keys(SEED, 4, np.array([member])))
        for field, each in zip(fields, codes, strict=True):
            made[field][name] = each
    if kernels:
        assert same(found, expected)
        assert same([getattr(state, field) for field in fields], [made[field] for field in fields])
    else:  # XLA makes other loops of the two, which may differ in the last bit
        assert_codes_close(state, state._replace(**made))


def test_what_is_kept_in_8_bits():
    params = {**jax.tree.map(jnp.asarray, draw(0)), "none": None}
    optimizer = make(use_ema=True)
    with ENABLE_X64(True):
        params["double"] = jnp.ones(5000, "float64")
        state = optimizer.init(params)
        _, state = jax.jit(optimizer.step)(params, state, params)
    for name in SHAPES:
        compressed, size = name != "small", params[name].size
        assert state.mu[name].dtype == ("int8" if compressed else "float32")
        assert state.nu[name].dtype == ("uint8" if compressed else "float32")
        for scales in (state.mu_scale, state.nu_scale):
            assert scales[name] is None or (scales[name].dtype, scales[name].shape) == ("uint8", (num_scales(size),))
            assert (scales[name] is not None) == compressed
    assert state.mu["double"].dtype == "float64"
    assert state.ema["matrix"].dtype == "float32"
    assert make().init(jnp.ones(3)).mu_scale is None
    assert fused(0.1).init(jnp.ones(5000)).mu_scale is None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("x64", [False, True])
@BOTH
def test_types_stay(by, kernels, x64, settings):
    by(kernels)
    with ENABLE_X64(x64), jax.numpy_dtype_promotion("strict"):
        optimizer = make(**settings)
        params = jax.tree.map(jnp.asarray, draw(100))
        state = optimizer.init(params)
        before = jax.tree.map(jax.typeof, (params, state))
        scan = jax.jit(lambda carry, g: jax.lax.scan(lambda c, _: (optimizer.step(g, *c[::-1]), None), carry, length=3))
        carry, _ = scan((params, state), draw(0))
        assert jax.tree.map(jax.typeof, carry) == before


@BOTH
def test_resumed_bit_for_bit(by, kernels):
    by(kernels)
    optimizer = make(use_ema=True)
    whole = train(optimizer, range(6))
    half = train(optimizer, range(3))
    resumed = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.tree.map(np.asarray, half))))
    assert same(train(make(use_ema=True), range(3, 6), start=jax.tree.map(jnp.copy, resumed)), whole)
    other = fused(eps=1e-7, state_bits=8, seed=SEED + 1, use_ema=True, **HOST)
    assert not same(train(other, range(3, 6), start=resumed)[1].mu, whole[1].mu)


@BOTH
def test_a_skipped_call_changes_nothing(by, kernels):
    by(kernels)
    optimizer = make(skip_nonfinite=True)
    params, state = train(optimizer, range(2))
    grads = draw(2)
    grads["odd"][-1] = np.inf
    after, new = jax.jit(optimizer.step)(grads, state, params)
    assert int(new.last_step.skipped_steps) == 1
    assert same(after, params)
    for name in ("mu", "nu", "mu_scale", "nu_scale"):
        assert same(getattr(new, name), getattr(state, name))


def test_in_both_phases_of_optax():
    optimizer = make()
    params, state = train(optimizer, range(2))
    updates, new = jax.jit(optimizer.as_optax().update)(draw(2), state, params)
    expected, wanted = jax.jit(optimizer.step)(draw(2), state, params)
    assert same(new, wanted)
    assert_close(jax.tree.map(jnp.add, params, updates), expected, rtol=2e-7)


def test_under_vmap_each_is_as_by_itself():
    optimizer = make()
    runs = [jax.tree.map(jnp.asarray, draw(i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    states = jax.vmap(optimizer.init)(stacked)
    step = jax.jit(jax.vmap(lambda params, state: optimizer.step(params, state, params)))
    for _ in range(2):
        stacked, states = step(stacked, states)
    for i, params in enumerate(runs):
        state = optimizer.init(params)
        for _ in range(2):
            params, state = jax.jit(optimizer.step)(params, state, params)
        assert_codes_close(jax.tree.map(lambda leaf, i=i: leaf[i], states), state)


def test_differentiated():
    """By the gradient, through the step: as with float32 moments, since rounding has no slope."""
    params, grads = jax.tree.map(jnp.asarray, draw(100)), jax.tree.map(jnp.asarray, draw(0))

    def slope(optimizer):
        state = optimizer.init(params)
        loss = lambda grads: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(optimizer.step(grads, state, params)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss))(grads)

    found, expected = slope(make()), slope(fused(eps=1e-7, **HOST))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not ffi.usable(), reason="XLA does not take the kernels here")
@pytest.mark.parametrize("settings", [{}, {"skip_nonfinite": True}, {"use_ema": True}], ids=str)
def test_nothing_is_copied(settings):
    optimizer, size = make(**settings), 1 << 20
    params = {"w": jnp.ones(size)}
    memory = compiled(optimizer).lower(params, optimizer.init(params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 14
    kept = 4 + 2 + 2 / 32 + 4 * ("use_ema" in settings)  # bytes of a parameter
    assert kept * size <= memory.alias_size_in_bytes < kept * size + 1024


@pytest.mark.parametrize(
    ("name", "value"), [("state_bits", 4), ("state_bits", True), ("seed", -1), ("seed", 1 << 32), ("seed", 0.5)]
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r}: expected "):
        fused(0.1, **{name: value})


def test_states_of_other_settings_are_refused():
    params = {"a": jnp.ones(3), "b": {"w": jnp.ones((64, 100))}}
    small, wide = make(), fused(0.1)
    state = small.init(params)
    for optimizer, given, found, expected in [
        (small, wide.init(params), "float32 and scales None", r"int8 and \(256,\) with state_bits=8"),
        (wide, state, r"int8 and scales \(256,\)", "float32 and None with state_bits=None"),
        (small, state._replace(mu_scale={"a": None, "b": {"w": jnp.zeros(64, "uint8")}}), r"scales \(64,\)", "int8"),
        (wide, state._replace(mu_scale=None, nu_scale=None), "int8 and scales None", "float32"),
    ]:
        message = rf"^state\.mu\['b'\]\['w'\]: .* {found}, expected {expected}"
        with pytest.raises(ValueError, match=message):
            optimizer.step(params, given, params)
        with pytest.raises(ValueError, match=message):
            jax.jit(optimizer.step)(params, given, params)
    with pytest.raises(ValueError, match=r"^state\.nu_scale: its structure"):
        small.step(params, state._replace(nu_scale=[None]), params)
    # Where nothing is large the two are the same.
    few = {"a": jnp.ones(3)}
    assert same(small.step(few, wide.init(few), few)[0], small.step(few, small.init(few), few)[0])


def test_to_optax_and_back():
    params, state = train(make(), range(3))
    theirs = to_optax(state)
    for name in ("matrix", "odd"):
        flat = [np.asarray(t[name]).reshape(-1) for t in (state.mu, state.nu, state.mu_scale, state.nu_scale)]
        wide = [np.asarray(t[name]).reshape(-1) for t in (theirs.mu, theirs.nu)]
        assert same(wide, list(widened(*flat)))
    with pytest.warns(UserWarning, match="state_bits=8: .* rounded"):
        back = from_optax(theirs, make().init(params))
    again = to_optax(back)
    assert jax.tree.map(jax.typeof, back.mu) == jax.tree.map(jax.typeof, state.mu)
    for name in SHAPES:
        np.testing.assert_allclose(again.nu[name], theirs.nu[name], rtol=1 / 32)
        assert np.abs(again.mu[name] - theirs.mu[name]).max() <= np.abs(theirs.mu[name]).max() / 127


def test_the_optimizer_tells_how_it_was_made():
    assert (make().state_bits, make().seed, fused(0.1).state_bits) == (8, SEED, None)


def test_a_run_moves_from_numpy_and_back_with_its_codes(tmp_path):
    path, settings = tmp_path / "run.nadam", {"state_bits": 8, "seed": 3}
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((70, 90)).astype(np.float32), "b": np.zeros(9, np.float32)}
    optimizer = nadam.Nadam(0.01, momentum_decay=math.inf, **settings)
    for _ in range(3):
        optimizer.apply({name: rng.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items()}, arrays)
    nadam.checkpoint.save(path, optimizer, arrays)
    other = fused(0.01, eps=1e-7, **settings)
    params = jax.tree.map(jnp.zeros_like, arrays)
    state, params = nadam.checkpoint.load(path, (other, other.init(params)), params)
    entries = {entry.name: entry for entry in optimizer._parameters.entries}
    np.testing.assert_array_equal(params["w"], arrays["w"])
    names = {"mu": "exp_avg", "nu": "exp_avg_sq", "mu_scale": "exp_avg_scale", "nu_scale": "exp_avg_sq_scale"}
    for field, name in names.items():
        np.testing.assert_array_equal(getattr(state, field)["w"], getattr(entries["w"], name))
    nadam.checkpoint.save(path, (other, state), params)
    again = nadam.Nadam(0.01, momentum_decay=math.inf, **settings)
    nadam.checkpoint.load(path, again, {name: np.zeros_like(array) for name, array in arrays.items()})
    for name, kept in entries["w"].state.items():
        np.testing.assert_array_equal({e.name: e for e in again._parameters.entries}["w"].state[name], kept)
