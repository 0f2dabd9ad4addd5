"""Which settings, dtypes and gradients every host is run with: each option alone, and seeded combinations."""

from random import Random
from typing import NamedTuple

import numpy as np

from cases import DTYPES

INFINITE = float("inf")


def halving(step):
    return 0.04 / (1 + 0.1 * step)


def rate():
    return 0.02


def decay_of_the_first_moment():
    return 0.7


def decay_of_the_second_moment():
    return 0.95


# Of every run, since each host has its own. Keras keeps a learning rate in float32, which holds this one exactly.
DEFAULTS = {"lr": 2.0**-7, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7, "momentum_decay": 1.0}
# Every option alone, with a value that changes what follows. Without an epsilon that matters a step hardly depends on
# the size of the gradients.
OPTIONS = {
    "defaults": {},
    "lr": {"lr": 0.03},
    "lr schedule": {"lr": halving},
    "lr callable": {"lr": rate},
    "beta1": {"beta1": 0.5},
    "beta1 zero": {"beta1": 0.0},
    "beta1 callable": {"beta1": decay_of_the_first_moment},
    "beta2": {"beta2": 0.9},
    "beta2 zero": {"beta2": 0.0, "eps": 0.1},
    "beta2 callable": {"beta2": decay_of_the_second_moment},
    "eps": {"eps": 0.1},
    "eps zero": {"eps": 0.0},
    "eps_root": {"eps_root": 0.1},
    "weight_decay": {"weight_decay": 0.3},
    "coupled_weight_decay": {"weight_decay": 0.3, "coupled_weight_decay": True, "eps": 0.1},
    "excluded": {"weight_decay": 0.3, "excluded": (1, 2)},
    "momentum_decay of PyTorch": {"momentum_decay": 0.004},
    "momentum_decay of optax": {"momentum_decay": INFINITE},
    "bias_correction": {"bias_correction": "adam"},
    "bias_correction of AlgoPerf": {"bias_correction": "adam", "momentum_decay": INFINITE, "weight_decay": 0.3},
    "clipnorm": {"clipnorm": 0.5, "eps": 0.1},
    "clipvalue": {"clipvalue": 0.25, "eps": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5, "eps": 0.1},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite_frequency": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "loss_scale_factor": {"loss_scale_factor": 100.0, "eps": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3, "eps": 0.1},
    "skip_nonfinite": {"skip_nonfinite": True},
    "maximize": {"maximize": True},
    "exp_avg_dtype": {"exp_avg_dtype": "bfloat16"},
    "seed": {"exp_avg_dtype": "bfloat16", "seed": 7},
    "remainder": {"remainder": True},  # beside bfloat16 parameters
}
# Those of `nadam.Nadam` and of Keras, by the names there.
KERAS = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
ARGUMENTS = {
    name: {KERAS.get(key, key): value for key, value in chosen.items()}
    for name, chosen in OPTIONS.items()
    if not {"coupled_weight_decay", "excluded", "maximize", "exp_avg_dtype", "remainder", "eps_root"} & {*chosen}
}
# What is in no combination.
ALONE = {"defaults", "lr callable", "beta1 callable", "beta2 callable", "bias_correction of AlgoPerf", "eps zero"}
# From which combinations are drawn. Smaller epsilons make the step of a gradient near 0 ill-conditioned.
VALUES = {
    "lr": [2.0**-8, 2.0**-6, halving],
    "beta1": [0.0, 0.8, 0.95],
    "beta2": [0.9, 0.99, 0.9999],
    "eps": [0.01, 0.1],
    "weight_decay": [0.1, 0.4],
    "coupled_weight_decay": [True],
    "excluded": [(0,), (1, 3)],
    "momentum_decay": [0.0, 0.004, INFINITE],
    "use_ema": [True],
    "ema_momentum": [0.5, 0.9],
    "ema_overwrite_frequency": [2, 5],
    "loss_scale_factor": [8.0, 100.0],
    "gradient_accumulation_steps": [2, 3],
    "skip_nonfinite": [True],
    "maximize": [True],
    "exp_avg_dtype": ["bfloat16"],
    "seed": [123456789],
    "remainder": [True],
    "eps_root": [0.01],
}
CLIPS = {"clipnorm": 0.7, "clipvalue": 0.3, "global_clipnorm": 0.9}
NEEDS = {
    "coupled_weight_decay": "weight_decay",
    "excluded": "weight_decay",
    "ema_momentum": "use_ema",
    "ema_overwrite_frequency": "use_ema",
    "seed": "exp_avg_dtype",
}
COMBINATIONS = ["float32"] * 6 + ["bfloat16", "bfloat16", "float16", "float64"]


