"""Bytes of an optimizer's state for each parameter, counted from the state itself after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from nadam.bench.cases import as_dtype
from nadam.bench.options import Options
from nadam.bench.records import OURS, Kept

SHAPE = (1000, 100)
PLAIN, EMA = "plain", "use_ema"
DTYPES = ("float32", "bfloat16", "float64")

Contestant = tuple[str, str, Callable[[], Sequence[Any]]]  # kind, whose, what gives the arrays of the state


def units(options: Options) -> list[tuple[str]]:
    """Number formats; float64 where the host has it without being told, and not for a quick look."""
    if options.models:
        return []
    dtypes: tuple[str, ...] = DTYPES if options.host in ("numpy", "torch") and not options.quick else DTYPES[:2]
    if options.host == "numpy" and find_spec("ml_dtypes") is None:
        dtypes = tuple(dtype for dtype in dtypes if dtype != "bfloat16")
    return [(dtype,) for dtype in dtypes]


def measure(options: Options, dtype: str) -> Iterator[Kept]:
    """A row for each optimizer and kind."""
    make = {"numpy": _on_numpy, "torch": _on_torch, "jax": _on_jax}.get(options.host, _on_keras)
    for kind, who, state in make(dtype):
        arrays = [array for array in state() if np.prod(array.shape) > 1]
        yield Kept(options.heading, dtype, kind, who, sum(map(_nbytes, arrays)) / np.prod(SHAPE).item())


def _nbytes(array: Any) -> int:
    if hasattr(array, "nbytes"):
        return int(array.nbytes)
    width = 2 if "16" in str(array.dtype) else 8 if "64" in str(array.dtype) else 4  # Keras's variables
    return int(np.prod(array.shape)) * width


def _on_numpy(dtype: str) -> Iterator[Contestant]:
    from nadam.bench.reference import NumpyNadam
    from nadam.numpy import Nadam

    def ours(**settings: Any) -> Sequence[Any]:
        optimizer = Nadam(**settings)
        optimizer.apply([np.ones(SHAPE, as_dtype(dtype))], [np.ones(SHAPE, as_dtype(dtype))])
        return optimizer.variables

    def plain() -> Sequence[Any]:
        theirs = NumpyNadam([np.ones(SHAPE, as_dtype(dtype))], np.float64 if dtype == "float64" else np.float32, False)
        return [*theirs.mean, *theirs.square]

    yield PLAIN, OURS, ours
    yield EMA, OURS, lambda: ours(use_ema=True)
    if dtype != "float64":
        yield "state_bits=8", OURS, lambda: ours(state_bits=8)
    yield PLAIN, "NumPy", plain


def _on_torch(dtype: str) -> Iterator[Contestant]:
    import torch

    from nadam.torch import NAdam

    def state(make: Any, **settings: Any) -> Sequence[Any]:
        param = torch.nn.Parameter(torch.ones(SHAPE, dtype=getattr(torch, dtype)))
        param.grad = torch.ones_like(param)
        optimizer = make([param], **settings)
        optimizer.step()
        return [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]

    yield PLAIN, OURS, lambda: state(NAdam)
    yield EMA, OURS, lambda: state(NAdam, use_ema=True)
    if dtype != "float64":
        yield "state_bits=8", OURS, lambda: state(NAdam, state_bits=8)
    if dtype == "bfloat16":
        yield "remainder", OURS, lambda: state(NAdam, remainder=True)
        yield "remainder=8", OURS, lambda: state(NAdam, remainder=8)
        yield "remainder=8, state_bits=8", OURS, lambda: state(NAdam, remainder=8, state_bits=8)
        yield "exp_avg in bfloat16", OURS, lambda: state(NAdam, exp_avg_dtype=torch.bfloat16)
    yield PLAIN, "NAdam", lambda: state(torch.optim.NAdam)
    yield PLAIN, "fused Adam", lambda: state(torch.optim.Adam, fused=True)


def _on_jax(dtype: str) -> Iterator[Contestant]:
    import jax
    import optax

    import nadam.jax

    param = jax.numpy.ones(SHAPE, dtype)

    def state(optimizer: Any) -> Sequence[Any]:
        leaves: list[Any] = jax.tree.leaves(optimizer.init(param))
        return leaves

    yield PLAIN, OURS, lambda: state(nadam.jax.fused(1e-3))
    yield EMA, OURS, lambda: state(nadam.jax.fused(1e-3, use_ema=True))
    yield PLAIN, "nadam within optax", lambda: state(nadam.jax.nadam(1e-3))
    yield PLAIN, "optax", lambda: state(optax.nadam(1e-3))


def _on_keras(dtype: str) -> Iterator[Contestant]:
    import keras

    import nadam.keras

    def state(make: Any, **settings: Any) -> Sequence[Any]:
        optimizer = make(**settings)
        optimizer.build([keras.Variable(np.ones(SHAPE, np.float32), dtype=dtype)])
        variables: list[Any] = optimizer.variables
        return variables

    for who, make in ((OURS, nadam.keras.Nadam), ("Nadam", keras.optimizers.Nadam), ("Adam", keras.optimizers.Adam)):
        yield PLAIN, who, partial(state, make)
        yield EMA, who, partial(state, make, use_ema=True)
