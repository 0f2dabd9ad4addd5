"""Bad input: what it gives, and that nothing has changed by it. Numbers are the rows of faults/rows.txt."""

import math
import re
from contextlib import contextmanager

import numpy as np
import pytest

import nadam
from cases import BFLOAT16, same_bits
from nadam.kernels.layout import cut_into_chunks


def snapshot(optimizer, params):
    state = [a.copy() for entry in optimizer._parameters.entries for a in entry.state.values()]
    return [p.copy() for p in params], state, optimizer._parameters.counters.current.copy()


@contextmanager
def unchanged(optimizer, params):
    """Parameters, state and counters are the same afterwards, bit for bit."""
    before = snapshot(optimizer, params)
    yield
    after = snapshot(optimizer, params)
    assert all(same_bits(a, b) for x, y in zip(before[:2], after[:2], strict=True) for a, b in zip(x, y, strict=True))
    assert same_bits(before[2], after[2])


def trained(dtype=np.float32, **settings):
    params = [np.ones((3, 4), dtype), np.ones(5, dtype)]
    optimizer = nadam.Nadam(**settings)
    optimizer.apply([np.ones((3, 4), dtype), np.ones(5, dtype)], params)
    return optimizer, params


@pytest.mark.parametrize("argument", ["learning_rate", "beta_1", "epsilon", "clipnorm", "ema_momentum"])
@pytest.mark.parametrize("value", ["0.1", [0.1], np.ones(2), 1j, object()])
def test_a_value_that_is_no_number_is_refused(argument, value):
    with pytest.raises(TypeError, match=f"{argument}="):
        nadam.Nadam(**{argument: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("argument", ["learning_rate", "schedule", "beta_1", "beta_2"])
def test_a_value_computed_out_of_range(argument, bad):  # 5
    values = [0.5, bad, 0.5]
    name = "learning_rate" if argument == "schedule" else argument
    setting = (lambda step: values[step]) if argument == "schedule" else (lambda: values[min(calls[0], 2)])
    calls = [0]
    optimizer, params = trained(**{name: setting})
    calls[0] = 1
    with unchanged(optimizer, params), pytest.raises(ValueError, match=f"{name}={bad}: expected"):
        optimizer.apply([np.ones((3, 4)), np.ones(5)])


def test_structure_is_fixed_once_built():
    optimizer, params = trained()
    for argument, value in (("use_ema", True), ("gradient_accumulation_steps", 2)):
        with unchanged(optimizer, params), pytest.raises(ValueError, match=argument):
            setattr(optimizer, argument, value)


def test_the_same_parameter_twice():  # 6
    optimizer, params = trained()
    grads = [np.ones(5), np.ones(5)]
    with unchanged(optimizer, params), pytest.raises(ValueError, match="twice"):
        optimizer.apply(grads, [params[1], params[1]])
    array = np.ones(5)
    with pytest.raises(ValueError, match="share memory"):
        nadam.Nadam().apply(grads, [array, array])
    assert array.tolist() == [1.0] * 5


def test_memory_that_overlaps():  # 6
    base = np.ones(10)
    for pair in ([base[:6], base[5:]], [base, base[2:4]], [base[::2], base[1:3]]):
        with pytest.raises(ValueError, match="share memory"):
            nadam.Nadam().build(pair)
    expanded = np.lib.stride_tricks.as_strided(base, (3, 3), (8, 8))
    with pytest.raises(ValueError, match=r"variables\[0\]"):
        nadam.Nadam().build([expanded])
    nadam.Nadam().apply([np.ones(5), np.ones(5)], [base[::2], base[1::2]])  # interleaved, but apart
    optimizer, params = trained()
    with unchanged(optimizer, params), pytest.raises(ValueError, match="shares memory"):
        optimizer.apply([np.ones((3, 4)), params[1]])
    with unchanged(optimizer, params), pytest.raises(ValueError, match="shares memory"):
        optimizer.apply([params[0][::-1], np.ones(5)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_a_gradient_that_is_not_finite(bad, dtype):  # 7
    param = np.ones(3, dtype)
    nadam.Nadam(0.1).apply([np.array([1.0, bad, 1.0], dtype)], [param])
    assert np.isnan(param.astype(float)).tolist() == [False, True, False]

    params = [np.ones(3, dtype), np.ones(2, dtype)]
    optimizer = nadam.Nadam(0.1, skip_nonfinite=True)
    optimizer.apply([np.ones(3, dtype), np.ones(2, dtype)], params)
    before = snapshot(optimizer, params)
    optimizer.apply([np.ones(3, dtype), np.array([1.0, bad], dtype)])
    after = snapshot(optimizer, params)
    assert all(same_bits(a, b) for x, y in zip(before[:2], after[:2], strict=True) for a, b in zip(x, y, strict=True))
    assert optimizer.last_step.skipped_steps == 1
    assert optimizer.iterations == 1


@pytest.mark.parametrize("where", ["param", "grad"])
@pytest.mark.parametrize("grad_dtype", [BFLOAT16, np.float32])
def test_a_bfloat16_parameter_stays_nan_whatever_the_nan(where, grad_dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    nans = bits[np.isnan(bits.view(BFLOAT16).astype(np.float32))].view(BFLOAT16)
    assert len(nans) == 254
    param = nans.copy() if where == "param" else np.ones(len(nans), BFLOAT16)
    grad = np.ones(len(nans), grad_dtype)
    if where == "grad":
        grad[:] = nans.astype(grad_dtype)
        if grad_dtype == np.float32:
            grad.view(np.uint32)[:] |= 0xFFFF  # such as would carry over
    optimizer = nadam.Nadam(0.1, use_ema=True, ema_overwrite_frequency=2, gradient_accumulation_steps=2)
    for _ in range(6):
        optimizer.apply([grad], [param])
        if where == "param" or optimizer.iterations:
            assert np.isnan(param.astype(np.float32)).all()


def test_clipping_by_global_norm_shows_what_is_not_finite():
    params = [np.ones(2), np.ones(2)]
    nadam.Nadam(global_clipnorm=1.0).apply([np.array([np.inf, 1.0]), np.ones(2)], params)
    assert np.isnan(params).all()


def test_float16_gradients_that_are_small_none_or_large():  # 8
    for grad, expected in ((1e-5, 0.99), (0.0, 1.0), (300.0, 0.99)):
        param = np.ones(2, np.float16)
        nadam.Nadam(0.01).apply([np.full(2, grad, np.float16)], [param])
        assert param.astype(float) == pytest.approx([expected] * 2, abs=0.0015)
    assert expected != 1.0


def test_float32_gradients_whose_square_overflows():  # 9
    large = np.full(4, 1e25, np.float32)
    for clip in ("clipnorm", "global_clipnorm", "clipvalue"):
        param, small = np.ones(4, np.float32), np.ones(4, np.float32)
        nadam.Nadam(0.01, **{clip: 1.0}).apply([large], [param])
        expected = np.full(4, 1.0 if clip == "clipvalue" else 0.5, np.float32)
        nadam.Nadam(0.01).apply([expected], [small])
        assert param == pytest.approx(small, abs=1e-7)
    optimizer, _params = trained(skip_nonfinite=True)
    optimizer.apply([np.full((3, 4), 1e25, np.float32), np.ones(5, np.float32)])
    assert optimizer.last_step.skipped
    param = np.ones(4, np.float32)  # else as in IEEE arithmetic: an infinite square, and no step
    optimizer = nadam.Nadam(0.01)
    optimizer.apply([large], [param])
    assert np.isinf(optimizer.variables[3]).all()
    assert param.tolist() == [1.0] * 4


@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 300.0), (np.float32, 1e20), (np.float64, 1e200)])
def test_the_norm_of_finite_gradients_is_finite(dtype, value):
    param = np.ones(4, dtype)
    optimizer = nadam.Nadam(global_clipnorm=1.0)
    optimizer.apply([np.full(4, value, dtype)], [param])
    assert optimizer.last_step.grad_norm == pytest.approx(2 * float(dtype(value)), rel=1e-6)
    assert np.isfinite(param.astype(float)).all()
    assert (param < 1).all()


def test_the_largest_value_whose_square_is_finite_is_not_skipped():
    for dtype in (np.float32, np.float64):
        edge = np.sqrt(np.finfo(dtype).max, dtype=dtype)
        edge = edge if np.isfinite(np.square(edge)) else np.nextafter(edge, dtype(0))
        optimizer = nadam.Nadam(skip_nonfinite=True)
        optimizer.apply([np.array([edge])], [np.ones(1, dtype)])
        assert not optimizer.last_step.skipped
        with np.errstate(over="ignore"):
            optimizer.apply([np.array([np.nextafter(edge, dtype(np.inf))])])
        assert optimizer.last_step.skipped


def test_the_gradient_is_left_as_found():  # 11
    for settings in (
        {},
        {"clipnorm": 0.1, "loss_scale_factor": 4.0, "use_ema": True, "gradient_accumulation_steps": 2},
    ):
        grads = [np.full((3, 4), 3.0), np.full(5, 3.0)]
        optimizer = nadam.Nadam(**settings)
        for _ in range(4):
            optimizer.apply(grads, [np.ones((3, 4)), np.ones(5)] if not optimizer.built else None)
        assert all((g == 3.0).all() for g in grads)


def test_zero_size_and_scalar_parameters():  # 12
    params = [np.zeros((0, 3)), np.array(1.0), np.zeros(())]
    optimizer = nadam.Nadam(0.1, global_clipnorm=1.0, use_ema=True)
    optimizer.apply([np.zeros((0, 3)), np.array(2.0), 3.0], params)
    assert params[1] < 1.0
    assert params[2] < 0.0
    only = nadam.Nadam(gradient_accumulation_steps=2, clipnorm=1.0)
    for calls in (1, 2, 3):
        only.apply([np.zeros(0)], [np.zeros(0)] if calls == 1 else None)
        assert only.iterations == calls // 2


def test_a_read_only_array():  # 14
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"variables\['w'\]: the array is read-only"):
        nadam.Nadam().build({"w": frozen})
    optimizer, params = trained()
    params[1].flags.writeable = False
    with unchanged(optimizer, params), pytest.raises(ValueError, match=r"variables\['1'\]: the array is read-only"):
        optimizer.apply([np.ones((3, 4)), np.ones(5)])


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([np.ones((3, 4)), 1.0], r"grads[1]: shape ()"),
        ([], "grads: 0 gradients"),
        ([None, None], "no gradient for any"),
        ({"2": np.ones(5)}, "grads['2']: no parameter has this name"),
    ],
)
def test_gradients_of_no_parameter(grads, message):  # 15
    optimizer, params = trained()
    with unchanged(optimizer, params), pytest.raises(ValueError, match=re.escape(message)):
        optimizer.apply(grads)


