"""The update rule of Nadam. Every compiler takes it from here; nothing else in the package updates a parameter."""

from math import sqrt
from typing import Any

# Numba, Triton and the array libraries each compile this function with a `sqrt` of their own (see rebind.py), so
# the values may be floats, arrays or traced tensors.
Value = Any


def update(
    param: Value,
    grad: Value,
    exp_avg: Value,
    exp_avg_sq: Value,
    decay: Value,
    exp_avg_weight: Value,
    exp_avg_sq_weight: Value,
    exp_avg_step: Value,
    grad_step: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Advance parameters by one Nadam step.

        exp_avg    += (grad - exp_avg) * exp_avg_weight
        exp_avg_sq += (grad**2 - exp_avg_sq) * exp_avg_sq_weight
        step        = (exp_avg_step * exp_avg + grad_step * grad) / (sqrt(exp_avg_sq) + eps)
        param      -= param * decay + step

    Args:
        param: Values of any shape S, in the compute dtype.
        grad: Shape S, unscaled and clipped.
        exp_avg: Shape S, units of grad, not bias-corrected.
        exp_avg_sq: Shape S, units of grad squared, not bias-corrected.
        decay: Decoupled weight decay of this step, lr * weight_decay.
        exp_avg_weight: 1 - beta1.
        exp_avg_sq_weight: 1 - beta2.
        exp_avg_step: What the first moment weighs in the step; holds lr and the bias corrections.
        grad_step: What the gradient itself weighs in the step (Nesterov's look-ahead); holds lr likewise.
        eps: Added outside the square root, divided like it by the bias correction of the second moment.

    Returns:
        New (param, exp_avg, exp_avg_sq). The inputs are left alone.

    Raises:
        Nothing; NaN and infinite gradients propagate.

    Example:
        >>> update(1.0, 0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 0.1, 0.1, 0.0)
        (0.85, 0.25, 0.25)

    Reference:
        Dozat (2016), Incorporating Nesterov Momentum into Adam, Algorithm 2, without its extra beta2.
    """
    exp_avg = exp_avg + (grad - exp_avg) * exp_avg_weight
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * exp_avg_sq_weight
    step = (exp_avg_step * exp_avg + grad_step * grad) / (sqrt(exp_avg_sq) + eps)
    # Decay and step are subtracted together: small decays, each rounded by itself, would err in the same direction.
    return param - (param * decay + step), exp_avg, exp_avg_sq
