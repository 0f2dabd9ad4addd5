"""`NAdam` at the ends of its dtypes' range, beside PyTorch's own (rows 9 and 37); see extremes.py.

On the CPU the kernel, and what other devices have instead; under Triton's interpreter and on a GPU, its kernels.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training import DEVICE

from nadam.torch import NAdam, buckets
from nadam.torch.gpu import bucket_cache as gpu_parts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cases import BFLOAT16
from extremes import EPSILONS, STOCK_ULPS, check_epsilon, check_overflow, check_remedies

DTYPES = ["float32", "bfloat16", "float64"]
PSI = {"momentum_decay": 0.004}
BY_TRITON = DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if BY_TRITON else ["kernel", "arrays"])
def way(request, monkeypatch):
    """What computes a step."""
    calls = []
    if request.param == "triton":
        monkeypatch.setattr(gpu_parts, "DEVICES", {"cuda", DEVICE})
        module = gpu_parts.on_gpu()
        moved = module.moved
        monkeypatch.setattr(module, "moved", lambda *args, **options: calls.append(1) or moved(*args, **options))
    elif request.param == "arrays":
        monkeypatch.setattr(buckets, "has_kernel", lambda params: False)
        monkeypatch.setattr(buckets, "_warned", {"cpu"})
    yield request.param
    assert bool(calls) == (request.param == "triton")


def tensor(values):
    wide = torch.from_numpy(np.array(values, np.float64))
    return wide.to(DEVICE, getattr(torch, values.dtype.name))


def array(param):
    values = param.detach().cpu()
    return values.float().numpy().astype(BFLOAT16) if param.dtype == torch.bfloat16 else values.numpy().copy()


def trainer(cls, **options):
    def train(start, all_grads, learning_rate, epsilon, beta_2, **settings):
        param, after = torch.nn.Parameter(tensor(start)), []
        optimizer = cls([param], lr=learning_rate, eps=epsilon, betas=(0.9, beta_2), **settings, **options)
        for grads in all_grads:
            param.grad = tensor(grads)
            optimizer.step()
            after.append(array(param))
        return after

    return train


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon(epsilon, dtype, way):
    check_epsilon(trainer(NAdam), epsilon, dtype, **PSI)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon_of_several_dtypes_at_once(epsilon, way):
    """They share a step's scalars, not its smallest numbers."""

    def train(start, all_grads, learning_rate, epsilon, beta_2, **settings):
        params = [torch.nn.Parameter(tensor(start).to(dtype)) for dtype in (torch.float64, torch.float32)]
        optimizer, after = NAdam(params, lr=learning_rate, eps=epsilon, betas=(0.9, beta_2), **settings), []
        for grads in all_grads:
            for param in params:
                param.grad = tensor(grads).to(param.dtype)
            optimizer.step()
            after.append(array(params[start.dtype == np.float32]))
        return after

    for dtype in ("float32", "float64"):
        check_epsilon(train, epsilon, dtype, **PSI)


@pytest.mark.skipif(BY_TRITON, reason="without a kernel")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon_of_steps_that_can_be_differentiated(epsilon, dtype):
    def train(start, all_grads, learning_rate, epsilon, beta_2, **settings):
        param, after = tensor(start).requires_grad_().clone(), []
        optimizer = NAdam([param], lr=learning_rate, eps=epsilon, betas=(0.9, beta_2), differentiable=True, **settings)
        for grads in all_grads:
            param.grad = tensor(grads)
            optimizer.step()
            after.append(array(param))
        return after

    check_epsilon(train, epsilon, dtype, **PSI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_whose_square_overflows(dtype, way):
    check_overflow(trainer(NAdam), dtype, **PSI)
    check_remedies(trainer(NAdam), dtype, **PSI)


def test_what_stock_does_with_one():
    check_overflow(trainer(torch.optim.NAdam), frozen=True, ulps=STOCK_ULPS, **PSI)


def test_stock_without_epsilon():
    check_epsilon(trainer(torch.optim.NAdam), 0.0, ulps=STOCK_ULPS, beta_2=0.999, **PSI)