def test_arrays_that_the_optimizer_does_not_know():
    optimizer, params = trained()
    with unchanged(optimizer, params), pytest.raises(ValueError, match=r"variables\[1\]: not one of"):
        optimizer.apply([np.ones((3, 4)), np.ones(5)], [params[0], params[1].copy()])
    with unchanged(optimizer, params), pytest.raises(ValueError, match="other arrays"):
        optimizer.build([params[0]])
    with pytest.raises(ValueError, match="variables: expected the arrays to train"):
        nadam.Nadam().apply([np.ones(2)])


def test_a_first_call_that_fails_leaves_the_optimizer_unbuilt():
    optimizer, params = nadam.Nadam(), [np.ones(2)]
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply([np.ones(3)], params)
    assert not optimizer.built
    optimizer.apply([np.ones(4)], [np.ones(4)])


@pytest.mark.parametrize(
    "param",
    [
        np.ones(3, np.int32),
        np.ones(3, bool),
        np.array([1.0, None], object),
        np.array(["a"]),
        np.zeros(3, [("x", np.float32)]),
        np.ones(3, np.longdouble),
        np.ones(3, ">f4"),  # 19
        np.ma.masked_array(np.ones(3), [0, 1, 0]),
        [1.0, 2.0],
        1.0,
    ],
    ids=lambda param: f"{type(param).__name__}-{getattr(param, 'dtype', '')}",
)
def test_something_that_is_no_parameter(param):  # 16
    with pytest.raises(TypeError, match=r"variables\[0\]: "):
        nadam.Nadam().build([param])


