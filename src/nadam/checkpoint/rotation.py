"""Folders of numbered checkpoint files, of which the newest whole ones are kept and the newest whole one is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from nadam.checkpoint.atomic import fcntl

NUMBERED = re.compile(r"([0-9]{6,})\.nadam")
Found = TypeVar("Found")


def check_keep(keep: int) -> None:
    """Refuse what is no number of files."""
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep={keep!r}: expected an integer, keep >= 1, or None for a single file")


def numbered(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, the newest first."""
    found = {path: match for path in folder.iterdir() if (match := NUMBERED.fullmatch(path.name))}
    return sorted(found, key=lambda path: int(found[path][1]), reverse=True)


@contextmanager
def next_file(folder: Path, keep: int, check: Callable[[Path], object]) -> Iterator[Path]:
    """The path of the next file. After it has been written, files older than the newest whole ones are removed.

    Args:
        folder: Made if it is not there; no other process rotates it meanwhile, where the system can lock folders.
        keep: How many whole files stay.
        check: Raises an error for a file that is not whole: one that does not count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        newest = next((int(path.stem) for path in numbered(folder)), 0)
        yield folder / f"{newest + 1:06d}.nadam"
        whole = 0
        for path in numbered(folder):
            if whole == keep:
                path.unlink(missing_ok=True)
                continue
            with suppress(ValueError, OSError):
                check(path)
                whole += 1


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems that have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # and not just closed: a process that was forked meanwhile has it too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def newest_whole(folder: Path, read: Callable[[Path], Found]) -> tuple[Found, list[str]]:
    """What a function reads of the newest file for which it raises no error; and the errors of newer ones.

    Raises:
        ValueError: There is none; it says why of each.
        FileNotFoundError: No file has such a name.
    """
    skipped: list[str] = []
    for path in numbered(folder):
        try:
            return read(path), skipped
        except (ValueError, OSError) as error:
            skipped.append(str(error))
    if not skipped:
        raise FileNotFoundError(f"{folder}: no checkpoint file in it, as 000001.nadam is one")
    raise ValueError(f"{folder}: no whole checkpoint: " + "; ".join(skipped))
