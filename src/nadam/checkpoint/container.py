"""The file: safetensors, with a state's JSON, a user's metadata and digests of the header and of every tensor in it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from json.encoder import encode_basestring_ascii
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128, xxh3_128_hexdigest

from nadam.checkpoint import tree

VERSION = "1"
# The first bytes of every header. The digest of the header follows; it is that of the header with zeros in its place.
BEGINNING = b'{"__metadata__":{"header_xxh3_128":"'
NO_DIGEST = "0" * 32
ALIGNMENT = 64
LONGEST_HEADER = 100_000_000  # that readers of safetensors take
MOST_DIMENSIONS = 64  # of NumPy's arrays
# Read at once: many small tensors (6 ms for 3,000 of 4 KB, 9 one by one), and of a large one what is in the processor's
# cache still when the digest takes it.
CHUNK = 1 << 20
STORAGE = {kind: np.dtype(storage) for kind, storage in tree.NAMED.values()}
# What Python makes of JSON can be 30 times as large. With so many bytes of header for each of these characters (filled
# up by spaces), reading a file takes no more than ten times its size.
ROOM = {ord("["): 8, ord("{"): 8, ord(":"): 22, ord(","): 8}


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: Its path in the state, ``state/dense.weight/exp_avg``.
        shape: Of what is stored; a dtype that safetensors does not name is stored as bytes, in a last axis.
        kind: Its dtype in safetensors, ``F32``.
        start: First of its bytes, counted from the end of the header.
        stop: Behind the last one.
        digest: XXH3, 128 bits, in hexadecimal.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors, its digest checked and every size in agreement with the file's.

    Attributes:
        state: JSON, for `tree.decode`.
        metadata: The user's.
        tensors: In the order of their bytes, without gaps.
        start: Where in the file the tensors begin.
    """

    state: str
    metadata: dict[str, Any]
    tensors: list[Tensor] = field(repr=False)
    start: int


