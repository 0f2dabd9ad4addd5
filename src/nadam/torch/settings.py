"""The settings of parameter groups, under PyTorch's names and with its messages; checked only where they changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor

from nadam.core.hyperparameters import Hyperparameters, Now

# How PyTorch's own class begins the message of an argument out of its range.
COMPLAINTS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "betas[0]": "Invalid beta parameter at index 0",
    "betas[1]": "Invalid beta parameter at index 1",
    "weight_decay": "Invalid weight_decay value",
    "momentum_decay": "Invalid momentum_decay value",
}
SPELLING = {"beta1": "betas[0]", "beta2": "betas[1]", "coupled_weight_decay": "decoupled_weight_decay"}
# Settings of a group, the last three without effect.
DEFAULTS = (
    *("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize"),
    *("foreach", "capturable", "differentiable"),
)
# Settings of the whole optimizer, which are not a group's, with their defaults; and how its state is kept.
EXTRAS = {
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "gradient_accumulation_steps": None,
    "skip_nonfinite": False,
    "track_grad_norm": False,
    "bias_correction": "nadam",
}
STATE_OPTIONS = {"remainder": False, "exp_avg_dtype": None, "seed": 0, "state_bits": None, "state_device": None}
# Those that a step which is differentiated has not.
KERNELS_ONLY = tuple(name for name in EXTRAS if name not in ("ema_momentum", "bias_correction"))
OF_ALL = "an argument of the constructor, for all groups together"
# What of a group seldom changes; schedulers set the learning rate, and one of them a beta, at every step.
_lasting = itemgetter("eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize")


def check_group(group: Mapping[str, Any], of_all: Mapping[str, Any], where: str) -> None:
    """That a group has no setting of the whole optimizer of another value than this has there: it would change nothing.

    ZeroRedundancyOptimizer puts all that the constructor is given into the groups.
    """
    for name, value in of_all.items():
        if name in group and group[name] != value:
            raise ValueError(f"{name}={group[name]!r} in {where}: expected as {OF_ALL}, where it is {value!r}")


def checked(group: Mapping[str, Any], extras: Mapping[str, Any]) -> Hyperparameters:
    """The hyperparameters that a group has set."""
    rate, betas = group["lr"], group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas={betas!r}: expected two numbers")
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            raise ValueError(f"lr={rate}: Tensor lr must be 1-element")
        rate = rate.item()
    try:
        return Hyperparameters(
            lr=rate,
            beta1=betas[0],
            beta2=betas[1],
            **{name: group[name] for name in ("eps", "weight_decay", "momentum_decay")},
            coupled_weight_decay=not group["decoupled_weight_decay"],
            maximize=bool(group["maximize"]),
            spelling=SPELLING,
            **extras,
        )
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        value, _, allowed = rest.partition(": ")
        raise ValueError(f"{COMPLAINTS[name]}: {value}: {allowed}" if name in COMPLAINTS else str(error)) from None


class Settings:
    """What the groups have set, checked again only where it has changed."""

    def __init__(self, extras: Mapping[str, Any], of_all: Mapping[str, Any]) -> None:
        self._extras, self._of_all = extras, of_all
        self._known: dict[int, tuple[tuple[Any, ...], Hyperparameters, int]] = {}

    def now(self, index: int, group: Mapping[str, Any]) -> tuple[Hyperparameters, Now]:
        """The settings of the group of this number at this step."""
        rate, lasting = group["lr"], _lasting(group)
        if isinstance(rate, Tensor):
            rate = rate.item() if rate.numel() == 1 else rate
        known = self._known.get(index)
        if known is not None and known[0] == lasting and known[2] == len(group):
            h = known[1]
            if (rate, *group["betas"]) == (h.lr, h.beta1, h.beta2):
                return h, h.at(0)
        if known is None or known[2] != len(group):
            check_group(group, self._of_all, f"param_groups[{index}]")
        h = checked(group, self._extras)
        self._known[index] = lasting, h, len(group)
        return h, h.at(0)

    def on_device(self, index: int, group: Mapping[str, Any]) -> tuple[Hyperparameters, Tensor | float, float, float]:
        """Settings, learning rate and betas; a learning rate on a device is left there, unread and unchecked."""
        rate = group["lr"]
        if isinstance(rate, Tensor) and not rate.is_cpu:
            h, now = self.now(index, {**group, "lr": 0.0})
            return h, rate, now.beta1, now.beta2
        h, now = self.now(index, group)
        return h, now.lr, now.beta1, now.beta2
