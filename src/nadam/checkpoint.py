"""Training state to carry elsewhere: what is in it, what is refused, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nadam.core.clock import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED

if TYPE_CHECKING:
    from nadam.numpy.parameters import Parameters

OPTIMIZER = "nadam"
FORMAT = 1
# A file: this line, the SHA-256 of the rest, then an .npz archive.
MAGIC = b"nadam checkpoint 1\n"
BLOCK = 1 << 20
BFLOAT16 = "bfloat16"


def state_dict(parameters: Parameters, learning_rate: float | None) -> dict[str, Any]:
    """The state of an optimizer for NumPy arrays, copied.

    Returns:
        ``optimizer``, ``format``, ``iteration`` (calls), ``momentum_product``, ``skipped_steps``, ``learning_rate``
        (None where it is computed), ``state`` (by parameter: ``exp_avg``, ``exp_avg_sq``, and ``ema`` and
        ``accumulator`` where there are such), ``accumulated`` (names of the parameters whose accumulator holds a
        gradient), and ``checksums`` of the arrays.
    """
    clock = parameters.clock
    state = {entry.name: {k: v.copy() for k, v in entry.state.items()} for entry in parameters.entries}
    return {
        "optimizer": OPTIMIZER,
        "format": FORMAT,
        "iteration": clock.calls,
        "momentum_product": clock.momentum_product,
        "skipped_steps": clock.skipped,
        "learning_rate": learning_rate,
        "accumulated": [entry.name for entry, seen in zip(parameters.entries, clock.seen, strict=True) if seen],
        "state": state,
        "checksums": {name: {k: _checksum(v) for k, v in arrays.items()} for name, arrays in state.items()},
    }


def load_state_dict(parameters: Parameters, state: Mapping[str, Any]) -> float | None:
    """Put a state into an optimizer for NumPy arrays, all of it or, if anything is wrong with it, nothing.

    Returns:
        The learning rate to go on with; None where the state has none.

    Raises:
        ValueError: What is wrong, by name.
    """
    if not isinstance(state, Mapping) or state.get("optimizer") != OPTIMIZER:
        found = state.get("optimizer") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state: optimizer={found!r}: expected {OPTIMIZER!r}")
    if state.get("format") != FORMAT:
        raise ValueError(f"state: format={state.get('format')!r}: expected {FORMAT}")
    calls, skipped = _count(state, "iteration"), _count(state, "skipped_steps")
    product = _real(state, "momentum_product", 0.0, 1.0)
    lr = None if state.get("learning_rate") is None else _real(state, "learning_rate", 0.0, math.inf)

    entries = {entry.name: entry for entry in parameters.entries}
    arrays, accumulated = state.get("state"), state.get("accumulated", [])
    if not isinstance(arrays, Mapping):
        raise ValueError("state: 'state' is missing")
    _same_names("parameters", arrays, entries)
    accumulating = {name for name, entry in entries.items() if entry.accumulator is not None}
    if set(accumulated) - accumulating:
        raise ValueError(f"accumulated: {sorted(set(accumulated) - accumulating)}: no parameters with an accumulator")
    checksums = state.get("checksums", {})
    for name, entry in entries.items():
        _same_names(f"slots of {name!r}", arrays[name], entry.state)
        for slot, mine in entry.state.items():
            checksum = checksums.get(name, {}).get(slot)
            _check_array(f"{name}.{slot}", np.asarray(arrays[name][slot]), mine, checksum, slot == "exp_avg_sq")

    for name, entry in entries.items():
        for slot, mine in entry.state.items():
            mine[...] = arrays[name][slot]
    now = parameters.clock.now
    now[CALLS], now[MOMENTUM_PRODUCT], now[SKIPPED] = calls, product, skipped
    now[SEEN:] = [name in set(accumulated) for name in entries]
    return lr


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to a file. Whatever happens meanwhile, the file is the old one or the new one, whole.

    Args:
        path: Of the file; a file that is there is replaced.
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
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            file.write(MAGIC + bytes(hashlib.sha256().digest_size))
            start = file.tell()
            np.savez(file, **{_TREE: np.array(text), **arrays})  # type: ignore[arg-type]
            digest = _digest(file, start)
            file.seek(len(MAGIC))
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt came when the file was in its place already
            os.unlink(temporary)
        raise


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


def _checksum(array: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes in the order of its axes, whatever its memory order."""
    checksum = 0
    flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
    raw = flat.view(np.uint8)
    for begin in range(0, len(raw), BLOCK):
        checksum = zlib.crc32(raw[begin : begin + BLOCK].data, checksum)
    return checksum


def _check_array(name: str, given: NDArray[Any], mine: NDArray[Any], checksum: int | None, squares: bool) -> None:
    if given.shape != mine.shape:
        raise ValueError(f"{name}: shape {given.shape}, expected {mine.shape}")
    if given.dtype != mine.dtype:
        raise ValueError(f"{name}: dtype {given.dtype}, expected {mine.dtype}")
    if not np.isfinite(given).all():
        raise ValueError(f"{name}: not all of its values are finite")
    if squares and given.size and min(given.real.min(), given.imag.min()) < 0:
        raise ValueError(f"{name}: a negative value in an average of squares")
    if checksum is not None and _checksum(given) != checksum:
        raise ValueError(f"{name}: its values are not those that were saved: the checksum is another")


def _same_names(what: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}: expected a dict, got {type(given).__name__}")
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        parts = [f"missing {missing}" if missing else "", f"not expected {unknown}" if unknown else ""]
        raise ValueError(f"{what}: {', '.join(filter(None, parts))}")


def _count(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: expected an integer, {name} >= 0")
    return value


def _real(state: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name}={value!r}: expected {low:g} <= {name} <= {high:g}, finite")
    return float(value)
