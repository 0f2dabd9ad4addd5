"""Runs of an optimizer of PyTorch on seeded gradients, for comparisons."""

import importlib.util
import os
import sys
import types

import numpy as np
import pytest
import torch

DEVICE = os.environ.get("NADAM_TEST_DEVICE", "cpu")  # where the tests run: conftest.py
SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2)]
ULPS = {torch.float32: np.float32, torch.float64: np.float64, torch.complex64: np.float32, torch.complex128: np.float64}


def seeded(seed):
    """Numbers from it are the same ones on all devices."""
    return torch.Generator("cpu").manual_seed(seed)


def drawn(generator, shape, dtype=torch.float32):
    """Normally distributed numbers on the device of the tests."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(DEVICE, dtype)


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = seeded(seed)
    return [torch.nn.Parameter(drawn(generator, shape, dtype)) for shape in shapes]


class Gradients:
    """The same ones for all who start with the same seed."""

    def __init__(self, seed=1, scale=1.0):
        self.generator, self.scale = seeded(seed), scale

    def give(self, params):
        for param in params:
            wide = torch.complex128 if param.is_complex() else torch.float64
            numbers = torch.randn(param.shape, generator=self.generator, dtype=wide, device="cpu") * self.scale
            param.grad = numbers.to(param.device, param.dtype)


def train(optimizer, params, steps, gradients=None):
    gradients = gradients or Gradients()
    for _ in range(steps):
        gradients.give(params)
        optimizer.step()


def apart(params, others):
    """The largest distance, in units of the last place of 1 or of the larger number; infinity for a NaN."""
    largest = 0.0
    for param, other in zip(params, others, strict=True):
        one, two = (np.atleast_1d(t.detach().cpu().resolve_conj().numpy()) for t in (param, other))
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        if one.size:
            unit = np.finfo(one.dtype).eps * np.maximum(np.abs(two), 1.0)
            with np.errstate(invalid="ignore"):
                distances = np.where(one == two, 0.0, np.abs(one - two) / unit)
            largest = max(largest, float(np.where(np.isnan(distances), np.inf, distances).max()))
    return largest


def equal(params, others):
    """Bit for bit, wherever they lie."""
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(params, others, strict=True))


def timm_optim():
    """`timm.optim`; also where torchvision is missing, which timm's models need and its optimizers do not."""
    spec = importlib.util.find_spec("timm") or pytest.skip("timm is not installed")
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        package, models = importlib.util.module_from_spec(spec), types.ModuleType("timm.models")
        models.group_parameters = None
        sys.modules |= {"timm": package, "timm.models": models}
    return importlib.import_module("timm.optim")
