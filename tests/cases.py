"""Seeded parameters and gradients, and how far two results are apart."""

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")  # without it the files that import this one are skipped
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float16": np.float16, "bfloat16": BFLOAT16, "float32": np.float32, "float64": np.float64}
SHAPES = [(), (0,), (1,), (7, 5), (3, 0, 2), (257,), (4, 3, 2)]


def draw_params(rng, shapes, dtype):
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def draw_grads(rng, params, dtype=None, scale=1.0):
    return [np.asarray(rng.standard_normal(p.shape) * scale).astype(dtype or p.dtype) for p in params]


def apart(ours, reference, scale, dtype):
    """Largest distance in units in the last place, of numbers as large as ``scale``, in a dtype."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.size == 0:
        return 0.0
    scale = np.maximum(np.abs(np.asarray(scale, np.float64)), np.abs(reference))
    if np.dtype(dtype) == BFLOAT16:
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(scale, 1e-38))) - 7)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # infinity's is NaN
            ulp = np.spacing(np.maximum(scale, np.finfo(dtype).tiny).astype(dtype)).astype(np.float64)
    assert np.array_equal(np.isnan(ours), np.isnan(reference))
    same = (ours == reference) | np.isnan(ours)
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(ours - reference) / ulp)))


def same_bits(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
