"""Every other optimizer that is installed, each behind the same few lines, looked up in the table at the end.

"Full" is what each one's users would write: its own arguments where it has them, the usual recipe around it otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from nadam.bench.cases import KINDS, Array
from nadam.bench.measure import Work
from nadam.bench.reference import NumpyNadam

LR, FULL = 1e-3, KINDS["full"]
EMA_MOMENTUM = 0.99


class Running(NamedTuple):
    """A peer at work on a case: one whole step, and the first of its parameters."""

    step: Work
    first: Callable[[], Any]


def on_numpy(params: Sequence[Array], grads: Sequence[Array], full: bool) -> Running:
    """The reference in NumPy."""
    compute = np.float64 if params[0].dtype == np.float64 else np.float32
    optimizer = NumpyNadam(params, compute, full)
    return Running(partial(optimizer.step, grads), lambda: params[0])


def _tensors(arrays: Sequence[Array]) -> list[Any]:
    import torch

    if arrays[0].dtype.itemsize == 2:  # bfloat16, which PyTorch does not take from NumPy
        return [torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for array in arrays]
    return [torch.from_numpy(array) for array in arrays]


def on_torch(make: Callable[..., Any], params: Sequence[Array], grads: Sequence[Array], full: bool) -> Running:
    """One of PyTorch's optimizers, which ``make`` makes of tensors and a decay."""
    import torch

    tensors = [torch.nn.Parameter(tensor) for tensor in _tensors(params)]
    for tensor, grad in zip(tensors, _tensors(grads), strict=True):
        tensor.grad = grad
    averages = [tensor.detach().clone() for tensor in tensors] if full else []
    optimizer = make(tensors, FULL["weight_decay"] if full else 0.0)

    @torch.no_grad()
    def step() -> None:
        if full:
            torch.nn.utils.clip_grad_norm_(tensors, FULL["global_clipnorm"], foreach=True)
        optimizer.step()
        if full:
            torch._foreach_lerp_(averages, tensors, 1 - EMA_MOMENTUM)

    return Running(step, lambda: tensors[0].detach().double().numpy())


def torch_nadam(tensors: Any, weight_decay: float) -> Any:
    """PyTorch's Nadam by foreach operations."""
    import torch

    return torch.optim.NAdam(tensors, LR, weight_decay=weight_decay, decoupled_weight_decay=True, foreach=True)


def torch_adam(tensors: Any, weight_decay: float) -> Any:
    """PyTorch's AdamW in one pass."""
    import torch

    return torch.optim.AdamW(tensors, LR, weight_decay=weight_decay, fused=True)


def _optax(params: Sequence[Array], grads: Sequence[Array], full: bool) -> Running:
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    rule = optax.nadam(LR)
    if full:
        rule = optax.nadamw(LR, weight_decay=FULL["weight_decay"])
        rule = optax.chain(optax.clip_by_global_norm(FULL["global_clipnorm"]), rule)

    def update(state: Any, grads: Any) -> Any:
        params, moments, averages = state
        updates, moments = rule.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        if full:
            averages = optax.incremental_update(params, averages, 1 - EMA_MOMENTUM)
        return params, moments, averages

    compiled = jax.jit(update, donate_argnums=0)
    given = [jax.numpy.array(grad) for grad in grads]
    begin = [jax.numpy.array(param) for param in params]
    state = begin, rule.init(begin), [param.copy() for param in begin] if full else []

    def step() -> None:
        nonlocal state
        state = compiled(state, given)
        jax.block_until_ready(state)

    return Running(step, lambda: np.asarray(state[0][0], np.float64))


def _keras(params: Sequence[Array], grads: Sequence[Array], full: bool) -> Running:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import torch

    if keras.backend.backend() != "torch":
        raise RuntimeError("Keras runs on another backend already")
    dtype = params[0].dtype.name
    variables = [keras.Variable(tensor, dtype=dtype) for tensor in _tensors(params)]
    optimizer = keras.optimizers.Nadam(LR, **(FULL if full else {}))
    optimizer.build(variables)
    given = _tensors(grads)

    @torch.no_grad()
    def step() -> None:
        optimizer.apply(given, variables)

    return Running(step, lambda: variables[0].value.detach().double().numpy())


class Peer(NamedTuple):
    """An optimizer to compare with.

    Attributes:
        modules: What has to be installed.
        start: Takes parameters, gradients (both its own) and whether everything is on.
        pinned: Whether only the system can hold it to a number of threads (`limited_to`).
    """

    name: str
    modules: tuple[str, ...]
    start: Callable[[Sequence[Array], Sequence[Array], bool], Running]
    pinned: bool = False

    @property
    def installed(self) -> bool:
        """Whether all that it needs is there."""
        return all(find_spec(module) is not None for module in self.modules)


PEERS = [
    Peer("NumPy", (), on_numpy),
    Peer("torch NAdam", ("torch",), partial(on_torch, torch_nadam)),
    Peer("torch fused Adam", ("torch",), partial(on_torch, torch_adam)),
    Peer("optax nadam", ("jax", "optax"), _optax, pinned=True),
    Peer("Keras on torch", ("keras", "torch"), _keras),
]


def runs(peer: Running) -> bool:
    """Whether the first step of a peer gives numbers: some have no bfloat16, or turn it into NaN."""
    peer.step()
    return bool(np.isfinite(np.asarray(peer.first(), np.float64)).all())


@contextmanager
def limited_to(threads: int, peer: Peer) -> Iterator[None]:
    """Hold a peer to a number of threads.

    PyTorch, and Keras on it, are asked. JAX cannot be, once it runs: where the system allows it (Linux), every thread
    of this process is kept on so many CPUs instead. NumPy has one thread.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if not (peer.pinned and hasattr(os, "sched_setaffinity")):
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        _keep_on(set(sorted(allowed)[:threads]))
        yield
    finally:
        _keep_on(allowed)


def _keep_on(cpus: set[int]) -> None:
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # the thread may have ended
            os.sched_setaffinity(int(task), cpus)
