"""Keras on torch through the GPU kernels, in Triton's interpreter, beside the CPU's (test_on_torch.py)."""

import keras
import numpy as np
import pytest
import torch

from nadam.keras import Nadam
from nadam.torch.gpu import bucket_cache as gpu_parts

SETTINGS = {
    "defaults": {},
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
    "clipping, decay and averages": {
        "global_clipnorm": 0.5, "epsilon": 0.1, "weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 2
    },
    "clipnorm": {"clipnorm": 0.5, "epsilon": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "epsilon": 0.1},
    "skipping": {"skip_nonfinite": True},
    "tracking": {"track_grad_norm": True},
    "loss scale": {"loss_scale_factor": 8.0, "epsilon": 0.1},
}  # fmt: skip
SHAPES = [(3, 4), (5,), ()]


@pytest.fixture
def kernels(monkeypatch):
    """How often the GPU kernels moved something; they take the CPU's tensors here."""
    monkeypatch.setattr(gpu_parts, "DEVICES", {"cuda", "cpu"})
    module, calls = gpu_parts.on_gpu(), []
    real = module.moved
    monkeypatch.setattr(module, "moved", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def run(on_gpu, settings, steps=4, bad=None, missing=None):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape), dtype="float32") for shape in SHAPES]
    optimizer = Nadam(**{"learning_rate": 0.02, **settings})
    if "weight_decay" in settings:
        optimizer.exclude_from_weight_decay(var_list=variables[:1])
    optimizer.build(variables)
    optimizer._runtime.on_cpu = not on_gpu
    for step in range(steps):
        grads = [torch.tensor(rng.normal(size=shape), dtype=torch.float32) for shape in SHAPES]
        if step == bad:
            grads[0][0, 0] = torch.nan
        pairs = [(g, v) for i, (g, v) in enumerate(zip(grads, variables, strict=True)) if (step, i) != missing]
        optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])
    return optimizer, variables


def compare(one, other):
    for optimizers in zip(one[0].variables, other[0].variables, strict=True):
        a, b = (v.numpy() for v in optimizers)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_as_on_the_cpu(name, kernels):
    ours = run(True, SETTINGS[name])
    assert len(kernels) == 4
    theirs = run(False, SETTINGS[name])
    assert len(kernels) == 4
    compare(ours, theirs)
    seen, expected = ours[0].last_step, theirs[0].last_step
    assert (seen.step, seen.skipped_steps, seen.skipped) == (expected.step, expected.skipped_steps, expected.skipped)
    np.testing.assert_allclose(seen.learning_rate, expected.learning_rate, rtol=1e-6)
    if expected.grad_norm is not None:
        np.testing.assert_allclose(seen.grad_norm, expected.grad_norm, rtol=1e-6)


def test_skips(kernels):
    settings = {"skip_nonfinite": True, "global_clipnorm": 1.0, "epsilon": 0.1}
    ours, theirs = (run(on_gpu, settings, bad=2) for on_gpu in (True, False))
    compare(ours, theirs)
    assert ours[0].last_step.skipped_steps == 1


def test_a_gradient_that_is_missing_in_a_window(kernels):
    settings = {"gradient_accumulation_steps": 2, "epsilon": 0.1}
    compare(*(run(on_gpu, settings, missing=(1, 1)) for on_gpu in (True, False)))
    assert len(kernels) == 4


def test_faults(kernels):
    optimizer, variables = run(True, {})
    before = [v.numpy().copy() for v in (*variables, *optimizer.variables)]
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply([torch.zeros(3, 1), torch.zeros(5), torch.zeros(())], variables)
    with pytest.raises(RuntimeError, match="on meta, expected that of its variable, cpu"):
        optimizer.apply([torch.zeros(3, 4, device="meta"), torch.zeros(5), torch.zeros(())], variables)
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, (*variables, *optimizer.variables), strict=True))
