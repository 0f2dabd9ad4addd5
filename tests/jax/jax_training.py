"""What tests of the JAX host have in common: a small model, comparisons of trees, and programs on several devices."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp

SHARDED = Path(__file__).with_name("sharded_run.py")
STEPS, SIZE = 8, 4


def batches():
    """Inputs and targets of each step."""
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((STEPS, SIZE, 3)).astype("float32")
    return [(jnp.asarray(x), jnp.asarray(3 * x.prod(axis=1, keepdims=True))) for x in inputs]


def squares(model, batch):
    """The mean squared error of a model, which is a function of the inputs."""
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def perceptron(seed=0):
    """Parameters, in a tree."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": {"kernel": (3, 8), "bias": (8,)}, "output": {"kernel": (8, 1), "bias": (1,)}}
    draw = jax.tree.map(lambda shape: rng.standard_normal(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), draw)


def loss(params, batch):
    """The mean squared error of a perceptron."""

    def model(x):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return hidden @ params["output"]["kernel"] + params["output"]["bias"]

    return squares(model, batch)


def same(one, other):
    """Whether two trees are the same: structure, dtypes and every bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def assert_close(ours, theirs, **tolerance):
    """That the leaves of two trees are close, those of different kinds of tree too."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def start(devices, *arguments):
    """Start `sharded_run.py` where the CPU counts as a number of devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, SHARDED, *arguments]
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    """Wait for processes that need each other; when one has failed or hangs, none is left."""
    deadline, errors = time.monotonic() + 300, []
    for process in processes:
        try:
            _, error = process.communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            _, error = process.communicate()
        errors.append(f"{process.returncode}: {error[-3000:]}")
    assert not any(process.returncode for process in processes), "\n".join(errors)


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def read(path):
    """What `sharded_run.py` wrote: parameters, state, and the rest by name."""
    with np.load(path) as file:
        arrays = dict(file)
    params, state = ([arrays.pop(key) for key in sorted(arrays) if key.startswith(of)] for of in ("params", "state"))
    return params, state, arrays
