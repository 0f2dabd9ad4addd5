"""The scalars of one update: which there are, in which order, and what each is. Every kernel's layout is this one."""

from typing import Any, NamedTuple

from nadam.core.average import averaging, where
from nadam.core.coefficients import clamp_eps, coefficients

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
    clipvalue: Scalar  # infinity for none
    ema_momentum: Scalar
    ema_overwrite_frequency: Any  # None for never


class Scalars(NamedTuple):
    """What an update multiplies, adds and compares each element with, in the order in which kernels keep them."""

    exp_avg_weight: Scalar
    exp_avg_sq_weight: Scalar
    exp_avg_step: Scalar
    grad_step: Scalar
    eps: Scalar
    decay: Scalar  # of the parameter; of the gradient where it is coupled
    unscale: Scalar  # what multiplies a gradient before its accumulator is added
    clipvalue: Scalar
    ema_momentum: Scalar
    ema_weight: Scalar
    overwrite: Scalar  # 1 where the average overwrites the parameter, else 0


def scalars(
    settings: Settings, step: Any, real_step: Scalar, momentum_product: Scalar, unscale: Scalar, smallest: Scalar
) -> tuple[Scalars, Scalar]:
    """This update's scalars and the new momentum product; compiled like the rule.

    Args:
        settings: What is set.
        step: Number of the update, from 1: an integer, or exact.
        real_step: The same in the dtype of the scalars.
        momentum_product: Product of the momenta of the updates before this one; 1 before the first.
        unscale: What multiplies a gradient before its accumulator is added.
        smallest: The smallest normal number of that dtype.

    Example:
        >>> settings = Settings(0.5, 0.9, 0.75, 1e-7, 1.0, 0.1, False, 2.0, 0.99, None)
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
    )
    moving = averaging(settings.ema_momentum, settings.ema_overwrite_frequency, step)
    made = Scalars(
        c.exp_avg_weight,
        c.exp_avg_sq_weight,
        c.exp_avg_step,
        c.grad_step,
        clamp_eps(settings.eps, c.eps, smallest),
        where(settings.coupled, settings.weight_decay, settings.lr * settings.weight_decay),
        unscale,
        settings.clipvalue,
        moving.momentum,
        moving.weight,
        where(moving.overwrite, 1.0, 0.0),
    )
    return made, product
