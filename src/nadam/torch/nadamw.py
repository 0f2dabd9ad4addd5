"""`NAdamW`: the Nadam that AlgoPerf, timm and most published results use, in the place of timm's."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import Tensor, dtype

from nadam.core.names import known_arguments
from nadam.torch import state
from nadam.torch.optimizer import NAdam

# What timm's can do besides, which this one refuses, with the values that ask for nothing.
_REFUSED = {"caution": False, "corrected_weight_decay": False, "clipping_threshold": None}


class NAdamW(NAdam):
    """NAdamW in the place of `timm.optim.NAdamW`: the same arguments, numbers, groups and state, in one pass.

        param      *= 1 - lr * weight_decay
        exp_avg    += (grad - exp_avg) * (1 - beta1)
        exp_avg_sq += (grad**2 - exp_avg_sq) * (1 - beta2)
        m_hat       = (beta1 * exp_avg + (1 - beta1) * grad) / (1 - beta1**step)
        param      -= lr * m_hat / (sqrt(exp_avg_sq / (1 - beta2**step)) + eps)

    Which is `NAdam` with ``momentum_decay`` infinite, ``bias_correction="adam"`` and decoupled weight decay. Where
    betas[0] is changed during training, ``beta1**step`` is the product of what it was at each step.

    Args:
        params: Parameters, named parameters or dicts of them with settings of their own, as of `NAdam`.
        lr: Learning rate, >= 0: a number or a tensor of one element.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added outside the square root of the bias-corrected second moment, >= 0.
        weight_decay: The parameter is multiplied by 1 - lr * weight_decay before the step, >= 0.
        caution: Refused unless False, as it needs a mean over each tensor in the middle of the pass.
        corrected_weight_decay: Refused unless False.
        maximize: Whether to go up the gradient.
        foreach: Accepted and ignored: there is one pass in any case.
        capturable: Accepted, and ignored on the CPU.
        clipping_threshold: Refused unless None; ``clipnorm`` and ``global_clipnorm`` clip gradients.
        clipnorm: Largest norm of each gradient, as of `NAdam`, as are those that follow.
        clipvalue: Largest magnitude of each element of a gradient.
        global_clipnorm: Largest norm of all gradients of all groups together.
        use_ema: Whether to keep a moving average of each parameter.
        ema_momentum: Share of the old average that is kept.
        ema_overwrite_frequency: Every so many updates the parameters take their averages.
        gradient_accumulation_steps: An update every so many calls of `step`.
        skip_nonfinite: Whether a step whose gradients are not finite changes nothing.
        track_grad_norm: Whether ``last_step`` has the norm of all gradients also without clipping.
        remainder: 16, or True, or 8: how many of the bits by which bfloat16 parameters differ from float32 are kept.
        exp_avg_dtype: torch.bfloat16 to keep first moments in two bytes.
        seed: Of stochastic rounding.
        state_bits: 8 to keep both moments of large parameters in a byte each.
        state_device: "cpu" to keep the state there and do the step there.

    Raises:
        ValueError: A value out of its range, two clips, or what is refused; it is named, with what is allowed.
        TypeError: A value that is not a number; a parameter of integers.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = NAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> round(float(weight.detach()[0]), 4), sorted(optimizer.state_dict()["state"][0])
        (0.81, ['exp_avg', 'exp_avg_sq', 'step'])

    Reference:
        Choi et al. (2019), On Empirical Comparisons of Optimizers for Deep Learning, Table 1; Dahl et al. (2023),
        Benchmarking Neural Network Training Algorithms.
    """

    @known_arguments()
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        caution: bool = False,
        corrected_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        clipping_threshold: float | None = None,
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        gradient_accumulation_steps: int | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        remainder: bool | int = False,
        exp_avg_dtype: dtype | None = None,
        seed: int = 0,
        state_bits: int | None = None,
        state_device: str | None = None,
    ) -> None:
        _check_supported(locals())
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay=inf,
            decoupled_weight_decay=True,
            bias_correction="adam",
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            gradient_accumulation_steps=gradient_accumulation_steps,
            skip_nonfinite=skip_nonfinite,
            track_grad_norm=track_grad_norm,
            remainder=remainder,
            exp_avg_dtype=exp_avg_dtype,
            seed=seed,
            state_bits=state_bits,
            state_device=state_device,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with settings of their own, as in `torch.optim`.

        Raises:
            ValueError: A setting out of its range or refused, or a parameter that is in a group already.
            TypeError: A parameter that is no tensor of real or complex numbers.
        """
        _check_supported(param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """What `timm.optim.NAdamW` keeps, which loads it; with averages and accumulators, where there are any."""
        made = super().state_dict()
        entries = made["state"].items()
        made["state"] = {key: {n: v for n, v in entry.items() if n != "mu_product"} for key, entry in entries}
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this class, of `timm.optim.NAdamW` or of AlgoPerf's NadamW.

        Raises:
            ValueError: It is another optimizer's, or of other parameters, or damaged, or trained with what is refused
                here; it says what is wrong, and nothing has changed.
        """
        self._load(state_dict, self._prepared)

    @staticmethod
    def _prepared(optimizer: NAdam, state_dict: Mapping[str, Any]) -> Any:
        made = state.of_nadamw(optimizer.param_groups, state_dict)
        for i, group in enumerate(made["param_groups"]):
            _check_supported(group, f"param_groups[{i}]: ")
            if group["momentum_decay"] != inf or not group["decoupled_weight_decay"]:
                raise ValueError(f"param_groups[{i}]: this is the state of another optimizer than NAdamW")
        return made


def _check_supported(given: Mapping[str, Any], where: str = "") -> None:
    """That settings ask for nothing that this class has not."""
    for name, allowed in _REFUSED.items():
        value = given.get(name, allowed)
        if value not in (False, None):
            raise ValueError(f"{where}{name}={value!r}: expected {allowed}: nadam.torch.NAdamW has it not")
