"""Settings and step number -> the scalars of one update: which there are, in which order, and what each is.

In float64 on the host, or traced: by the same lines with other globals (rebind.py). Every kernel's layout is `Scalars`.
"""

import math
from math import expm1, sqrt
from typing import Any, NamedTuple

from nadam.core.gradient import maximum

# Dozat's constant: momentum warms up as 1 - MOMENTUM_WARMUP**(step * momentum_decay) / 2.
MOMENTUM_WARMUP = 0.96
Scalar = Any  # a Python float or a traced scalar


class Settings(NamedTuple):
    """What an update takes of the hyperparameters, as they are at this step."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: Scalar
    momentum_decay: Scalar
    weight_decay: Scalar  # 0 for none
    coupled: Any  # whether it is added to the gradient instead
    adam_correction: Any  # whether the momentum term has Adam's bias correction, as the gradient has
    clipvalue: Scalar  # infinity for none
    ema_momentum: Scalar
    ema_overwrite_frequency: Any  # None for never


class Coefficients(NamedTuple):
    """The scalars that `core.rule.update` takes after ``decay``, in its order."""

    exp_avg_weight: Scalar
    exp_avg_sq_weight: Scalar
    exp_avg_step: Scalar
    grad_step: Scalar
    eps: Scalar


class Scalars(NamedTuple):
    """What an update multiplies, adds and compares each element with, in the order in which kernels keep them."""

    exp_avg_weight: Scalar
    exp_avg_sq_weight: Scalar
    exp_avg_step: Scalar
    grad_step: Scalar
    eps: Scalar
    decay: Scalar  # of the parameter; of the gradient where it is coupled
    inv_scale: Scalar  # what multiplies a gradient before its accumulator is added
    clipvalue: Scalar
    ema_momentum: Scalar  # what is kept of the old average: 0 on the first update, so that it starts at the parameter
    ema_weight: Scalar  # 1 - ema_momentum
    overwrite: Scalar  # 1 where the average overwrites the parameter, else 0


def where(condition: Any, yes: Any, no: Any) -> Any:
    """One of two values."""
    return yes if condition else no


def log(x: float) -> float:
    """The logarithm, with that of 0."""
    return math.log(x) if x else -math.inf


def momentum(beta1: Scalar, momentum_decay: float, step: Scalar) -> Scalar:
    """Momentum at a step, from 1: ``beta1 * (1 - 0.96**(step * momentum_decay) / 2)``.

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

    An ``eps`` of 0 stays 0, and a gradient of zeros then gives NaN: 0 / 0. ``scaled``, that of `coefficients`, may have
    underflowed; ``smallest`` is the smallest normal number of the dtype.

    Example:
        >>> clamp_eps(1e-60, 1e-61, 2.0**-126) == 2.0**-126, clamp_eps(0.0, 0.0, 2.0**-126)
        (True, 0.0)
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
    adam_correction: Any,
) -> tuple[Coefficients, Scalar]:
    """This step's scalars of the rule, and the new momentum product.

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
        momentum_decay: How fast the momentum warms up, >= 0: 1 is Keras, 0.004 PyTorch, infinity optax.
        momentum_product: Product of the momenta of the updates before this one; 1 before the first.
        adam_correction: Whether exp_avg_step has the denominator of grad_step, which is Adam's bias correction.

    Example:
        >>> c, product = coefficients(
        ...     1,
        ...     lr=0.5,
        ...     beta1=0.9,
        ...     beta2=0.75,
        ...     eps=1e-7,
        ...     momentum_decay=1.0,
        ...     momentum_product=1.0,
        ...     adam_correction=False,
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
            exp_avg_step=lr * root * following / (1.0 - product * where(adam_correction, 1.0, following)),
            grad_step=lr * root * (1.0 - now) / (1.0 - product),
            eps=root * eps,
        ),
        product,
    )


def scalars(
    settings: Settings, step: Any, real_step: Scalar, momentum_product: Scalar, inv_scale: Scalar, smallest: Scalar
) -> tuple[Scalars, Scalar]:
    """This update's scalars and the new momentum product; compiled like the rule.

    Args:
        settings: What is set.
        step: Number of the update, from 1: an integer, or exact.
        real_step: The same in the dtype of the scalars.
        momentum_product: Product of the momenta of the updates before this one; 1 before the first.
        inv_scale: What multiplies a gradient before its accumulator is added.
        smallest: The smallest normal number of that dtype.

    Example:
        >>> settings = Settings(0.5, 0.9, 0.75, 1e-7, 1.0, 0.1, False, False, 2.0, 0.99, None)
        >>> s, product = scalars(settings, 1, 1.0, 1.0, 1.0, 2.0**-1022)
        >>> s.decay, s.ema_momentum, s.overwrite, product
        (0.05, 0.0, 0.0, 0.468)
    """
    c, product = coefficients(
        real_step,
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        momentum_decay=settings.momentum_decay,
        momentum_product=momentum_product,
        adam_correction=settings.adam_correction,
    )
    ema_momentum, overwrite = averaging(settings.ema_momentum, settings.ema_overwrite_frequency, step)
    made = Scalars(
        c.exp_avg_weight,
        c.exp_avg_sq_weight,
        c.exp_avg_step,
        c.grad_step,
        clamp_eps(settings.eps, c.eps, smallest),
        where(settings.coupled, settings.weight_decay, settings.lr * settings.weight_decay),
        inv_scale,
        settings.clipvalue,
        ema_momentum,
        1.0 - ema_momentum,
        where(overwrite, 1.0, 0.0),
    )
    return made, product


def averaging(ema_momentum: Scalar, overwrite_frequency: int | None, step: Any) -> tuple[Scalar, Any]:
    """What is kept of the old average at an update, and whether the parameter then takes the average's value.

    Example:
        >>> averaging(0.75, overwrite_frequency=2, step=2), averaging(0.75, None, step=1)
        ((0.75, True), (0.0, False))
    """
    return where(step == 1, 0.0, ema_momentum), overwrite_frequency is not None and step % overwrite_frequency == 0
