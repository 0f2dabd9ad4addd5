"""nadam.keras.Nadam beside keras.optimizers.Nadam, torch.optim.NAdam, optax.nadam and the float64 reference."""

import math
from functools import cache, partial

import keras
import numpy as np
import pytest

from cases import draw_grads, draw_params
from nadam.keras import Nadam
from reference import Reference

BACKEND = keras.backend.backend()
STEPS = 50
SHAPES = {"kernel": (7, 5), "bias": ()}
schedules = keras.optimizers.schedules


def problem(dtype="float32", steps=STEPS):
    """Parameters, and gradients that have a mean, so that the parameters go somewhere."""
    rng = np.random.default_rng(0)
    params = draw_params(rng, SHAPES.values(), dtype)
    means = draw_grads(rng, params)
    return params, [[g + m for g, m in zip(draw_grads(rng, params), means, strict=True)] for _ in range(steps)]


def variables_of(params):
    return [keras.Variable(p, dtype=str(p.dtype), name=name) for p, name in zip(params, SHAPES, strict=False)]


def tensors(grads):
    """What is an array of NumPy as one of the backend's."""
    dense = (np.ndarray, np.generic)
    return [keras.ops.convert_to_tensor(np.asarray(g)) if isinstance(g, dense) else g for g in grads]


def numpy(variables):
    """Copies of the values."""
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


# Ways to do a step: each takes an optimizer and its variables, and gives a function of the gradients as delivered.


def by_apply(optimizer, variables):
    return lambda grads: optimizer.apply(tensors(grads), variables)


def by_apply_gradients(optimizer, variables):
    return lambda grads: optimizer.apply_gradients(zip(tensors(grads), variables, strict=True))


def by_backward(optimizer, variables):
    import torch

    def step(grads):
        for v in variables:
            v.value.grad = None
        sum((v.value * g).sum() for v, g in zip(variables, tensors(grads), strict=True) if g is not None).backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)

    return step


def by_jit(optimizer, variables):
    import jax

    optimizer.build(variables)
    program = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    everything = [*variables, *optimizer.variables]

    def step(grads):
        values = [v.value for v in optimizer.variables], tensors(grads), [v.value for v in variables]
        params, state = program(*values)
        for variable, value in zip(everything, [*params, *state], strict=True):
            variable.assign(value)

    return step


def by_tf_function(optimizer, variables, **options):
    import tensorflow as tf

    program = tf.function(lambda grads: optimizer.apply(grads, variables), **options)
    return lambda grads: program(tensors(grads))


def by_tape(optimizer, variables):
    import tensorflow as tf

    @tf.function
    def program(grads):
        with tf.GradientTape() as tape:
            loss = tf.add_n(
                [tf.reduce_sum(v.value * g) for v, g in zip(variables, grads, strict=True) if g is not None]
            )
        optimizer.apply_gradients(zip(tape.gradient(loss, [v.value for v in variables]), variables, strict=True))

    return lambda grads: program(tensors(grads))


COMPILED = {
    "torch": {"backward": by_backward},
    "jax": {"jit": by_jit},
    "tensorflow": {"tf.function": by_tf_function, "XLA": partial(by_tf_function, jit_compile=True)},
}[BACKEND]
ROUTES = {"apply": by_apply, **COMPILED}
ALL_ROUTES = {**ROUTES, "apply_gradients": by_apply_gradients, **({"tape": by_tape} if BACKEND == "tensorflow" else {})}
FIRST_COMPILED = next(iter(COMPILED))
STOCK_ROUTE = {"torch": by_apply, "jax": by_jit, "tensorflow": by_tf_function}[BACKEND]  # eagerly Keras is slow

EXPONENTIAL = schedules.ExponentialDecay(0.03, 10, 0.5)
ARGUMENTS = {
    "defaults": {},
    "learning_rate": {"learning_rate": 0.03},
    "cosine schedule": {"learning_rate": schedules.CosineDecay(0.001, 40, warmup_target=0.03, warmup_steps=10)},
    "exponential schedule": {"learning_rate": EXPONENTIAL},
    "piecewise schedule": {"learning_rate": schedules.PiecewiseConstantDecay([10, 30], [0.03, 0.01, 0.002])},
    "beta_1": {"beta_1": 0.5},
    "beta_1 zero": {"beta_1": 0.0},
    "beta_2": {"beta_2": 0.9},
    "epsilon": {"epsilon": 0.1},
    "weight_decay": {"weight_decay": 0.3, "learning_rate": 0.03},
    "excluded list": {"weight_decay": 0.3, "learning_rate": 0.03, "excluded": {"var_list": ["bias"]}},
    "excluded names": {"weight_decay": 0.3, "learning_rate": 0.03, "excluded": {"var_names": ["bi.s"]}},
    "clipnorm": {"clipnorm": 0.5, "epsilon": 0.1},
    "clipvalue": {"clipvalue": 0.25, "epsilon": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5, "epsilon": 0.1},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite_frequency": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "loss_scale_factor": {"loss_scale_factor": 100.0, "epsilon": 0.1},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3, "epsilon": 0.1},
    "schedule and accumulation": {"learning_rate": EXPONENTIAL, "gradient_accumulation_steps": 4},
}


