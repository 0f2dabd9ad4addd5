"""Arrays that are not contiguous, complex, mapped from a file, of another class: the same bits as contiguous ones."""

import numpy as np
import pytest

import nadam
from cases import BFLOAT16, same_bits

EVERYTHING = {"clipnorm": 0.5, "weight_decay": 0.1, "use_ema": True, "gradient_accumulation_steps": 2}


def unaligned(values):
    raw = np.zeros(values.nbytes + 1, np.uint8)[1:]
    array = raw.view(values.dtype).reshape(values.shape)
    array[...] = values
    assert not array.flags.aligned or values.itemsize == 1
    return array


def strided(values):
    array = np.zeros(tuple(3 * n for n in values.shape), values.dtype)[tuple(slice(1, None, 3) for _ in values.shape)]
    array[...] = values
    return array


def transposed(values):
    array = np.zeros(values.shape[::-1], values.dtype).transpose()
    array[...] = values
    return array


def reversed_(values):
    array = np.zeros_like(values)[tuple(slice(None, None, -1) for _ in values.shape)]
    array[...] = values
    return array


def permuted(values):
    array = np.moveaxis(np.zeros((values.shape[1], values.shape[2], values.shape[0]), values.dtype), -1, 0)
    array[...] = values
    return array


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "transposed": transposed,
    "permuted": permuted,
    "strided": strided,
    "reversed": reversed_,
    "unaligned": unaligned,
    "contiguous": np.ascontiguousarray,
}


def trained(settings, params, grads):
    optimizer = nadam.Nadam(0.1, **settings)
    for _ in range(4):
        optimizer.apply(grads, params)
    return optimizer


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_same_bits_in_any_layout(of_param, of_grad, dtype):
    rng = np.random.default_rng(0)
    values, grad = (rng.standard_normal((5, 7, 40)).astype(dtype) for _ in range(2))
    if np.dtype(dtype).kind == "c":
        values, grad = values + 1j * grad, grad - 2j * values
    for settings in ({}, EVERYTHING):
        straight, other = values.copy(), LAYOUTS[of_param](values.copy())
        expected = trained(settings, [straight], [grad.copy()])
        actual = trained(settings, [other], [LAYOUTS[of_grad](grad)])
        assert not same_bits(straight, values)
        if settings and of_param in ("Fortran", "transposed", "permuted"):
            # The norm adds up in the order of the memory.
            rtol = 1e-2 if straight.itemsize == 2 else 1e-6
            assert np.allclose(straight.astype(complex), other.astype(complex), rtol=rtol, atol=rtol)
            continue
        assert same_bits(straight, other)
        for a, b in zip(expected.variables, actual.variables, strict=True):
            assert same_bits(a, b)


def test_a_large_strided_array_goes_through_in_pieces():
    values = np.random.default_rng(0).standard_normal((300, 301)).astype(np.float32)
    straight, other = values.copy(), np.zeros((300, 602), np.float32)[:, ::2]
    other[...] = values
    trained({}, [straight], [values])
    trained({}, [other], [values])
    assert same_bits(straight, other)


def test_an_expanded_gradient():
    one, two = np.ones((3, 4)), np.ones((3, 4))
    trained({}, [one], [np.broadcast_to(np.array([[1.0], [2.0], [3.0]]), (3, 4))])
    trained({}, [two], [np.repeat([[1.0], [2.0], [3.0]], 4, axis=1)])
    assert same_bits(one, two)


def test_complex_parameters_are_two_reals():  # 17
    rng = np.random.default_rng(0)
    param = rng.standard_normal(6) + 1j * rng.standard_normal(6)
    grad = rng.standard_normal(6) + 1j * rng.standard_normal(6)
    for settings in ({}, {"clipnorm": 0.3}, {"clipvalue": 0.3}):
        one, two = param.copy(), np.stack([param.real, param.imag], -1)
        optimizer = trained(settings, [one], [grad])
        trained(settings, [two], [np.stack([grad.real, grad.imag], -1)])
        assert same_bits(one.view(np.float64).reshape(6, 2), two)
        assert optimizer.variables[2].dtype == np.complex128


def test_a_real_gradient_of_a_complex_parameter():
    param = np.ones(3, complex)
    trained({}, [param], [np.ones(3)])
    assert (param.real < 1).all()
    assert (param.imag == 0).all()


def test_a_memory_map(tmp_path):  # 19
    mapped = np.memmap(tmp_path / "params", np.float32, "w+", shape=(50,))
    mapped[:] = 1
    plain = np.ones(50, np.float32)
    trained(EVERYTHING, [mapped], [np.ones(50)])
    trained(EVERYTHING, [plain], [np.ones(50)])
    mapped.flush()
    assert same_bits(np.fromfile(tmp_path / "params", np.float32), plain)


def test_a_matrix():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(np.ones((2, 2)))
    plain = np.ones((2, 2))
    trained({}, [matrix], [np.ones((2, 2))])
    trained({}, [plain], [np.ones((2, 2))])
    assert np.array_equal(matrix, plain)


@pytest.mark.parametrize(
    "grad", [np.full(4, 2, ">f4"), np.full(4, 2, np.int8), np.full(4, 2, np.longdouble), [2.0] * 4]
)
def test_a_gradient_of_another_dtype(grad):  # 19, 20
    one, two = np.ones(4, np.float32), np.ones(4, np.float32)
    trained({}, [one], [grad])
    trained({}, [two], [np.full(4, 2, np.float32)])
    assert same_bits(one, two)


def test_gradients_may_be_new_arrays_or_lie_elsewhere_each_time():
    rng = np.random.default_rng(0)
    one, two = [np.ones((6, 5)), np.ones(3)], [np.ones((6, 5)), np.ones(3)]
    a, b = nadam.Nadam(0.1), nadam.Nadam(0.1)
    for step in range(12):
        grads = [rng.standard_normal((6, 5)), rng.standard_normal(3)]
        a.apply(grads, one)
        layout = list(LAYOUTS.values())[step % 7] if step % 7 != 2 else np.asfortranarray
        b.apply([layout(grads[0]), grads[1]], two)
    assert all(same_bits(x, y) for x, y in zip(one, two, strict=True))


def test_an_array_that_is_reshaped_or_retyped_in_place_is_noticed():
    param = np.ones(6, np.float32)
    optimizer = nadam.Nadam(0.1)
    optimizer.apply([np.ones(6, np.float32)], [param])
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply([np.ones((2, 3), np.float32)])
    param.resize(100, refcheck=False)
    with pytest.raises(ValueError, match=r"variables\['0'\]: shape \(100,\)"):
        optimizer.apply([np.ones(100, np.float32)])
    assert param[:6].max() < 1.0
    assert not param[6:].any()
