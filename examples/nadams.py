"""Every Nadam that we know to be installable, as `make` of nadam.conformance: ROWS is the list.

Every element of the parameter is a tensor of its own, so that what tensors share by mistake shows too. All compute in
float64 where they can. `which_nadam.py` runs them.
"""

import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np

NONE = types.MappingProxyType({})
# What selects a member of the family in this package, on every host.
MEMBERS = {
    "keras": {"momentum_decay": 1.0},
    "torch": {"momentum_decay": 0.004},
    "optax": {"momentum_decay": math.inf},
    "adam": {"momentum_decay": math.inf, "bias_correction": "adam"},
}
os.environ.setdefault("KERAS_BACKEND", "torch")


def each(update):
    """Make a step of `update(params, grads) -> params` on lists of arrays of one element."""

    def step(param, grad):
        parts = update([p.reshape(1) for p in param], [g.reshape(1) for g in grad])
        return np.concatenate([np.asarray(part).reshape(1) for part in parts])

    return step


def on_torch(build):
    """Make a step of `build(tensors) -> torch.optim.Optimizer`."""
    import torch

    tensors, optimizer = [], None

    def update(params, grads):
        nonlocal optimizer
        if optimizer is None:
            tensors.extend(torch.nn.Parameter(torch.tensor(param)) for param in params)
            optimizer = build(tensors)
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        optimizer.step()
        return [tensor.detach().numpy() for tensor in tensors]

    return each(update)


def torch_nadam(
    lr, beta1, beta2, eps, weight_decay=0.0, coupled_weight_decay=0.0, *, kind="torch.optim:NAdam", options=NONE
):
    decay = {"weight_decay": weight_decay or coupled_weight_decay, "decoupled_weight_decay": weight_decay > 0}
    kind = resolve_name(kind)
    return on_torch(lambda tensors: kind(tensors, lr, (beta1, beta2), eps, **decay, **options))


def timm(name):
    """Return a class of timm.optim, also where torchvision is missing, which only its models need."""
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.modules["timm"] = importlib.util.module_from_spec(importlib.util.find_spec("timm"))
        sys.modules["timm.models"] = types.SimpleNamespace(group_parameters=None)
    return resolve_name(f"timm.optim:{name}")


def timm_nadamw(lr, beta1, beta2, eps, weight_decay=0.0, *, kind=None):
    kind = timm("NAdamW") if kind is None else resolve_name(kind)
    return on_torch(lambda tensors: kind(tensors, lr, (beta1, beta2), eps, weight_decay))


def timm_legacy(lr, beta1, beta2, eps, coupled_weight_decay=0.0):
    return on_torch(lambda tensors: timm("NAdamLegacy")(tensors, lr, (beta1, beta2), eps, coupled_weight_decay))


def on_jax(transform):
    """Make a step of a gradient transformation."""
    import jax

    state = None

    def update(params, grads):
        nonlocal state
        with jax.enable_x64(True):
            state = transform.init(params) if state is None else state
            updates, state = jax.jit(transform.update)(grads, state, params)
        return [param + np.asarray(update) for param, update in zip(params, updates, strict=True)]

    return each(update)


def jax_nadam(lr, beta1, beta2, eps, *, kind, options=NONE):
    return on_jax(resolve_name(kind)(lr, beta1, beta2, eps, **options))


def jax_nadamw(lr, beta1, beta2, eps, weight_decay=0.0, *, kind, options=NONE):
    return on_jax(resolve_name(kind)(lr, beta1, beta2, eps, weight_decay=weight_decay, **options))


def fused(lr, beta1, beta2, eps, weight_decay=0.0, *, options):
    import jax

    optimizer = resolve_name("nadam.jax:fused")(lr, beta1, beta2, eps, weight_decay=weight_decay or None, **options)
    state = None

    def update(params, grads):
        nonlocal state
        with jax.enable_x64(True):
            state = optimizer.init(params) if state is None else state
            params, state = jax.jit(optimizer.step)(grads, state, params)
        return params

    return each(update)


