"""State of 8 bits: the format, the kernel that is its twin, what a step loses by it, and what is refused."""

import copy
import pickle

import numpy as np
import pytest

import nadam
from nadam.core import compressed
from nadam.core.compressed import BLOCK, LANES, SMALLEST
from nadam.core.rounding import keys
from nadam.kernels.cpu import threads

# Partial rows, partial blocks, several chunks.
SHAPES = [(SMALLEST,), (50, 83), (3 * BLOCK + 1,), (LANES * 70 + 5,), (40_000,)]


def blocks(array):
    return compressed.in_blocks(array.ravel(order="K"))


def scales(entry):
    return entry.exp_avg_scale.reshape(-1, LANES), entry.exp_avg_sq_scale.reshape(-1, LANES)


def spread_out(rng, shape, binades=60):
    """Normal numbers of very different sizes."""
    return (rng.standard_normal(shape) * 2.0 ** rng.uniform(-binades, 0, shape)).astype(np.float32)


def optimizer_of(params, **settings):
    made = nadam.Nadam(0.01, state_bits=8, **settings)
    made.build(params)
    return made, made._parameters.entries


@pytest.mark.parametrize("order", ["C", "F", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "use_ema": True, "clipnorm": 1.0}], ids=str)
def test_a_step_is_that_of_wide_moments_rounded_to_codes(order, shape, dtype, settings):
    """Bit for bit: parameters and averages as of float32 moments, which then become the codes of core/compressed.py."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(shape).astype(dtype)
    arrays = [np.array(start, order=order if order != "strided" else "C") for _ in range(2)]
    if order == "strided":
        arrays = [np.repeat(array, 2, axis=-1)[..., ::2] for array in arrays]
    small, (kept,) = optimizer_of(arrays[:1], seed=5, **settings)
    wide = nadam.Nadam(0.01, **settings)
    wide.build(arrays[1:])
    (moments,) = wide._parameters.entries
    assert (kept.exp_avg.dtype, kept.exp_avg_sq.dtype) == (np.int8, np.uint8)
    for step in range(1, 5):
        grad = spread_out(rng, shape)
        for array, values in zip(
            (moments.exp_avg, moments.exp_avg_sq),
            compressed.widen(blocks(kept.exp_avg), blocks(kept.exp_avg_sq), *scales(kept)),
            strict=True,
        ):
            flat = array if array.flags.c_contiguous else array.T
            flat.reshape(-1)[:] = values.reshape(-1)[: array.size]
        for optimizer in (small, wide):
            optimizer.apply([grad])
        np.testing.assert_array_equal(arrays[0], arrays[1])
        if kept.ema is not None:
            np.testing.assert_array_equal(kept.ema, moments.ema)
        index = np.arange(blocks(kept.exp_avg).size, dtype=np.uint32).reshape(-1, 32, LANES)
        chance = compressed.noise(index, keys(5, step, np.array([0]))[0])
        expected = compressed.narrow(blocks(moments.exp_avg), blocks(moments.exp_avg_sq), chance)
        there = (np.arange(index.size) < start.size).reshape(index.shape)
        np.testing.assert_array_equal(blocks(kept.exp_avg)[there], expected[0][there])
        np.testing.assert_array_equal(blocks(kept.exp_avg_sq)[there], expected[1][there])
        for mine, theirs in zip(scales(kept), expected[2:], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def moments_of(rng, blocks=40, binades=60):
    first = spread_out(rng, (blocks, 32, LANES), binades)
    return first, spread_out(rng, first.shape, binades) ** 2


def test_errors_are_bounded():
    """First moments: by a unit, 1/63 of the largest of 32 at most. Second: by a sixteenth, or they are the smallest."""
    rng = np.random.default_rng(1)
    first, second = moments_of(rng, binades=20)
    for _ in range(10):
        chance = rng.integers(0, 2**32, first.shape, dtype=np.uint32)
        back, squares = compressed.widen(*compressed.narrow(first, second, chance))
        largest = np.abs(first).max(axis=1, keepdims=True)
        assert (np.abs(back - first) <= largest / 63).all()
        smallest = second.max(axis=1, keepdims=True) * 2.0**-15 * (1 + 1 / 16)
        close = np.abs(squares / second - 1) <= 1 / 16
        assert (close | ((second <= smallest) & (squares <= smallest))).all()
        assert not close.all()


@pytest.mark.parametrize("top", [2.0**-110, 1e-20, 1.0, 1e30, 3e38])
def test_no_second_moment_becomes_zero_beside_one_that_is_not(top):
    """So the step, which divides by its square root, cannot explode."""
    second = np.full((1, 32, LANES), top, np.float32)
    second[0, 1:] *= np.float32(2.0) ** -np.arange(1, 32, dtype=np.float32)[:, None] * np.float32(1e-9)
    for chance in (0, 2**32 - 1):
        noise = np.full(second.shape, chance, np.uint32)
        _, back = compressed.widen(*compressed.narrow(second, second, noise))
        assert (back >= top * 2.0**-17).all()
        assert np.isfinite(back).all()


def test_a_step_does_not_explode_where_gradients_differ_by_many_orders():
    """Elements whose gradient comes once in a while, beside others with gradients a million times as large."""
    rng = np.random.default_rng(2)
    size = 4 * BLOCK
    params = [np.zeros(size, np.float32) for _ in range(2)]
    optimizers = [optimizer_of(params[:1])[0], nadam.Nadam(0.01)]
    scale = 10.0 ** rng.uniform(-8, 0, size)
    largest = [0.0, 0.0]
    for _ in range(200):
        grad = (scale * rng.standard_normal(size) * (rng.random(size) < 0.05)).astype(np.float32)
        for i, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            before = param.copy()
            optimizer.apply([grad], [param])
            largest[i] = max(largest[i], np.abs(param - before).max())
    assert largest[0] <= 1.25 * largest[1]


def test_rounding_is_unbiased():
    """The mean over many keys is the value, where nearest rounding would give the same code each time."""
    rng = np.random.default_rng(3)
    first, _ = moments_of(rng, 1, binades=3)
    second = (2.0 ** rng.uniform(-10, 0, first.shape)).astype(np.float32)
    index = np.arange(first.size, dtype=np.uint32).reshape(first.shape)
    total, squares, count = np.zeros(first.shape), np.zeros(first.shape), 4000
    for key in rng.integers(0, 2**32, count, dtype=np.uint32):
        codes = compressed.narrow(first, second, compressed.noise(index, key))
        a, b = compressed.widen(*codes)
        total, squares = total + a, squares + b
    unit = np.abs(first).max(axis=1, keepdims=True) / 63
    assert np.abs(total / count - first).max() < 5 * unit.max() / np.sqrt(count)
    assert np.abs(squares / count / second - 1).max() < 5 / 16 / np.sqrt(count)


def test_a_group_that_is_not_finite_stays_so():
    for value in (np.nan, np.inf, -np.inf):
        param = [np.zeros(SMALLEST, np.float32)]
        optimizer, _ = optimizer_of(param)
        grad = np.ones(SMALLEST, np.float32)
        grad[7] = value
        optimizer.apply([grad])
        assert np.isnan(param[0][7])
        optimizer.apply([np.ones(SMALLEST, np.float32)])
        lost = np.arange(7, BLOCK, LANES)  # the group that it shares a scale with
        assert np.isnan(param[0][lost]).all()
        assert np.isfinite(np.delete(param[0], lost)).all()


def test_small_and_wide_arrays_keep_their_moments():
    params = [np.ones(SMALLEST - 1, np.float32), np.ones(SMALLEST), np.ones(SMALLEST, np.complex64)]
    _, entries = optimizer_of([*params, np.ones(SMALLEST, np.float32)])
    assert [entry.exp_avg.dtype.name for entry in entries] == ["float32", "float64", "complex64", "int8"]
    assert sum(array.nbytes for array in entries[-1].state.values()) == SMALLEST * (2 + 2 / 32)


def run(steps, seed=0, begin=0, optimizer=None, params=None):
    rng = np.random.default_rng(9)
    if params is None:
        params = [rng.standard_normal(shape).astype(np.float32) for shape in [(300, 310), (7,), (9000,)]]
        optimizer, _ = optimizer_of(params, seed=seed, clipnorm=1.0, use_ema=True)
    for step in range(begin, steps):
        draws = np.random.default_rng(step)
        optimizer.apply([draws.standard_normal(param.shape).astype(np.float32) for param in params])
    return optimizer, params


def bits(optimizer, params):
    state = optimizer.state_dict()["state"].values()
    return [array.tobytes() for array in params] + [array.tobytes() for own in state for array in own.values()]


def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(threads, "_requested", None)
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    nadam.set_num_threads(1)
    expected = bits(*run(6))
    for count in (2, 4) * 10:
        nadam.set_num_threads(count)
        assert bits(*run(6)) == expected


def test_the_seed_decides_and_a_copy_goes_on_alike():
    optimizer, params = run(4, seed=1)
    assert bits(optimizer, params) != bits(*run(4, seed=2))
    whole = bits(*run(8, seed=1))
    twins = [(copy.deepcopy(optimizer), None), (pickle.loads(pickle.dumps(optimizer)), None)]
    for twin, _ in twins:
        held = [entry.array for entry in twin._parameters.entries]
        assert bits(*run(8, begin=4, optimizer=twin, params=held)) == whole
    assert bits(*run(8, begin=4, optimizer=optimizer, params=params)) == whole


@pytest.mark.parametrize("value", [4, 16, "8", True, 8.5])
def test_other_bits_are_refused(value):
    with pytest.raises(ValueError, match=r"state_bits=.*expected 8 or None"):
        nadam.Nadam(state_bits=value)


@pytest.mark.parametrize("value", [-1, 2**32, 1.5, None, True])
def test_other_seeds_are_refused(value):
    with pytest.raises(ValueError, match=r"seed=.*expected an integer"):
        nadam.Nadam(seed=value)
