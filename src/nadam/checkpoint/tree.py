"""Nested dicts, lists and tuples as JSON with the arrays aside, exact in values and types or refused by key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from nadam.core.portable_formats import Bfloat16

DEPTH = 100
# In the JSON an array is its name in the file and its dtype, marked by a key that no other dict there has alone; so
# are a tuple, and the items of a dict that has a key like these or one that is no string.
ARRAY, ITEMS, TUPLE = "__array__", "__items__", "__tuple__"
MARKERS = {ARRAY, ITEMS, TUPLE}
# Before the name of a dtype: a tensor of PyTorch, a scalar of NumPy.
TORCH, SCALAR = "torch.", "scalar."
# The dtypes that safetensors names, by their names in NumPy, ml_dtypes and PyTorch: its name, and what NumPy stores.
NAMED = {
    "bool": ("BOOL", "|b1"),
    "uint8": ("U8", "|u1"),
    "int8": ("I8", "|i1"),
    "uint16": ("U16", "<u2"),
    "int16": ("I16", "<i2"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "|u1"),
    "float8_e5m2": ("F8_E5M2", "|u1"),
    "uint32": ("U32", "<u4"),
    "int32": ("I32", "<i4"),
    "float32": ("F32", "<f4"),
    "uint64": ("U64", "<u8"),
    "int64": ("I64", "<i8"),
    "float64": ("F64", "<f8"),
    "complex64": ("C64", "<c8"),
}
# The root's name, then keys and indices. Spelled out only in errors: for each array it took a fifth of `encode`.
Path: TypeAlias = tuple[Any, ...]
# Those that NumPy stores as what they are.
PLAIN = {name: np.dtype(storage) for name, (_, storage) in NAMED.items() if np.dtype(storage).name == name}


class Stored(NamedTuple):
    """An array as the file has it.

    Attributes:
        array: Contiguous; where its dtype is not in NAMED, or its bytes are in another order, its bytes in a last axis.
        kind: Its dtype's name in safetensors.
        dtype: Its own dtype, for `decode`: a name, or NumPy's description of one that has none.
    """

    array: NDArray[Any]
    kind: str
    dtype: Any


def encode(value: Any, arrays: dict[str, Stored], where: Path = ("state",)) -> Any:
    """A value for JSON, its arrays put into a dict by their paths: ``state/dense.weight/exp_avg``."""
    depth = len(where) - 1
    if depth > DEPTH:
        raise _too_deep(where)
    if type(value) is not np.ndarray:  # which is none of these
        if _is_plain(value, where):
            return value
        if isinstance(value, Mapping):
            pairs = [(_key(key, where, depth + 1), encode(item, arrays, (*where, key))) for key, item in value.items()]
            return dict(pairs) if all(type(key) is str and key not in MARKERS for key, _ in pairs) else {ITEMS: pairs}
        if type(value) in (list, tuple):
            encoded = [encode(item, arrays, (*where, i)) for i, item in enumerate(value)]
            return encoded if type(value) is list else {TUPLE: encoded}
    stored = _stored(value, where)
    if stored is None:
        raise TypeError(f"{_spelled(where)}: a {_named(value)} cannot be saved")
    name = _unique("/".join(map(str, where[1:])), arrays)
    arrays[name] = stored
    return {ARRAY: [name, stored.dtype]}


def _spelled(where: Path) -> str:
    root, *keys = where
    return str(root) + "".join(f"[{key!r}]" for key in keys)


def _unique(path: str, taken: Mapping[str, Any]) -> str:
    path = path.encode("utf-8", "backslashreplace").decode()  # other readers take no lone surrogates
    name, number = path, 1
    while name in taken or name == "__metadata__":
        name, number = f"{path}#{number}", number + 1
    return name


def _named(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _too_deep(where: Path) -> ValueError:
    return ValueError(f"{_spelled(where)[:60]}...: nested more than {DEPTH} deep, or inside itself")


def _is_plain(value: Any, where: Path, what: str = "") -> bool:
    if type(value) is int:
        try:
            repr(value)
        except ValueError as error:  # too long for Python to write or to read
            raise ValueError(f"{_spelled(where)}: {what}{error}") from None
    return value is None or type(value) in (bool, int, float, str)


def _key(key: Any, where: Path, depth: int) -> Any:
    if depth > DEPTH:
        raise _too_deep(where)
    if type(key) is tuple:
        return {TUPLE: [_key(part, where, depth + 1) for part in key]}
    if not _is_plain(key, where, "a key: "):
        what = f"a key that is or holds {repr(key)[:60]} of type {_named(key)}"
        raise TypeError(f"{_spelled(where)}: {what} cannot be saved")
    return key


def _stored(value: Any, where: Path) -> Stored | None:
    """What is stored of an array, a tensor or a scalar; None of anything else."""
    library, prefix = type(value).__module__.partition(".")[0], ""
    try:
        if library == "torch" and hasattr(value, "numpy"):
            array, name = _from_torch(value)
            return _bits(array, name, TORCH + name)
        if library in ("jax", "jaxlib") and hasattr(value, "dtype"):
            value = np.asarray(value)
        elif isinstance(value, np.generic) and not isinstance(value, np.flexible):
            value, prefix = np.asarray(value), SCALAR
        elif type(value) is Bfloat16:  # read as its bits, which takes no ml_dtypes
            return Stored(np.asarray(value, "<u2", order="C"), "BF16", "uint16")
        elif type(value) is not np.ndarray:
            return None
    except (TypeError, ValueError, RuntimeError) as error:  # of a tracer, a deleted array, another process's
        raise TypeError(f"{_spelled(where)}: a {_named(value)} cannot be saved: {error}") from error
    name, described = _names(value.dtype)
    if described is None:
        raise TypeError(f"{_spelled(where)}: an array of {value.dtype} cannot be saved")
    return _bits(value, name, prefix + described if prefix else described)


@lru_cache(1000)
def _names(dtype: np.dtype[Any]) -> tuple[str, Any]:
    """The name in NAMED of a dtype, if it has one, and what `restore` knows it by; None if it cannot be saved."""
    if dtype.type.__module__ == "ml_dtypes":  # of which NumPy has no description
        return dtype.name, dtype.name
    with suppress(TypeError, ValueError):
        described: Any = npy.dtype_to_descr(dtype)
        if dtype.itemsize and not dtype.hasobject and npy.descr_to_dtype(described) == dtype:
            named = dtype.name in NAMED and NAMED[dtype.name][1] == described
            return (dtype.name, dtype.name) if named else ("", described)
    return "", None


def _bits(array: NDArray[Any], name: str, dtype: Any) -> Stored:
    array = np.asarray(array, order="C")
    if name in NAMED:
        kind, storage = NAMED[name]
        return Stored(array if name in PLAIN else array.view(storage), kind, dtype)
    return Stored(array.reshape(*array.shape, 1).view("u1"), "U8", dtype)


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
    return array, str(plain.dtype).removeprefix(TORCH)


def decode(text: str, restored: Callable[[str, Any], Any]) -> Any:
    """The value that was encoded, from its JSON; a function gives the array of a name and a dtype."""

    def of_pairs(pairs: list[tuple[str, Any]]) -> Any:
        key, value = pairs[0] if len(pairs) == 1 else ("", None)
        if key == ARRAY:
            name, dtype = _list(value)
            return restored(name, dtype)
        if key == TUPLE:
            return tuple(_list(value))
        if key == ITEMS:
            pairs = [(key, item) for key, item in map(_list, _list(value))]
        return distinct(pairs)

    return json.loads(text, object_pairs_hook=of_pairs)


def distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict of pairs of which no two have one key, which JSON allows and dicts do not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a dict with one key twice")
    return found


def _list(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} in the place of a list")
    return value


def restore(array: NDArray[Any], dtype: Any) -> Any:
    """The array, tensor or scalar of which a file has an array; in its memory, but for scalars."""
    if isinstance(dtype, str) and dtype in PLAIN and array.dtype == PLAIN[dtype]:
        return array
    name = "" if isinstance(dtype, list) else dtype.removeprefix(TORCH).removeprefix(SCALAR)
    tensor = isinstance(dtype, str) and dtype.startswith(TORCH)
    found = _torch_dtype(name) if tensor else _dtype(name or dtype)
    if name in NAMED:
        fits = array.dtype.str == NAMED[name][1]
    else:
        fits = array.dtype == "u1" and array.ndim > 0 and array.shape[-1] == found.itemsize > 0
    if not fits:
        raise ValueError(f"{dtype}: stored as {array.dtype} of shape {array.shape}")
    if tensor:
        import torch

        array = torch.from_numpy(array)
    array = array.view(found) if name in NAMED else array.view(found)[..., 0]
    return array[()] if name and dtype.startswith(SCALAR) else array


def _torch_dtype(name: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError('the file holds tensors of PyTorch: pip install "nadam[torch]"') from error

    dtype = vars(torch).get(name)
    # A quantized dtype on a tensor that is not: PyTorch would crash.
    if not isinstance(dtype, torch.dtype) or name.startswith("q"):
        raise ValueError(f"torch.{name}: no dtype of a tensor")
    return dtype


def _dtype(name: Any) -> np.dtype[Any]:
    """A dtype from its name in NumPy or ml_dtypes, or from NumPy's description, in which JSON has lists for tuples."""

    def of_fields(fields: Any) -> Any:
        if not isinstance(fields, list):
            return fields
        return [
            (tuple(name) if isinstance(name, list) else name, of_fields(inner), *map(tuple, shape))
            for name, inner, *shape in fields
        ]

    if isinstance(name, list) or name[:1] in "<>|=":
        dtype: np.dtype[Any] = npy.descr_to_dtype(of_fields(name))
        if dtype.hasobject:
            raise ValueError(f"{dtype}: objects")
        return dtype
    if name in PLAIN:
        return PLAIN[name]
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(f"the file holds {name}: pip install ml_dtypes") from error

    found = vars(ml_dtypes).get(name)
    if not isinstance(found, type) or not issubclass(found, np.generic):
        raise ValueError(f"{name}: no dtype")
    extension: np.dtype[Any] = np.dtype(found)
    return extension