def encode(state: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> tuple[bytes, list[NDArray[Any]]]:
    """The header of a file, whole, and the arrays that follow it."""
    stored: dict[str, tree.Stored] = {}
    text = json.dumps(tree.encode(state, stored))
    # Each begins at a multiple of its items' size, since no shorter power of two comes before it.
    arrays = dict(sorted(stored.items(), key=lambda item: _alignment(item[1]), reverse=True))
    digests = "".join(xxh3_128_hexdigest(array.data) for array, *_ in arrays.values())
    about = {
        "header_xxh3_128": NO_DIGEST,
        "nadam_checkpoint": VERSION,
        "state": text,
        "metadata": json.dumps(_checked(metadata)),
        "xxh3_128": digests,
    }
    parts, stop = ['{"__metadata__":' + json.dumps(about, separators=(",", ":"))], 0
    for name, (array, kind, _) in arrays.items():  # half the time of a dict of dicts for json.dumps
        start, stop = stop, stop + array.nbytes
        where = f'"shape":{list(array.shape)},"data_offsets":[{start},{stop}]'
        parts.append(f'{encode_basestring_ascii(name)}:{{"dtype":"{kind}",{where}}}')
    content = (",".join(parts) + "}").encode()
    length = max(len(content), _room(content))
    content = content.ljust(length + -(8 + length) % ALIGNMENT)
    if len(content) > LONGEST_HEADER:
        raise ValueError(f"state: a header of {len(content)} bytes, where safetensors takes {LONGEST_HEADER}")
    return _signed(content), [array for array, *_ in arrays.values()]


def _alignment(stored: tree.Stored) -> int:
    size = stored.array.itemsize if stored.kind != "U8" or not stored.array.ndim else stored.array.shape[-1]
    return size & -size


def _checked(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    arrays: dict[str, tree.Stored] = {}
    encoded = tree.encode({} if metadata is None else metadata, arrays, ("metadata",))
    if arrays or not isinstance(encoded, dict) or encoded != (metadata or {}):
        raise TypeError(f"metadata={metadata!r:.99}: expected what JSON has: no arrays, tuples or keys but strings")
    return encoded


def _room(header: bytes) -> int:
    content = np.frombuffer(header, np.uint8)  # a fifth of the time of bytes.count
    return sum(int(np.count_nonzero(content == character)) * size for character, size in ROOM.items())


def _digest(header: bytes) -> str:
    digest = xxh3_128(BEGINNING + NO_DIGEST.encode())
    digest.update(memoryview(header)[len(BEGINNING) + len(NO_DIGEST) :])
    return digest.hexdigest()


def _signed(header: bytes) -> bytes:
    """A header with its digest in place."""
    return BEGINNING + _digest(header).encode() + header[len(BEGINNING) + len(NO_DIGEST) :]


def write(file: BinaryIO, header: bytes, arrays: list[NDArray[Any]]) -> None:
    """Write what `encode` gave."""
    file.write(len(header).to_bytes(8, "little") + header)
    file.writelines(arrays)  # type: ignore[arg-type]


def read_header(file: FileIO) -> Header:
    """The header of a file, which is then at the first byte of its tensors.

    Raises:
        ValueError: The file is no checkpoint, cut off, damaged, or not as `encode` writes it.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not len(BEGINNING) + len(NO_DIGEST) < length <= min(size - 8, LONGEST_HEADER):
        raise ValueError(f"not a nadam checkpoint, damaged or cut off: {size} bytes, of which a header of {length}")
    content = file.read(length)
    if not content.startswith(BEGINNING):
        raise ValueError("not a nadam checkpoint, or damaged: no header of one")
    found, expected = content[len(BEGINNING) :][: len(NO_DIGEST)], _digest(content)
    if found != expected.encode():
        raise ValueError(f"the header is damaged: expected XXH3 {found.decode(errors='replace')}, found {expected}")
    with crafted():
        header = _parsed(content, 8 + length)
    stop = header.start + (header.tensors[-1].stop if header.tensors else 0)
    if stop != size:
        raise ValueError(f"damaged or cut off: the tensors end at byte {stop}, the file at {size}")
    return header


@contextmanager
def crafted() -> Iterator[None]:
    """Errors are ValueErrors: digests are right, so somebody made the file so."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"not as nadam writes it: {reason:.500}") from error


def _parsed(content: bytes, start: int) -> Header:
    if len(content) < _room(content):
        raise ValueError(f"a header of {len(content)} bytes, where its JSON needs {_room(content)}")
    header = _json(content.decode("ascii"))
    about = header.pop("__metadata__")
    for key, text in about.items():
        if not isinstance(text, str) or not text.isascii():
            raise ValueError(f"__metadata__: {key}: no text, or not in ASCII")
    if about["nadam_checkpoint"] != VERSION:
        raise ValueError(f"version {about['nadam_checkpoint'][:9]!r}, where this nadam reads {VERSION!r}")
    digests, each = about["xxh3_128"], len(NO_DIGEST)
    if len(digests) != each * len(header):
        raise ValueError(f"digests of {len(digests)} characters, expected {each} for each of {len(header)} tensors")
    tensors: list[Tensor] = []
    for i, (name, entry) in enumerate(header.items()):
        tensor = _tensor(name, entry, digests[i * each : (i + 1) * each])
        if tensor.start != (tensors[-1].stop if tensors else 0):
            raise ValueError(f"tensor {name!r:.99} at byte {tensor.start}: not where the last one ends")
        tensors.append(tensor)
    metadata = _json(about["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("metadata that is no dict")
    return Header(about["state"], metadata, tensors, start)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=tree.distinct)


def _tensor(name: str, entry: Any, digest: str) -> Tensor:
    kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in STORAGE:
        raise ValueError(f"tensor {name!r:.99}: dtype {kind!r:.30}, expected one of {', '.join(STORAGE)}")
    size = _size(kind, *shape)
    if size is None or len(entry) != 3 or type(start) is not int or type(stop) is not int:
        raise ValueError(
            f"tensor {name!r:.99}: shape {shape!r:.99}, bytes {start!r:.30} to {stop!r:.30}, {entry!r:.30}"
        )
    if size != stop - start:
        raise ValueError(f"tensor {name!r:.99}: {kind} of shape {shape} has {size} bytes, not {stop - start}")
    return Tensor(name, tuple(shape), kind, start, stop, digest)


@lru_cache(1000, typed=True)  # which tells True from 1; a state has few shapes and many tensors
def _size(kind: str, *shape: Any) -> int | None:
    """The bytes of a shape; None if it is none."""
    if len(shape) > MOST_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        return None
    return int(math.prod(shape) * STORAGE[kind].itemsize)


def read_tensors(file: FileIO, tensors: list[Tensor], *, keep: bool) -> Iterator[tuple[Tensor, NDArray[Any], str]]:
    """The tensors that follow a header, each with what is wrong with it, or nothing.

    Args:
        file: At the first byte of the tensors; without a buffer, through which a gigabyte took three times as long.
        tensors: Of the header.
        keep: Whether each has memory of its own, in one allocation for all; otherwise each has that of the last.
    """
    size = tensors[-1].stop if tensors and keep else max((tensor.stop - tensor.start for tensor in tensors), default=0)
    memory: NDArray[np.uint8] = np.empty(size + ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNMENT :]
    view, read = memory.data, 0
    for tensor in tensors:
        start = at = tensor.start if keep else 0
        stop = start + tensor.stop - tensor.start
        if not keep:
            read, size = 0, stop
        if stop <= read:  # with others before it, all in one call
            at, found = stop, xxh3_128_hexdigest(view[start:stop])
        else:
            digest = xxh3_128()
            while at < stop:
                if at == read:
                    read += file.readinto(view[read : min(size, read + CHUNK)])
                    if at == read:
                        break
                digest.update(view[at : min(stop, read)])
                at = min(stop, read)
            found = digest.hexdigest()
        problem = ""
        if at < stop:
            problem = f"cut off: expected {stop - start} bytes, found {at - start}"
        elif found != tensor.digest:
            problem = f"damaged: expected XXH3 {tensor.digest}, found {found}"
        yield tensor, np.ndarray(tensor.shape, STORAGE[tensor.kind], memory, start), problem