def keras_nadam(lr, beta1, beta2, eps, weight_decay=0.0, *, kind="keras.optimizers:Nadam", options=NONE):
    import keras

    variables, optimizer = [], None

    def update(params, grads):
        nonlocal optimizer
        if optimizer is None:
            optimizer = resolve_name(kind)(lr, beta1, beta2, eps, weight_decay=weight_decay or None, **options)
            variables.extend(keras.Variable(param, dtype="float64") for param in params)
        optimizer.apply([keras.ops.convert_to_tensor(grad, "float64") for grad in grads], variables)
        return [keras.ops.convert_to_numpy(variable) for variable in variables]

    def wide(params, grads):
        before = keras.config.floatx()
        keras.config.set_floatx("float64")  # for the learning rate too
        try:
            if keras.backend.backend() != "jax":
                return update(params, grads)
            with resolve_name("jax:enable_x64")(True):
                return update(params, grads)
        finally:
            keras.config.set_floatx(before)

    return each(wide)


def on_tensorflow(optimizer):
    import tensorflow as tf

    variables = []

    def update(params, grads):
        variables.extend(map(tf.Variable, params) if not variables else ())
        optimizer.apply_gradients(zip(map(tf.constant, grads), variables, strict=True))
        return [variable.numpy() for variable in variables]

    return each(update)


def keras2(lr, beta1, beta2, eps, weight_decay=0.0):
    import tf_keras

    return on_tensorflow(tf_keras.optimizers.Nadam(lr, beta1, beta2, eps, weight_decay=weight_decay or None))


def keras2_legacy(lr, beta1, beta2, eps):
    import tf_keras

    return on_tensorflow(tf_keras.optimizers.legacy.Nadam(lr, beta1, beta2, eps))


def tensorflow1(lr, beta1, beta2, eps):
    """tf.contrib.opt.NadamOptimizer called this kernel, which TensorFlow 2 still has."""
    import tensorflow as tf

    slots, t = [], 0

    def update(params, grads):
        nonlocal t
        t += 1
        slots.extend([[tf.Variable(scale * p) for scale in (1, 0, 0)] for p in params] if not slots else ())
        for slot, grad in zip(slots, grads, strict=True):
            settings = beta1**t, beta2**t, lr, beta1, beta2, eps, grad
            arguments = [variable.handle for variable in slot] + [tf.constant(x, tf.float64) for x in settings]
            names = ("var", "m", "v", "beta1_power", "beta2_power", "lr", "beta1", "beta2", "epsilon", "grad")
            tf.raw_ops.ResourceApplyAdam(**dict(zip(names, arguments, strict=True)), use_nesterov=True)
        return [variable.numpy() for variable, _, _ in slots]

    return each(update)


def paddle_nadam(lr, beta1, beta2, eps, coupled_weight_decay=0.0):
    import paddle

    tensors, optimizer = [], None

    def update(params, grads):
        nonlocal optimizer
        if optimizer is None:
            tensors.extend(paddle.to_tensor(param, dtype="float64", stop_gradient=False) for param in params)
            settings = {"beta1": beta1, "beta2": beta2, "epsilon": eps, "weight_decay": coupled_weight_decay or None}
            optimizer = paddle.optimizer.NAdam(lr, parameters=tensors, **settings)
        for tensor, grad in zip(tensors, grads, strict=True):
            (tensor * paddle.to_tensor(grad)).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
        return [tensor.numpy() for tensor in tensors]

    return each(update)


def mindspore_nadam(lr, beta1, beta2, eps, coupled_weight_decay=0.0):
    import mindspore
    from mindspore.experimental.optim import NAdam

    tensors, optimizer = [], None

    def update(params, grads):
        nonlocal optimizer
        if optimizer is None:
            tensors.extend(mindspore.Parameter(param, name=f"param{i}") for i, param in enumerate(params))
            optimizer = NAdam(tensors, lr, (beta1, beta2), eps, coupled_weight_decay)
        optimizer(tuple(mindspore.Tensor(grad) for grad in grads))
        return [tensor.asnumpy() for tensor in tensors]

    return each(update)


