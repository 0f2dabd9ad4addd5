"""The NumPy host at the ends of its dtypes' range (rows 9 and 37); see extremes.py."""

import numpy as np
import pytest

import nadam
from extremes import EPSILONS, check_epsilon, check_overflow, check_remedies
from nadam.core.dtypes import SMALLEST_NORMAL

DTYPES = ["float32", "bfloat16", "float64"]


def train(start, all_grads, **settings):
    param, after = start.copy(), []
    optimizer = nadam.Nadam(**settings)
    for grads in all_grads:
        optimizer.apply([grads], [param])
        after.append(param.copy())
    return after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_epsilon(epsilon, dtype):
    check_epsilon(train, epsilon, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_whose_square_overflows(dtype):
    check_overflow(train, dtype)
    check_remedies(train, dtype)


def test_smallest_normal_numbers():
    assert {name: float(np.finfo(name).smallest_normal) for name in SMALLEST_NORMAL} == SMALLEST_NORMAL
