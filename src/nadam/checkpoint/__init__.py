"""Checkpoint files of any host's state: written whole or not at all, refused when damaged, run no code when read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nadam.checkpoint import background, container, rotation, tree
from nadam.checkpoint.atomic import replacing
from nadam.checkpoint.background import PendingSave
from nadam.checkpoint.hosts import exported, restored
from nadam.core.portable import Rename, Transpose

__all__ = ["Inspection", "PendingSave", "TensorReport", "inspect", "load", "save", "save_async"]


def save(
    path: str | os.PathLike[str],
    state: Any,
    params: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> None:
    """Write a state to a file. Whatever happens meanwhile, the file is the old one or the new one, whole.

    The file is one of safetensors, which its readers open too; arrays have their paths as names there. It has a digest
    (XXH3, 128 bits) of its header and of every tensor, against accidents, not against forgery.

    A file that is there is replaced and keeps its mode; of a symbolic link, what it points to. What processes that were
    killed while they saved to the same path have left is removed, where the system can lock files. A save to the same
    path that `save_async` began is waited for. Arrays are written from where they lie: no step may run on another
    thread meanwhile.

    Args:
        path: Of the file; with ``keep``, of a folder, which is made if it is not there.
        state: An optimizer of any host, whose state any other host can load: `nadam.Nadam`, `nadam.torch.NAdam` and
            `NAdamW`, `nadam.keras.Nadam`, loss scaling around them, or a state of `nadam.jax`, for `fused` the pair
            (fused, state); or the frameworks' own Nadam, Adam and AdamW. Or what ``state_dict`` gave, or any nested
            dicts, lists and tuples of None, bools, ints, floats, strings, arrays and scalars of NumPy, tensors of
            PyTorch and arrays of JAX. Keys may be tuples as well. All comes back equal and of its type, but other
            mappings as dicts, tensors on the CPU and without their graph, and arrays of JAX as NumPy's. Subclasses
            (named tuples, masked arrays), sparse and quantized tensors, JAX's typed keys and other objects are refused.
        params: What the optimizer trains, to be saved with it, and to give the names: a model of PyTorch, with its
            buffers, or of Keras; arrays, tensors or variables by name; a tree of JAX. None for the state alone.
        metadata: What JSON has (and NaN and infinity), by strings; `inspect` shows it.
        keep: Write ``000001.nadam`` and so on, the next number each time, and then remove all that are older than the
            newest ``keep`` whole ones. Whole are here those with a whole header and the length that it says: `load`
            looks at every byte, and takes an older file where it must.

    Raises:
        TypeError: Something else in the state or metadata; it says where. Nothing has been written, also by the next.
        ValueError: Nested more than 100 deep, an integer too long for Python to print, or ``keep`` below 1.
        OSError: The file cannot be written. One that was there is left as it was. Or a save in the background has
            failed, and nobody has waited for it: then this one has not been begun.

    Example:
        >>> import nadam, numpy as np, tempfile
        >>> optimizer = nadam.Nadam()
        >>> optimizer.apply([np.ones(3)], [np.zeros(3)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/run.nadam", optimizer.state_dict())
        ...     load(folder + "/run.nadam")["iteration"]
        1
    """
    background.settle(path)
    _writer(path, exported(state, params), metadata, keep)()


def save_async(
    path: str | os.PathLike[str],
    state: Any,
    params: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> PendingSave:
    """Copy a state and save the copy in the background, while training goes on.

    The arguments are those of `save`, and what it raises of them is raised here. Errors of writing are raised by
    ``wait()`` of the result; if nobody waits, by the next `save`, `save_async` or `load`, before it does anything; if
    there is none, they are printed when Python exits, whose exit code is then 120 instead of 0. Python finishes saves
    before it exits. Only one goes to a path at a time: the next waits for it. A forked process has none of them.

    Returns:
        Has ``wait()`` and ``done``.

    Example:
        >>> import numpy as np, tempfile
        >>> weights = np.zeros(3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pending = save_async(folder + "/run.nadam", {"weights": weights})
        ...     weights += 1
        ...     pending.wait()
        ...     load(folder + "/run.nadam")["weights"]
        array([0., 0., 0.])
    """
    background.settle(path)
    return background.start(path, _writer(path, exported(state, params), metadata, keep, copy=True))


def _writer(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    keep: int | None,
    copy: bool = False,
) -> Callable[[], None]:
    """A function that writes a state to a path, when all has been checked that can be before."""
    if keep is not None:
        rotation.check_keep(keep)
    header, arrays = container.encode(state, metadata)
    if copy:
        arrays = [array.copy() for array in arrays]

    def write(target: str | os.PathLike[str] = path) -> None:
        with replacing(target) as file:
            container.write(file, header, arrays)

    def rotate() -> None:
        assert keep is not None
        with rotation.next_file(Path(path), keep, _check_header) as target:
            write(target)

    return write if keep is None else rotate


def load(
    path: str | os.PathLike[str],
    optimizer: Any = None,
    params: Any = None,
    *,
    rename: Rename | None = None,
    transpose: Transpose | None = None,
) -> Any:
    """Read a state from a file. A crafted one runs no code and takes no more memory than ten times its size.

    Args:
        path: Of a file that `save` wrote, or of a folder that it fills with ``keep``: then of the newest one that is
            whole, and a warning says which were skipped, and why.
        optimizer: What is to go on from it, of whatever host, with parameters of the same names. It keeps its own
            settings but for a learning rate that is a number. None to get the state itself. For JAX, a state like
            the one that is wanted, or (fused, state).
        params: What it trains, to get the values that were saved; as of `save`.
        rename: From names in the file to those here, a dict, and others keep theirs; or a function.
        transpose: Names, here, of arrays whose axes are reversed, as of a Dense layer's kernel for the weight of a
            Linear one; or a dict of permutations by name.

    Returns:
        What ``load_state_dict`` takes, where a dict was saved. With an optimizer that one, which has been changed; with
        params as well, a pair of both. Of JAX new ones, since nothing there is changed.
        The arrays of a dict share one block of memory, as large as the file, and can be written to.

    Raises:
        ValueError: The file is no checkpoint, cut off, damaged, or not as `save` writes it; it says which tensor, what
            was expected and what was found. In a folder, no file is whole. Or the state does not fit the optimizer:
            other names, shapes, averages, an unfinished window of accumulation. Nothing has changed then.
        OSError: The file cannot be read. Or a save in the background has failed, and nobody has waited for it.
        ImportError: It holds tensors of PyTorch, or dtypes of ml_dtypes, which is not installed.

    Warns:
        UserWarning: Settings that change a step differ between the file and the optimizer; averages are left out.

    Example:
        >>> import nadam, numpy, tempfile
        >>> weights, optimizer = {"w": numpy.ones(3)}, nadam.Nadam()
        >>> optimizer.apply({"w": numpy.ones(3)}, weights)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/run.nadam", optimizer, weights)
        ...     resumed, params = load(folder + "/run.nadam", nadam.Nadam(), {"w": numpy.zeros(3)})
        >>> resumed.iterations, bool((params["w"] == weights["w"]).all())
        (1, True)
    """
    background.settle(path)
    state, skipped = rotation.newest_whole(Path(path), _load) if os.path.isdir(path) else (_load(path), [])
    for reason in skipped:
        warnings.warn(f"skipped {reason}", stacklevel=2)
    return state if optimizer is None else restored(state, optimizer, params, rename, transpose)


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    arrays: dict[str, NDArray[Any]] = {}

    def restored(name: str, dtype: Any) -> Any:
        if name not in arrays:
            raise ValueError(f"tensor {name!r:.99} is missing, or two values refer to it")
        return tree.restore(arrays.pop(name), dtype)

    try:
        with open(path, "rb", buffering=0) as file:
            header = container.read_header(file)
            for tensor, array, problem in container.read_tensors(file, header.tensors, keep=True):
                if problem:
                    raise ValueError(f"tensor {tensor.name!r} is {problem}")
                arrays[tensor.name] = array
        with container.crafted():
            state = tree.decode(header.state, restored)
            if arrays or type(state) is not dict:
                raise ValueError(f"no state, or tensors that nothing refers to: {list(arrays)[:3]}")
            return state
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _check_header(path: str | os.PathLike[str]) -> None:
    with open(path, "rb", buffering=0) as file:
        container.read_header(file)


@dataclass(frozen=True)
class TensorReport:
    """What a file holds of one tensor.

    Attributes:
        name: Its path in the state, ``state/dense.weight/exp_avg``.
        dtype: Of safetensors, ``F32``; ``U8`` for those that it does not name, whose bytes are stored in a last axis.
        shape: Of what is stored.
        nbytes: Of it.
        problem: What is wrong: cut off, or a digest that was expected and the one that was found. Empty if nothing is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    problem: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint file holds, and whether it is whole.

    Attributes:
        path: Of the file.
        size: In bytes.
        problem: Why nothing can be read of it, or what is wrong besides tensors. Empty if nothing is.
        metadata: That of `save`.
        tensors: In the order in which the file has them.
    """

    path: str
    size: int
    problem: str
    metadata: dict[str, Any]
    tensors: tuple[TensorReport, ...]

    @property
    def whole(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problem and not any(tensor.problem for tensor in self.tensors)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read a checkpoint file, check every digest, and tell what it holds. It takes the memory of its largest tensor.

    Args:
        path: Of a file that `save` wrote, or of any other.

    Raises:
        OSError: The file cannot be read.

    Example:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/run.nadam", {"weights": np.zeros((2, 3))}, metadata={"epoch": 4})
        ...     found = inspect(folder + "/run.nadam")
        >>> found.whole, found.metadata, found.tensors[0].name, found.tensors[0].shape
        (True, {'epoch': 4}, 'weights', (2, 3))
    """
    metadata: dict[str, Any] = {}
    tensors: list[TensorReport] = []
    problem = ""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header = container.read_header(file)
            metadata = header.metadata
            for tensor, array, found in container.read_tensors(file, header.tensors, keep=False):
                tensors.append(TensorReport(tensor.name, tensor.kind, tensor.shape, array.nbytes, found))
        except ValueError as error:
            problem = str(error)
    return Inspection(os.fspath(path), size, problem, metadata, tuple(tensors))
