"""Files that are replaced atomically: whatever happens meanwhile, the old one or the new one is there, whole."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any = None
with suppress(ImportError):  # on Windows
    import fcntl

BUFFER = 1 << 20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write and read, under another name, which then takes the place of the one at a path.

    A symbolic link stays, and what it points to is replaced. A file that is there keeps its mode; a new one has that of
    the umask. What killed processes left of the same target is removed, but nothing that another is writing.
    """
    target = Path(os.path.realpath(Path(path)))
    mode = None
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(f"{os.fspath(path)}: not a regular file")
    _remove_leftovers(target)
    temporary, handle = _create(target, mode)
    try:
        with os.fdopen(handle, "w+b", BUFFER) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                with suppress(OSError):  # of file systems that have no modes
                    os.chmod(temporary, stat.S_IMODE(mode))
            if fcntl is None:  # Windows replaces no open file; elsewhere it is locked until it is in its place
                file.close()
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt came when the file was in its place already
            os.unlink(temporary)
        raise


def _create(target: Path, mode: int | None) -> tuple[str, int]:
    """A new file beside a target, locked, with no rights that the target does not give: its name and descriptor."""
    while True:
        temporary = str(target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp")
        rights = 0o666 if mode is None else stat.S_IMODE(mode) | stat.S_IRUSR  # which _remove_leftovers needs
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), rights)
        if fcntl is not None:
            with suppress(OSError):  # of file systems that have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return temporary, handle
        os.close(handle)  # another save took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove files of `_create` whose process is gone, and with it the lock. Without locks, none are."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):  # a folder that cannot be listed
        for name in filter(pattern.fullmatch, os.listdir(target.parent)):
            with suppress(OSError):  # locked, or gone, or another user's
                handle = os.open(target.parent / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    os.unlink(target.parent / name)
                finally:
                    os.close(handle)
