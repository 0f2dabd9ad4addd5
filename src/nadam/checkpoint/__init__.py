"""Checkpoint files of any host's state: written whole or not at all, refused when damaged, run no code when read."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from nadam.checkpoint import tree
from nadam.checkpoint.atomic import replacing
from nadam.checkpoint.hosts import exported, restored
from nadam.core.portable import Rename, Transpose

# A file: this line, the SHA-256 of the rest, then an .npz archive of the arrays and, in JSON, what they are in.
MAGIC = b"nadam checkpoint 1\n"
DIGEST = hashlib.sha256().digest_size
BLOCK = 1 << 20
TREE = "tree"


def save(path: str | os.PathLike[str], state: Any, params: Any = None) -> None:
    """Write a state to a file. Whatever happens meanwhile, the file is the old one or the new one, whole.

    A file that is there is replaced and keeps its mode; of a symbolic link, what it points to. What processes that were
    killed while they saved to the same path have left is removed, where the system can lock files.

    Args:
        path: Of the file.
        state: An optimizer of any host, whose state any other host can load: `nadam.Nadam`, `nadam.torch.NAdam` and
            `NAdamW`, `nadam.keras.Nadam`, loss scaling around them, or a state of `nadam.jax`, for `fused` the pair
            (fused, state); or the frameworks' own Nadam, Adam and AdamW. Or what ``state_dict`` gave, or any nested
            dicts, lists and tuples of None, bools, ints, floats, strings, arrays and scalars of NumPy, tensors of
            PyTorch and arrays of JAX. Keys may be tuples as well. All comes back equal and of its type, but other
            mappings as dicts, tensors on the CPU and without their graph, and arrays of JAX as NumPy's. Subclasses
            (named tuples, masked arrays), sparse and quantized tensors, JAX's typed keys and other objects are refused.
        params: What the optimizer trains, to be saved with it, and to give the names: a model of PyTorch, with its
            buffers, or of Keras; arrays, tensors or variables by name; a tree of JAX. None for the state alone.

    Raises:
        TypeError: Something else in the state; it says where. Nothing has been written, also by the next.
        ValueError: Nested more than 100 deep, or an integer too long for Python to print.
        OSError: The file cannot be written. One that was there is left as it was.

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
    text = json.dumps(tree.encode(exported(state, params), arrays))
    with replacing(path) as file:
        file.write(MAGIC + bytes(DIGEST))
        np.savez(file, **{TREE: np.array(text)}, **arrays)  # type: ignore[arg-type]
        digest = _digest(file)
        file.seek(len(MAGIC))
        file.write(digest)


def load(
    path: str | os.PathLike[str],
    optimizer: Any = None,
    params: Any = None,
    *,
    rename: Rename | None = None,
    transpose: Transpose | None = None,
) -> Any:
    """Read a state from a file. A crafted one runs no code and takes no more memory than in proportion to its size.

    Args:
        path: Of a file that `save` wrote.
        optimizer: What is to go on from it, of whatever host, with parameters of the same names. It keeps its own
            settings but for a learning rate that is a number. None to get the state itself. For JAX, a state like
            the one that is wanted, or (fused, state).
        params: What it trains, to get the values that were saved; as of `save`.
        rename: From names in the file to those here, as a dict, in which others are left out, or a function.
        transpose: Names, here, of arrays whose axes are reversed, as of a Dense layer's kernel for the weight of a
            Linear one; or a dict of permutations by name.

    Returns:
        What ``load_state_dict`` takes, where a dict was saved. With an optimizer that one, which has been changed; with
        params as well, a pair of both. Of JAX new ones, since nothing there is changed.

    Raises:
        ValueError: The file is no checkpoint, cut off, damaged, or not as `save` writes it; or the state does not fit
            the optimizer: other names, shapes, averages, an unfinished window of accumulation. Nothing has changed.
        OSError: The file cannot be read.
        ImportError: It holds tensors of PyTorch, or dtypes of ml_dtypes, which is not installed.

    Warns:
        UserWarning: Settings that change a step differ between the file and the optimizer; averages are left out.

    Example:
        >>> import nadam, tempfile
        >>> weights, optimizer = {"w": np.ones(3)}, nadam.Nadam()
        >>> optimizer.apply({"w": np.ones(3)}, weights)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/run.nadam", optimizer, weights)
        ...     resumed, params = load(folder + "/run.nadam", nadam.Nadam(), {"w": np.zeros(3)})
        >>> resumed.iterations, bool((params["w"] == weights["w"]).all())
        (1, True)
    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{os.fspath(path)}: not a nadam checkpoint, or its beginning is damaged")
        if file.read(DIGEST) != _digest(file):
            raise ValueError(f"{os.fspath(path)}: the file is damaged or cut off: its checksum is another")
        try:
            state: Any = _state(file)
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # the digest is right, so somebody made it so
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek to nowhere gives
                raise
            raise ValueError(f"{os.fspath(path)}: not as nadam writes it: {error!r}") from error
    return state if optimizer is None else restored(state, optimizer, params, rename, transpose)


def _digest(file: BinaryIO) -> bytes:
    file.seek(len(MAGIC) + DIGEST)
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()


def _state(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("the arrays are longer than the file")
        arrays = {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    if len(arrays) < len(members):
        raise ValueError("two arrays of one name")
    state = tree.decode(json.loads(arrays.pop(TREE).item()), arrays)
    if arrays:
        raise ValueError(f"arrays that nothing refers to: {sorted(arrays)[:3]}")
    return state


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """An array whose header is that of the bytes that follow it: NumPy makes room for what a header says."""
    with archive.open(member) as entry:
        # Versions 2 and 3 differ in the encoding of the names of a structured dtype's fields.
        read = npy.read_array_header_1_0 if npy.read_magic(entry) == (1, 0) else npy.read_array_header_2_0
        try:
            shape, _, dtype = read(entry)
        except MemoryError as error:  # what Python's parser says of deep nesting
            raise ValueError(f"{member.filename}: no header of an array") from error
        held = member.file_size - entry.tell()
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{member.filename}: shape {shape} and dtype {dtype}, in {held} bytes")
    with archive.open(member) as entry:
        return npy.read_array(entry, allow_pickle=False)
