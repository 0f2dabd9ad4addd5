"""Step number -> this step's scalars: in float64 on the host, or traced, by the same lines with other globals."""

import math
from math import expm1, sqrt
from typing import Any, NamedTuple

from nadam.core.average import where
from nadam.core.gradient import maximum

# Dozat's constant: momentum warms up as 1 - MOMENTUM_WARMUP**(step * momentum_decay) / 2.
MOMENTUM_WARMUP = 0.96
# Smaller numbers are subnormal: XLA and GPUs may take them for zero.
SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
# A Python float or a traced scalar.
Scalar = Any


def log(x: float) -> float:
    """The logarithm, with that of 0."""
    return math.log(x) if x else -math.inf


class Coefficients(NamedTuple):
    """The scalars of one step, in the order in which `core.rule.update` takes them after ``decay``."""

    exp_avg_weight: Scalar
    exp_avg_sq_weight: Scalar
    exp_avg_step: Scalar
    grad_step: Scalar
    eps: Scalar


def momentum(beta1: Scalar, momentum_decay: float, step: Scalar) -> Scalar:
    """Momentum at a step: ``beta1 * (1 - 0.96**(step * momentum_decay) / 2)``.

    Args:
        beta1: Momentum once warmed up, in [0, 1).
        momentum_decay: How fast it warms up, >= 0: 1 is Keras, 0.004 PyTorch, infinity optax.
        step: Number of the update, from 1.

    Example:
        >>> momentum(0.9, momentum_decay=1.0, step=1)
        0.468
    """
    return beta1 * (1.0 - 0.5 * MOMENTUM_WARMUP ** (step * momentum_decay))


def momentum_product(steps: int, beta1: float, momentum_decay: float) -> float:
    """The product of the momenta of so many updates, for state that does not keep it.

    Example:
        >>> momentum_product(2, 0.9, 1.0) == momentum(0.9, 1.0, 1) * momentum(0.9, 1.0, 2)
        True
    """
    product = 1.0
    for step in range(1, steps + 1):
        product *= momentum(beta1, momentum_decay, step)
        if product < 2.0**-1022:  # a subnormal one never reaches 0: 0.9 of the smallest is rounded up to it
            break
    return product


def clamp_eps(eps: Scalar, scaled: Scalar, smallest: float) -> Scalar:
    """The eps that the rule is given: one above 0 stays above 0 in the compute dtype, so that 0 / eps is 0.

    Args:
        eps: As the user set it, >= 0. One of 0 stays 0, and a gradient of zeros then gives NaN: 0 / 0.
        scaled: That of `coefficients`, which may have underflowed.
        smallest: The smallest normal number of the dtype.

    Example:
        >>> clamp_eps(1e-60, 1e-61, SMALLEST_NORMAL["float32"]) == 2.0**-126
        True
        >>> clamp_eps(1e-8, 1e-9, SMALLEST_NORMAL["float32"]), clamp_eps(0.0, 0.0, SMALLEST_NORMAL["float32"])
        (1e-09, 0.0)
    """
    return where(eps == 0, scaled, maximum(scaled, smallest))


def coefficients(
    step: Scalar,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    momentum_decay: float,
    momentum_product: Scalar,
) -> tuple[Coefficients, Scalar]:
    """This step's scalars and the new momentum product.

        momentum_product *= momentum
        root         = sqrt(1 - beta2**step)
        exp_avg_step = lr * root * next_momentum / (1 - momentum_product * next_momentum)
        grad_step    = lr * root * (1 - momentum) / (1 - momentum_product)
        eps          = root * eps

    The second moment's bias correction is the same for all elements, so numerator and denominator of the step are both
    multiplied by its root here, and the rule need not.

    Args:
        step: Number of the update, from 1.
        lr: Learning rate, >= 0.
        beta1: Decay rate of the first moment, in [0, 1).
        beta2: Decay rate of the second moment, in [0, 1).
        eps: Added outside the square root, >= 0.
        momentum_decay: How fast the momentum warms up, >= 0, infinity included.
        momentum_product: Product of the momenta of the updates before this one; 1 before the first.

    Returns:
        The coefficients and the momentum product including this update.

    Example:
        >>> c, product = coefficients(
        ...     1, lr=0.5, beta1=0.9, beta2=0.75, eps=1e-7, momentum_decay=1.0, momentum_product=1.0
        ... )
        >>> round(c.exp_avg_weight, 6), round(c.eps, 9), product
        (0.1, 5e-08, 0.468)

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam, Algorithm 2.
    """
    now = momentum(beta1, momentum_decay, step)
    following = momentum(beta1, momentum_decay, step + 1)
    product = momentum_product * now
    root = sqrt(-expm1(step * log(beta2)))  # of 1 - beta2**step, which in float32 would lose its digits
    return (
        Coefficients(
            exp_avg_weight=1.0 - beta1,
            exp_avg_sq_weight=1.0 - beta2,
            exp_avg_step=lr * root * following / (1.0 - product * following),
            grad_step=lr * root * (1.0 - now) / (1.0 - product),
            eps=root * eps,
        ),
        product,
    )
