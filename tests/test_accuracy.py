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
