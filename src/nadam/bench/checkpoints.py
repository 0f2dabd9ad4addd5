"""Saving and loading a state, against safetensors and NumPy's .npz: ``python -m nadam.bench.checkpoints``."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nadam import checkpoint

Work = TypeVar("Work")
SHAPES = {
    "large": [(2048, 2048)] * 60,  # 1.0 GB
    "small": [(32, 32)] * 3000,  # 12 MB
}


@contextmanager
def no_fsync() -> Iterator[None]:
    """Without waiting for the disk, as the others save."""
    fsync, os.fsync = os.fsync, lambda fd: None
    try:
        yield
    finally:
        os.fsync = fsync


def read_all(arrays: dict[str, NDArray[Any]]) -> None:
    """Sum a state, so that a reader that maps a file into memory has read it too."""
    for array in arrays.values():
        array.sum()


def seconds(work: Callable[[], Any]) -> float:
    """Of one call; what it returns is freed after the clock has stopped."""
    start = time.perf_counter()
    result = work()
    stop = time.perf_counter()
    del result
    return stop - start


def compare(folder: Path, shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, round by round; the first round is not counted.

    All rounds of saves come first, then all of loads, of files that are in the page cache. Each round begins with
    another piece of work, and every save is into a new file, the last one removed before the clock starts.
    """
    from safetensors.numpy import load_file, save_file

    draw = np.random.default_rng(0)
    state = {f"layer{i}": draw.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(shapes)}
    ours, theirs, npz = folder / "state.nadam", folder / "state.safetensors", folder / "state.npz"

    def save_without_fsync() -> None:
        with no_fsync():
            checkpoint.save(ours, state)

    saves: dict[str, tuple[Callable[[], Any], Path]] = {
        "save, nadam": (save_without_fsync, ours),
        "save, nadam, with fsync": (lambda: checkpoint.save(ours, state), ours),
        "save, safetensors": (lambda: save_file(state, theirs), theirs),
        "save, npz": (lambda: np.savez(npz, **state), npz),  # type: ignore[arg-type]
    }
    # load_file of safetensors.numpy copies what it maps into new arrays, as ours does, so "load" is the fair figure;
    # the sums show that nothing is left to be read later. Its load_file for PyTorch maps, and reads when it is used.
    loads: dict[str, Callable[[], Any]] = {
        "load, nadam": lambda: checkpoint.load(ours),
        "load, safetensors": lambda: load_file(theirs),
        "load, npz": lambda: dict(np.load(npz)),
        "load and sum, nadam": lambda: read_all(checkpoint.load(ours)),
        "load and sum, safetensors": lambda: read_all(load_file(theirs)),
    }
    seen: dict[str, list[float]] = {name: [] for name in [*saves, *loads]}
    for number in range(rounds + 1):
        for name, (save, path) in rotated(saves, number):
            path.unlink(missing_ok=True)
            seen[name].append(seconds(save))
    for number in range(rounds + 1):
        for name, load in rotated(loads, number):
            seen[name].append(seconds(load))
    return {name: times[1:] for name, times in seen.items()}


def rotated(works: dict[str, Work], number: int) -> list[tuple[str, Work]]:
    """The items, beginning with another one each time."""
    items = list(works.items())
    first = number % len(items)
    return items[first:] + items[:first]


def main() -> None:
    """Print medians and speeds over that of safetensors: the median over the rounds of its time over ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="where to write; /dev/shm and the current one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", choices=SHAPES, help="only these")
    options = parser.parse_args()
    for parent in options.folders or [Path("/dev/shm"), Path()]:
        for name in [options.shapes] if options.shapes else SHAPES:
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                seen = compare(Path(folder), SHAPES[name], options.rounds)
            print(f"\n{len(SHAPES[name])} tensors of {SHAPES[name][0]}, float32, in {parent.resolve()}")
            for work, times in seen.items():
                other = seen[work.partition(",")[0] + ", safetensors"]
                speed = median(b / a for a, b in zip(times, other, strict=True))
                print(f"  {work:28}{1000 * median(times):9.1f} ms   speed over safetensors {speed:5.2f}")


if __name__ == "__main__":
    main()
