"""The rule itself: plain floats, NumPy, and every compiled format, against the reference and one another."""

import math

import numpy as np
import pytest
from numba import njit

from cases import BFLOAT16, apart
from nadam.core import element, gradient, rule
from nadam.core.dtypes import SMALLEST_NORMAL
from nadam.core.library import mathematics
from nadam.core.rebind import rebind
from nadam.core.scalars import averaging, clamp_eps, coefficients, momentum, where
from nadam.kernels.cpu import machine_code
from nadam.kernels.cpu.formats import FORMATS
from nadam.kernels.cpu.passes import KEEP_NAN, maximum

N = 1000


def inputs(dtype):
    rng = np.random.default_rng(0)
    p, g, m = (rng.standard_normal(N).astype(dtype) for _ in range(3))
    v = np.square(rng.standard_normal(N)).astype(dtype)
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "momentum_decay": 1.0, "adam_correction": False}
    c, _ = coefficients(7, **settings, momentum_product=0.2)
    return (p, g, m, v), (0.001, *c)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numba_numpy_and_floats_agree(dtype):
    arrays, scalars = inputs(dtype)
    scalars = tuple(dtype(x) for x in scalars)
    compiled = njit(rebind(rule.update, sqrt=math.sqrt), fastmath=KEEP_NAN)
    from_numpy = mathematics(np).update(*arrays, *scalars)
    for i in range(N):
        element = tuple(a[i] for a in arrays)
        from_numba = compiled(*element, *scalars)
        from_floats = rule.update(*(float(x) for x in element), *(float(x) for x in scalars))
        for a, b, c, scale in zip(from_numba, from_numpy, from_floats, (2.0, 3.0, 16.0), strict=True):
            assert apart(a, b[i], scale, dtype) <= 2  # fused multiply-add, and none
            assert apart(a, c, scale, dtype) <= 4


def test_rule_leaves_its_inputs_alone():
    arrays, scalars = inputs(np.float64)
    before = [a.copy() for a in arrays]
    mathematics(np).update(*arrays, *scalars)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


@pytest.mark.parametrize("value", [3.0, -3.0, 0.5, math.inf, -math.inf, math.nan])
def test_limit_agrees_and_keeps_nan(value):
    def smaller(a, b):
        return b if b < a else a

    def larger(a, b):
        return b if b > a else a

    compiled = njit(rebind(gradient.clip_by_value, minimum=njit(smaller), maximum=njit(larger)))
    expected = np.clip(value, -1.0, 1.0)
    for result in (
        gradient.clip_by_value(value, 1.0),
        mathematics(np).clip_by_value(np.float64(value), 1.0),
        compiled(value, 1.0),
    ):
        assert np.array_equal(result, expected, equal_nan=True)


@pytest.mark.parametrize(("eps", "scaled", "expected"), [
    (0.0, 0.0, 0.0),
    (5e-324, 0.0, 2.0**-126),
    (2e-38, 1e-39, 2.0**-126),
    (2.0**-126, 2.0**-126, 2.0**-126),
    (1e-8, 1e-9, 1e-9),
    (math.nan, math.nan, math.nan),
])  # fmt: skip
def test_clamp_eps_agrees(eps, scaled, expected):
    compiled = njit(rebind(clamp_eps, where=njit(rebind(where)), maximum=maximum))
    for each in (clamp_eps, mathematics(np).clamp_eps, compiled):
        assert np.array_equal(each(eps, scaled, SMALLEST_NORMAL["float32"]), expected, equal_nan=True)


def test_average_keeps_what_the_momentum_says():
    assert element.average(4.0, 8.0, 0.75, 0.25) == 5.0
    assert averaging(0.9, None, 1) == (0.0, False)
    assert averaging(0.9, 3, 3) == (0.9, True)
    assert averaging(0.9, 3, 4) == (0.9, False)


def test_momentum_warms_up_to_beta1():
    assert momentum(0.9, 1.0, 1) == pytest.approx(0.9 * (1 - 0.48))
    assert momentum(0.9, math.inf, 1) == 0.9
    assert momentum(0.9, 0.0, 10**9) == 0.45


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", BFLOAT16), ("float16", np.float16)])
def test_half_precision_is_widened_and_rounded_exactly(name, dtype):
    @njit
    def each(function, values, out):
        for i in range(values.size):
            out[i] = function(values[i])

    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(bits.size, np.float32)
    each(FORMATS[name].widen, bits, wide)
    expected = bits.view(dtype).astype(np.float32)
    assert np.array_equal(wide, expected, equal_nan=True)
    assert np.array_equal(np.signbit(wide), np.signbit(expected))
    # All halves, what lies just beside and halfway between two of them, and random bits.
    steps = (0, 1, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0x8001)
    around = [(wide.view(np.uint32) + np.uint32(step)).view(np.float32) for step in steps]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    values = np.concatenate([*around, random])
    narrow = np.empty(values.size, np.uint16)
    each(FORMATS[name].narrow, values, narrow)
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    numbers = ~np.isnan(values)
    assert np.array_equal(narrow[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(narrow.view(dtype)[~numbers].astype(np.float32)).all()


def test_kernels_are_made_once():
    assert machine_code.kernel("passes", "accumulate", "float32", "float32") is machine_code.kernel(
        "passes", "accumulate", "float32", "float32"
    )
