"""Nested dicts, lists and tuples as JSON with the arrays aside, exact in values and types or refused by key."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

DEPTH = 100
# In the JSON an array is its name in the archive and its dtype, marked by a key that no other dict there has alone; so
# are a tuple, and the items of a dict that has a key like these or one that is no string.
ARRAY, ITEMS, TUPLE = "__array__", "__items__", "__tuple__"
MARKERS = {ARRAY, ITEMS, TUPLE}
# Before the name of a dtype: a tensor of PyTorch, a scalar of NumPy.
TORCH, SCALAR = "torch.", "scalar."


def encode(value: Any, arrays: dict[str, NDArray[Any]], where: str = "state", depth: int = 0) -> Any:
    """A value for JSON, its arrays put into a dict."""
    _check_depth(depth, where)
    if _is_plain(value, where):
        return value
    if isinstance(value, Mapping):
        keys = [_key(key, where, depth + 1) for key in value]
        items = [encode(item, arrays, f"{where}[{key!r}]", depth + 1) for key, item in value.items()]
        pairs = list(zip(keys, items, strict=True))
        return dict(pairs) if all(type(key) is str and key not in MARKERS for key in keys) else {ITEMS: pairs}
    if type(value) in (list, tuple):
        encoded = [encode(item, arrays, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return encoded if type(value) is list else {TUPLE: encoded}
    found = _array(value, where)
    if found is None:
        raise TypeError(f"{where}: a {_named(value)} cannot be saved")
    name = f"array{len(arrays)}"
    arrays[name], dtype = found
    return {ARRAY: [name, dtype]}


def _named(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_depth(depth: int, where: str) -> None:
    if depth > DEPTH:
        raise ValueError(f"{where[:60]}...: nested more than {DEPTH} deep, or inside itself")


def _is_plain(value: Any, where: str) -> bool:
    if type(value) is int:
        try:
            repr(value)
        except ValueError as error:  # too long for Python to write or to read
            raise ValueError(f"{where}: {error}") from None
    return value is None or type(value) in (bool, int, float, str)


def _key(key: Any, where: str, depth: int) -> Any:
    _check_depth(depth, where)
    if type(key) is tuple:
        return {TUPLE: [_key(part, where, depth + 1) for part in key]}
    if not _is_plain(key, f"{where}: a key"):
        raise TypeError(f"{where}: a key that is or holds {repr(key)[:60]} of type {_named(key)} cannot be saved")
    return key


def _array(value: Any, where: str) -> tuple[NDArray[Any], str] | None:
    """What is stored of an array, a tensor or a scalar, and the name of its dtype; None of anything else."""
    library, prefix = type(value).__module__.partition(".")[0], ""
    try:
        if library == "torch" and hasattr(value, "numpy"):
            return _from_torch(value)
        if library in ("jax", "jaxlib") and hasattr(value, "dtype"):
            value = np.asarray(value)
        elif isinstance(value, np.generic) and not isinstance(value, np.flexible):
            value, prefix = np.asarray(value), SCALAR
        elif type(value) is not np.ndarray:
            return None
    except (TypeError, ValueError, RuntimeError) as error:  # of a tracer, a deleted array, another process's
        raise TypeError(f"{where}: a {_named(value)} cannot be saved: {error}") from error
    dtype = value.dtype
    if dtype.type.__module__ == "ml_dtypes":  # NumPy's format has none of these: their bits are stored
        return value.view(f"u{dtype.itemsize}"), prefix + dtype.name
    with suppress(TypeError, ValueError):
        if dtype.itemsize and not dtype.hasobject and npy.descr_to_dtype(npy.dtype_to_descr(dtype)) == dtype:
            return value, prefix + dtype.name
    raise TypeError(f"{where}: an array of {dtype} cannot be saved")


def _from_torch(tensor: Any) -> tuple[NDArray[Any], str]:
    import torch

    if hasattr(tensor, "to_local"):
        raise TypeError("it is split over processes; torch.distributed.checkpoint can save it")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.layout != torch.strided:
        raise TypeError(f"it is a subclass, quantized or of another layout: {tensor.layout}")
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    try:
        array = plain.numpy()
    except TypeError:  # a dtype that NumPy does not have: its bits
        array = plain.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[plain.itemsize]).numpy()
    return array, str(plain.dtype)


def decode(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """The value that was encoded; takes its arrays out of the dict."""
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    marker = next(iter(value)) if len(value) == 1 else None
    if marker == ARRAY:
        name, dtype = value[ARRAY]
        if name not in arrays:
            raise ValueError(f"array {name!r} is missing, or two values refer to it")
        return _restored(arrays.pop(name), dtype)
    if marker == TUPLE:
        return tuple(decode(_list(value[TUPLE]), arrays))
    if marker == ITEMS:
        return {decode(key, arrays): decode(item, arrays) for key, item in _list(value[ITEMS])}
    return {key: decode(item, arrays) for key, item in value.items()}


def _list(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} in the place of a list")
    return value


def _restored(array: NDArray[Any], dtype: str) -> Any:
    if dtype.startswith(TORCH):
        return _tensor(array, dtype.removeprefix(TORCH))
    name = dtype.removeprefix(SCALAR)
    if array.dtype.name != name:
        array = array.view(_extension(name, array.dtype))
    return array if name == dtype else array[()]


def _tensor(array: NDArray[Any], name: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError('the file holds tensors of PyTorch: pip install "nadam[torch]"') from error

    dtype = vars(torch).get(name)
    # A quantized dtype on a tensor that is not: PyTorch would crash.
    if not isinstance(dtype, torch.dtype) or name.startswith("q"):
        raise ValueError(f"torch.{name}: no dtype of a tensor")
    tensor = torch.from_numpy(array)
    if tensor.dtype != dtype and (array.dtype.kind not in "iu" or array.dtype.itemsize != dtype.itemsize):
        raise ValueError(f"torch.{name}: stored as {array.dtype}")
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _extension(name: str, stored: np.dtype[Any]) -> np.dtype[Any]:
    """A dtype of ml_dtypes whose bits are stored as another."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(f"the file holds {name}: pip install ml_dtypes") from error

    found = vars(ml_dtypes).get(name)
    if not isinstance(found, type) or not issubclass(found, np.generic) or stored.kind not in "uV":
        raise ValueError(f"{name}: no dtype, or stored as {stored}")
    dtype = np.dtype(found)
    if dtype.itemsize != stored.itemsize:
        raise ValueError(f"{name}: stored as {stored}")
    return dtype
