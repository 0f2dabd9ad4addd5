"""Checkpoint files of any host's state: written whole or not at all, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nadam.checkpoint.atomic import replacing

# A file: this line, the SHA-256 of the rest, then an .npz archive.
MAGIC = b"nadam checkpoint 1\n"
BLOCK = 1 << 20
BFLOAT16 = "bfloat16"


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to a file. Whatever happens meanwhile, the file is the old one or the new one, whole.

    A file that is there is replaced and keeps its mode; of a symbolic link, what it points to. What processes that were
    killed while they saved to the same path have left is removed, where the system can lock files.

    Args:
        path: Of the file.
        state: What ``state_dict`` gave, or any dict of that kind: nested dicts, lists and tuples of arrays, tensors of
            PyTorch, arrays of JAX (which come back as NumPy's), numbers and strings.

    Raises:
        TypeError: Something else in the state. A file that was there is left as it was, also by the next.
        OSError: The file cannot be written.

    Example:
        >>> import nadam, tempfile
        >>> optimizer = nadam.Nadam()
        >>> optimizer.apply([np.ones(3)], [np.zeros(3)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/run.nadam", optimizer.state_dict())
        ...     load(folder + "/run.nadam")["iteration"]
        1
    """
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps(_without_arrays(state, arrays))
    with replacing(path) as file:
        file.write(MAGIC + bytes(hashlib.sha256().digest_size))
        start = file.tell()
        np.savez(file, **{_TREE: np.array(text), **arrays})  # type: ignore[arg-type]
        digest = _digest(file, start)
        file.seek(len(MAGIC))
        file.write(digest)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state from a file.

    Args:
        path: Of a file that `save` wrote.

    Returns:
        The state, for ``load_state_dict``.

    Raises:
        ValueError: The file is no checkpoint, cut off or damaged.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(len(MAGIC))
        if head != MAGIC:
            raise ValueError(f"{os.fspath(path)}: not a nadam checkpoint, or its beginning is damaged")
        digest = file.read(hashlib.sha256().digest_size)
        start = file.tell()
        if _digest(file, start) != digest:
            raise ValueError(f"{os.fspath(path)}: the file is damaged or cut off: its checksum is another")
        file.seek(start)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    state: dict[str, Any] = _with_arrays(json.loads(str(arrays[_TREE])), arrays)
    return state


def _digest(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()


# In the JSON text an array is its name in the archive and its dtype, marked by a key that no other dict has alone; so
# are a dict whose keys are not all strings, and a tuple.
_ARRAY, _ITEMS, _TUPLE = "__array__", "__items__", "__tuple__"
_TREE, _TORCH = "tree", "torch."


def _without_arrays(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _without_arrays(item, arrays) for key, item in value.items()}
        return {_ITEMS: [[key, _without_arrays(item, arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_without_arrays(item, arrays) for item in value]
        return items if isinstance(value, list) else {_TUPLE: items}
    dtype = ""
    if type(value).__module__.partition(".")[0] in ("jax", "jaxlib") and hasattr(value, "dtype"):
        value = np.asarray(value)
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numpy"):
        dtype, value = _TORCH + str(value.dtype).removeprefix(_TORCH), _plain(value)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"an array of {value.dtype} cannot be saved")
        name = f"array{len(arrays)}"
        # NumPy's format has no bfloat16: its bits are stored, and its name.
        arrays[name] = value.view(np.uint16) if value.dtype.name == BFLOAT16 else value
        return {_ARRAY: [name, dtype or value.dtype.name]}
    return value


def _plain(tensor: Any) -> NDArray[Any]:
    """A tensor of PyTorch as an array, of integers for bfloat16."""
    import torch

    if hasattr(tensor, "to_local"):
        raise TypeError("a tensor that is split over processes cannot be saved; torch.distributed.checkpoint can")
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    array: NDArray[Any] = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def _tensor(array: NDArray[Any], dtype: str) -> Any:
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == _TORCH + BFLOAT16 else tensor


def _bfloat16() -> Any:
    import ml_dtypes  # only where a file holds such an array

    return ml_dtypes.bfloat16


def _with_arrays(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_ARRAY}:
        name, dtype = value[_ARRAY]
        if dtype.startswith(_TORCH):
            return _tensor(arrays[name], dtype)
        return arrays[name].view(_bfloat16()) if dtype == BFLOAT16 else arrays[name]
    if set(value) == {_TUPLE}:
        return tuple(_with_arrays(item, arrays) for item in value[_TUPLE])
    pairs = value[_ITEMS] if set(value) == {_ITEMS} else value.items()
    return {key: _with_arrays(item, arrays) for key, item in pairs}