def run(cls, settings, route):
    """The variables and the optimizer's after all steps."""
    settings = dict(settings)
    excluded = settings.pop("excluded", {})
    params, all_grads = problem()
    variables = variables_of(params)
    optimizer = cls(**settings)
    if "var_list" in excluded:
        optimizer.exclude_from_weight_decay(var_list=[v for v in variables if v.name in excluded["var_list"]])
    if "var_names" in excluded:
        optimizer.exclude_from_weight_decay(**excluded)
    step = route(optimizer, variables)
    for grads in all_grads:
        step([g * np.float32(settings.get("loss_scale_factor", 1.0)) for g in grads])
    return variables, optimizer


@cache
def stock(name):
    variables, optimizer = run(keras.optimizers.Nadam, ARGUMENTS[name], STOCK_ROUTE)
    return numpy(variables), numpy(optimizer.variables), [v.name for v in optimizer.variables]


# A step outside of tf.function is compiled for each setting once more, so there a few settings have to do.
SOME = ("piecewise schedule", "excluded list", "ema_overwrite_frequency", "schedule and accumulation")
CASES = [(name, FIRST_COMPILED) for name in ARGUMENTS]
CASES += [(name, "apply") for name in (SOME if BACKEND == "tensorflow" else ARGUMENTS) if name != "cosine schedule"]
CASES += [(name, route) for name in SOME[1::2] for route in ALL_ROUTES if route not in ("apply", FIRST_COMPILED)]


@pytest.mark.parametrize(("name", "route"), CASES)
def test_fifty_steps_give_what_keras_gives(name, route):
    their_params, their_state, names = stock(name)
    variables, optimizer = run(Nadam, ARGUMENTS[name], ALL_ROUTES[route])
    # Both round each parameter, of size 4 or less, 50 times; and Keras takes 1 - beta_2**t in float32, which at first
    # leaves 3e-5 of the step.
    for ours, theirs in zip(numpy(variables), their_params, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert len(optimizer.variables) == len(their_state)
    for variable, theirs, label in zip(optimizer.variables, their_state, names, strict=True):
        assert label in variable.name or variable.name == "momentum_product"
        loose = 2.0**-24 / (1.0 - optimizer.beta_2) if label.endswith("velocity") else 0.0  # its 1 - beta_2
        np.testing.assert_allclose(variable.numpy(), theirs, rtol=1e-5 + 2 * loose, atol=1e-5, err_msg=label)
    if name not in ("defaults", "use_ema"):  # an average that is not used changes no parameter
        assert max(np.max(np.abs(a - b)) for a, b in zip(their_params, stock("defaults")[0], strict=True)) > 1e-3


@pytest.mark.skipif(BACKEND != "torch", reason="torch.optim.NAdam is on the torch backend")
@pytest.mark.parametrize("momentum_decay", [1.0, 0.004, math.inf])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_fifty_steps_give_what_torch_gives(momentum_decay, weight_decay):
    import torch

    params, all_grads = problem("float64")
    theirs = [torch.tensor(p, requires_grad=True) for p in params]
    settings = {"momentum_decay": momentum_decay, "weight_decay": weight_decay}
    reference = torch.optim.NAdam(theirs, lr=2.0**-5, decoupled_weight_decay=True, **settings)
    variables = variables_of(params)
    optimizer = Nadam(2.0**-5, epsilon=1e-8, **settings)
    for grads in all_grads:
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        reference.step()
        optimizer.apply(tensors(grads), variables)
    for ours, p in zip(numpy(variables), theirs, strict=True):
        # torch keeps the momentum product, of which it takes 1 - product, in float32, whatever the parameters.
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=0, atol=3e-7)


@pytest.mark.skipif(BACKEND != "jax", reason="optax.nadam is on the JAX backend")
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_fifty_steps_give_what_optax_gives(weight_decay):
    import optax

    params, all_grads = problem()
    reference = optax.nadamw(0.03125, weight_decay=weight_decay)
    theirs = tensors(params)
    state = reference.init(theirs)
    variables = variables_of(params)
    optimizer = Nadam(0.03125, epsilon=1e-8, weight_decay=weight_decay, momentum_decay=math.inf)
    for grads in all_grads:
        updates, state = reference.update(tensors(grads), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        optimizer.apply(tensors(grads), variables)
    for ours, p in zip(numpy(variables), theirs, strict=True):
        # As beside Keras: its 1 - beta_2**t is of float32, and the step is three times as long.
        np.testing.assert_allclose(ours, np.asarray(p), rtol=0, atol=3e-5)


@pytest.mark.parametrize("settings", [{}, {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True}], ids=str)
def test_a_thousand_float32_steps_are_as_good_as_rounding_allows(settings):
    rng = np.random.default_rng(0)
    start = rng.standard_normal(2000).astype(np.float32)
    exact, rounded = Reference([start], **settings), Reference([start], **settings)
    variable, optimizer = keras.Variable(start), Nadam(**settings)
    step = ROUTES[FIRST_COMPILED](optimizer, [variable])
    for _ in range(1000):
        grads = [rng.standard_normal(2000).astype(np.float32)]
        step(grads)
        exact.step(grads)
        rounded.step(grads)
        rounded.p[0] = rounded.p[0].astype(np.float32).astype(np.float64)
    error = np.sqrt(np.mean((variable.numpy() - exact.p[0]) ** 2))
    assert error <= 1.2 * np.sqrt(np.mean((rounded.p[0] - exact.p[0]) ** 2))
