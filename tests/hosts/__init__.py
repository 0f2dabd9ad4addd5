"""Every host and compiler behind one interface: arrays of NumPy and settings by core's names in, state by name out.

No framework is imported before its host is built. A host is built once, stepped, and asked for its state:

    host = HOSTS["torch"]()
    host.build(params, {"lr": 0.01, "clipnorm": 1.0})  # it takes the arrays over
    host.step(grads)
    host.state()["exp_avg"]
"""

from functools import partial

from hosts.on_jax import Jax, JaxTransform
from hosts.on_keras import Keras
from hosts.on_numpy import Numpy
from hosts.on_torch import Torch

HOSTS = {
    "numpy": Numpy,
    "torch": Torch,
    "torch fallback": partial(Torch, "fallback"),
    "triton": partial(Torch, "triton"),
    "jax kernel": Jax,
    "jax loops": partial(Jax, kernels=False),
    "jax transform": JaxTransform,
    "keras torch": partial(Keras, "torch", "apply"),
    "keras jax": partial(Keras, "jax", "apply"),
    "keras jax jit": partial(Keras, "jax", "jit"),
    "keras jax jit loops": partial(Keras, "jax", "jit", kernels=False),
    "keras tensorflow": partial(Keras, "tensorflow", "apply"),
    "keras tensorflow function": partial(Keras, "tensorflow", "function"),
    "keras tensorflow XLA": partial(Keras, "tensorflow", "XLA"),
}
