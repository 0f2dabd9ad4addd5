"""Time whole jitted training steps on JAX in turns, parameters and state donated; of each what it takes over SGD.

"Full" is global-norm clipping, decoupled decay and a moving average: in `fused` by its arguments, of optax a chain with
`optax.ema` of the parameters beside it. The floor moves the same bytes in XLA's own loops, a loop for each array.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

import nadam.jax
from nadam.bench.loops import BIG, CONVOLUTIONS, DENSE, MLP, MODELS, SMALL, TRANSFORMER, Sample, full_settings
from nadam.bench.records import FLOOR, OURS

WANTED = {
    (BIG, "plain"): {"optax": 1.4},
    (BIG, "full"): {"optax": 2.5},
    (SMALL, "plain"): {"optax": 1.7},
    (SMALL, "full"): {"optax": 2.0},
}
LESS = "SGD"
QUICK_MODELS = (MLP,)
LR, DECAY = 1e-4, 1e-4
__all__ = ["LESS", "MODELS", "QUICK_MODELS", "WANTED", "loops"]


def model_of(name: str) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    """Parameters, (params, inputs) -> outputs, inputs."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1] if len(shape) < 3 else 9), jnp.float32)

    if name == TRANSFORMER:
        sizes = {"qkv": (128, 384), "out": (128, 128), "up": (128, 256), "down": (256, 128)}
        params = [{k: drawn(*s) for k, s in sizes.items()} | {"scale": jnp.ones((2, 128))} for _ in range(6)]
        return params, _transformer, drawn(4, 32, 128)
    if name == CONVOLUTIONS:
        kernels = {"a": drawn(32, 1, 3, 3), "b": drawn(64, 32, 3, 3), "c": drawn(1600, 128), "d": drawn(128, 10)}
        return kernels, _convolutions, drawn(16, 1, 28, 28)
    units, batch = DENSE[name]
    params = [{"w": drawn(i, o), "b": jnp.zeros(o)} for i, o in pairwise(units)]
    return params, _dense, drawn(batch, units[0])


def _dense(params: Any, x: Any) -> Any:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _transformer(params: Any, x: Any) -> Any:
    for layer in params:
        q, k, v = jnp.split((x * layer["scale"][0]) @ layer["qkv"], 3, axis=-1)
        q, k, v = (each.reshape(4, 32, 4, 32).swapaxes(1, 2) for each in (q, k, v))
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 32**0.5)
        x = x + (weights @ v).swapaxes(1, 2).reshape(4, 32, 128) @ layer["out"]
        x = x + jax.nn.relu((x * layer["scale"][1]) @ layer["up"]) @ layer["down"]
    return x


def _convolutions(params: Any, x: Any) -> Any:
    for name in ("a", "b"):
        x = jax.nn.relu(jax.lax.conv(x, params[name], (1, 1), "VALID"))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return jax.nn.relu(x.reshape(len(x), -1) @ params["c"]) @ params["d"]


def steps(kind: str, quick: bool = False) -> dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]]:
    """(init, (grads, state, params) -> (params, state)) of each."""
    settings = full_settings() if kind == "full" else {}
    fused = nadam.jax.fused(LR, **settings)
    made = {OURS: (fused.init, fused.step)}
    ours, theirs = (nadam.jax.nadamw, optax.nadamw) if kind == "full" else (nadam.jax.nadam, optax.nadam)
    decay: dict[str, Any] = {"weight_decay": DECAY} if kind == "full" else {}
    made["optax"] = _of_optax(theirs(LR, **decay), kind)
    if not quick:
        made["nadam within optax"] = _of_optax(ours(LR, **decay), kind)
    made[FLOOR] = _floor(kind)
    made[LESS] = _of_optax(optax.sgd(LR), "plain")
    return made


def _floor(kind: str) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    def init(params: Any) -> Any:
        return jnp.zeros(()), [jax.tree.map(jnp.zeros_like, params) for _ in range(3 if kind == "full" else 2)]

    def step(grads: Any, state: Any, params: Any) -> Any:
        zero, moved = state
        factor = zero * optax.global_norm(grads) if kind == "full" else zero
        params = jax.tree.map(lambda param, grad: param - factor * grad, params, grads)
        return params, (zero, jax.tree.map(lambda x: x + zero, moved))

    return init, step


def _of_optax(transformation: Any, kind: str) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    if kind == "full":
        transformation = optax.chain(optax.clip_by_global_norm(1.0), transformation)

    def init(params: Any) -> Any:
        return transformation.init(params), jax.tree.map(jnp.copy, params) if kind == "full" else None

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, inner = transformation.update(grads, state[0], params)
        params, average = optax.apply_updates(params, updates), state[1]
        if average is not None:
            average = optax.incremental_update(params, average, 0.01)
        return params, (inner, average)

    return init, step


def loops(name: str, kind: str, quick: bool = False) -> dict[str, Sample]:
    """A sample of each, a whole training step."""
    start, forward, inputs = model_of(name)

    def loop(init: Callable[[Any], Any], step: Callable[..., Any]) -> Sample:
        def train(params: Any, state: Any, inputs: Any) -> Any:
            grads = jax.grad(lambda p: jnp.mean(forward(p, inputs) ** 2))(params)
            return step(grads, state, params)

        compiled = jax.jit(train, donate_argnums=(0, 1))
        params = jax.tree.map(jnp.copy, start)
        carry = params, jax.jit(init)(params)

        def sample() -> float:
            nonlocal carry
            begin = time.perf_counter()
            carry = jax.block_until_ready(compiled(*carry, inputs))
            return time.perf_counter() - begin

        return sample

    return {who: loop(*functions) for who, functions in steps(kind, quick).items()}