@pytest.mark.parametrize("variables", [np.ones(3), "abc", None, 3.0, {1: np.ones(2)}])
def test_something_that_is_no_list_of_parameters(variables):
    with pytest.raises(TypeError, match="variables"):
        nadam.Nadam().build(variables)


def test_no_parameter_at_all():
    with pytest.raises(ValueError, match="at least one"):
        nadam.Nadam().build([])


@pytest.mark.parametrize("grad", [np.array(["a"] * 5), np.ma.ones(5), np.array([{}] * 5)])
def test_a_gradient_that_is_not_of_real_numbers(grad):
    optimizer, params = trained()
    with unchanged(optimizer, params), pytest.raises(TypeError, match=r"grads\[1\]"):
        optimizer.apply([np.ones((3, 4)), grad])


def test_a_gradient_of_zeros_counts_as_seen():  # 35
    params = [np.ones(2), np.ones(2), np.ones(2)]
    optimizer = nadam.Nadam(0.1, weight_decay=0.5, gradient_accumulation_steps=2)
    optimizer.apply([np.ones(2), np.zeros(2), None], params)
    optimizer.apply([np.ones(2), None, None])
    assert params[1].tolist() == [0.95] * 2  # it decays, as with a gradient of zeros in each call
    assert params[2].tolist() == [1.0] * 2
    for _ in range(2):
        optimizer.apply([np.ones(2), None, None])
    assert params[1].tolist() == [0.95] * 2


def test_more_than_two_to_the_31_elements():  # 22
    table = cut_into_chunks([3, 2**33 + 1])
    assert table.dtype == np.int64
    assert table[-1].tolist() == [1, 2**33, 1]
    assert table[:, 2].sum() == 2**33 + 4