class Case(NamedTuple):
    """A run: settings by core's names, without the defaults; dtypes of parameters and of gradients."""

    name: str
    settings: dict
    dtype: str = "float32"
    grads: str | None = None  # the parameters'
    missing: bool = False  # whether gradients are, where nothing is accumulated

    def __str__(self):
        return f"{self.name}, {self.dtype}"


def cases(host):
    """All runs of a host of hosts.py."""
    made = [Case(name, chosen, "bfloat16" if "remainder" in chosen else "float32") for name, chosen in OPTIONS.items()]
    made += [Case("defaults", {}, dtype) for dtype in host.dtypes if dtype != "float32"]
    made = [case for case in made if has(host, case.settings) and (host.thorough or case.name in ALONE)]
    made += [Case("missing gradients", {}, missing=True)] if host.missing else []
    made += [Case(f"gradients of {kind}", {"eps": 0.1}, grads=kind) for kind in ("bfloat16", "float16") if host.mixed]
    return made + [combination(host, i, dtype) for i, dtype in enumerate(COMBINATIONS) if dtype in host.dtypes]


def has(host, settings):
    return needed(settings) <= host.options


def needed(settings):
    """The options that settings take; of a computed value, how it is computed."""
    return {name if not callable(value) else f"{name} {kind(value)}" for name, value in settings.items()}


def kind(function):
    return "schedule" if function.__code__.co_argcount else "callable"


def combination(host, index, dtype):
    """Options drawn of all that there are, less those that the host has not: each by itself, so that a new one changes
    no other."""
    drawn = {}
    for name, values in VALUES.items():
        random = Random(f"{index} {name}")
        value = random.choice(values)
        if random.random() < 0.5 and has(host, {name: value}) and NEEDS.get(name, name) in {*drawn, name}:
            drawn[name] = value
    clip = Random(f"{index} clip").choice([None, *CLIPS])
    if clip in host.options:
        drawn[clip] = CLIPS[clip]
    return Case(f"combination {index}", {name: drawn[name] for name in drawn if allowed(name, drawn)}, dtype)


def allowed(name, drawn):
    return NEEDS.get(name, name) in drawn


def problem(case, host, steps=None):
    """Parameters and the gradients of each step.

    Of 2-d parameters one is transposed and, where the host takes it, one strided. Some gradients are zero; one is
    missing in some calls of each window; one is NaN where that is skipped.
    """
    rng, dtype = np.random.default_rng(0), np.dtype(DTYPES.get(case.dtype, case.dtype))
    params = [laid_out(draw(rng, shape, dtype), i, host.dense) for i, shape in enumerate(host.shapes)]
    means = [draw(rng, p.shape, dtype) / 2 for p in params]
    all_grads = []
    for step in range(steps or host.steps):
        grads = [
            (draw(rng, p.shape, dtype) + m) * (rng.random(p.shape) > 0.1) for p, m in zip(params, means, strict=True)
        ]
        grads = [np.asarray(g).astype(DTYPES.get(case.grads, dtype)) for g in grads]
        if step % 9 == 5:
            grads[1] = np.zeros_like(grads[1])
        if case.settings.get("skip_nonfinite") and step in (4, 17):
            grads[0].flat[2] = np.nan
        windows = case.settings.get("gradient_accumulation_steps") and host.missing
        if step % 3 == 1 and (windows or case.missing):
            grads[2] = None
        all_grads.append(grads)
    return params, all_grads


def draw(rng, shape, dtype):
    values = rng.standard_normal(shape)
    if dtype.kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values).astype(dtype)


def laid_out(array, index, dense):
    """The first transposed in memory, the third with gaps between its elements."""
    if index == 0:
        return np.asfortranarray(array)
    if index == 2 and not dense:
        wide = np.zeros(2 * len(array), array.dtype)
        wide[::2] = array
        return wide[::2]
    return array