def mxnet_nadam(lr, beta1, beta2, eps, coupled_weight_decay=0.0):
    import mxnet

    settings = {"learning_rate": lr, "beta1": beta1, "beta2": beta2, "epsilon": eps, "wd": coupled_weight_decay}
    optimizer, tensors, states = mxnet.optimizer.Nadam(**settings), [], []

    def update(params, grads):
        tensors.extend((mxnet.nd.array(param, dtype="float64") for param in params) if not tensors else ())
        states.extend((optimizer.create_state(i, tensor) for i, tensor in enumerate(tensors)) if not states else ())
        for i, grad in enumerate(grads):
            optimizer.update(i, tensors[i], mxnet.nd.array(grad, dtype="float64"), states[i])
        return [tensor.asnumpy() for tensor in tensors]

    return each(update)


def numpy_nadam(lr, beta1, beta2, eps, weight_decay=0.0, *, options):
    optimizer, kept = resolve_name("nadam:Nadam")(lr, beta1, beta2, eps, weight_decay, **options), []

    def update(params, grads):
        kept.extend(params if not kept else ())
        optimizer.apply(grads, kept)
        return kept

    return each(update)


class Row(NamedTuple):
    """An implementation: the module that has to be there, its name, and `make` for nadam.conformance."""

    library: str
    name: str
    make: Callable[..., Any]
    member: str | None = None  # of the family, where it is ours


PEERS = [
    Row("torch", "torch.optim.NAdam", torch_nadam),
    Row("torch", "torch.optim.NAdam, foreach=True", partial(torch_nadam, options={"foreach": True})),
    Row("keras", "keras.optimizers.Nadam", keras_nadam),
    Row("optax", "optax.nadam", partial(jax_nadam, kind="optax:nadam")),
    Row("optax", "optax.nadamw", partial(jax_nadamw, kind="optax:nadamw")),
    Row("timm", "timm.optim.NAdamW", timm_nadamw),
    Row("timm", "timm.optim.NAdamLegacy", timm_legacy),
    Row("heavyball", "heavyball.NAdam", partial(torch_nadam, kind="heavyball:NAdam", options={"compile_step": False})),
    Row("tensorflow", "tf.raw_ops.ResourceApplyAdam(use_nesterov=True)", tensorflow1),
    Row("tf_keras", "tf_keras.optimizers.Nadam", keras2),
    Row("tf_keras", "tf_keras.optimizers.legacy.Nadam", keras2_legacy),
    Row("paddle", "paddle.optimizer.NAdam", paddle_nadam),
    Row("mindspore", "mindspore.experimental.optim.NAdam", mindspore_nadam),
    Row("mxnet", "mxnet.optimizer.Nadam", mxnet_nadam),
]
HOSTS = {
    "nadam.Nadam": ("numba", numpy_nadam),
    "nadam.torch.NAdam": ("torch", partial(torch_nadam, kind="nadam.torch:NAdam")),
    "nadam.keras.Nadam": ("keras", partial(keras_nadam, kind="nadam.keras:Nadam")),
    "nadam.jax.nadam": ("optax", partial(jax_nadam, kind="nadam.jax:nadam")),
    "nadam.jax.nadamw": ("optax", partial(jax_nadamw, kind="nadam.jax:nadamw")),
    "nadam.jax.fused": ("optax", fused),
}
OURS = [
    Row(library, f"{host} as {member}", partial(make, options=options), member)
    for host, (library, make) in HOSTS.items()
    for member, options in MEMBERS.items()
]
OURS.append(Row("torch", "nadam.torch.NAdamW", partial(timm_nadamw, kind="nadam.torch:NAdamW"), "adam"))
ROWS = PEERS + OURS
