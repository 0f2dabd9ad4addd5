"""How far float32 is from float64 after a thousand steps: little more than rounding the parameters alone costs."""

import numpy as np
import pytest

import nadam
from reference import Reference


@pytest.mark.parametrize("settings", [{}, {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True}], ids=str)
def test_a_thousand_float32_steps_are_as_good_as_rounding_allows(settings):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(2000).astype(np.float32)
    param, exact, rounded = start.copy(), Reference([start], **settings), Reference([start], **settings)
    optimizer = nadam.Nadam(**settings)
    for _ in range(1000):
        grad = rng.standard_normal(2000).astype(np.float32)
        optimizer.apply([grad], [param])
        exact.step([grad])
        rounded.step([grad])
        rounded.p[0] = rounded.p[0].astype(np.float32).astype(np.float64)
    error = np.sqrt(np.mean((param - exact.p[0]) ** 2))
    floor = np.sqrt(np.mean((rounded.p[0] - exact.p[0]) ** 2))
    assert error <= 1.1 * floor


def test_the_second_moment_has_no_bias():
    """Unlike one of two weights, whose sum is not 1 once each is rounded (docs/precision.md)."""
    rng, beta2 = np.random.default_rng(0), 0.999
    means = rng.uniform(0.1, 3.0, 500)
    param, optimizer = np.zeros(500, np.float32), nadam.Nadam(beta_2=beta2)
    weighted, exact = np.zeros(500, np.float32), np.zeros(500)
    for _ in range(20_000):
        grad = (means * (1 + 0.1 * rng.standard_normal(500))).astype(np.float32)
        optimizer.apply([grad], [param])
        weighted = np.float32(beta2) * weighted + np.float32(1 - beta2) * grad * grad
        exact += (grad.astype(np.float64) ** 2 - exact) * (1 - beta2)
    assert abs(np.mean(optimizer.variables[3] / exact - 1)) < 2e-7
    assert np.mean(weighted / exact - 1) == pytest.approx(1.3e-5, rel=0.1)
