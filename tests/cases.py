"""Seeded parameters and gradients, and how far two results are apart."""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float16": np.float16, "bfloat16": BFLOAT16, "float32": np.float32, "float64": np.float64}
SHAPES = [(), (0,), (1,), (7, 5), (3, 0, 2), (257,), (4, 3, 2)]

# Every argument alone, with a value that changes the result.
ARGUMENTS = {
    "defaults": {},
    "learning_rate": {"learning_rate": 0.03},
    "schedule": {"learning_rate": lambda step: 0.01 / (step + 1)},
    "lr callable": {"learning_rate": lambda: 0.02},
    "beta_1": {"beta_1": 0.5},
    "beta_1 zero": {"beta_1": 0.0},
    "beta_1 callable": {"beta_1": lambda: 0.7},
    "beta_2": {"beta_2": 0.9},
    "beta_2 callable": {"beta_2": lambda: 0.95},
    "epsilon": {"epsilon": 0.1},
    "weight_decay": {"weight_decay": 0.3, "learning_rate": 0.1},
    "clipnorm": {"clipnorm": 0.5, "epsilon": 0.01},
    "clipvalue": {"clipvalue": 0.25, "epsilon": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.5, "epsilon": 0.01},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite_frequency": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "loss_scale_factor": {"loss_scale_factor": 100.0, "epsilon": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3, "epsilon": 0.01},
    "momentum_decay torch": {"momentum_decay": 0.004},
    "momentum_decay optax": {"momentum_decay": float("inf")},
    "skip_nonfinite": {"skip_nonfinite": True},
}


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
        ulp = np.spacing(np.maximum(scale, np.finfo(dtype).tiny).astype(dtype)).astype(np.float64)
    assert np.array_equal(np.isnan(ours), np.isnan(reference))
    same = (ours == reference) | np.isnan(ours)
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(ours - reference) / ulp)))


def same_bits(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
