"""Files of machine code: read only where nobody but this user and root can have written it.

What is refused is done without, and a warning says so once. Only the folder and its files are looked at: whoever can
rename the folders above it can put others in its place.
"""

import hashlib
import os
import stat
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size
LARGEST = 1 << 24  # bytes of a file; a kernel has tens of thousands
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_warned = False


def directory() -> Path:
    """Where compiled kernels are kept: the environment's NADAM_CACHE_DIR, or ``nadam`` in the user's cache folder."""
    asked = os.environ.get("NADAM_CACHE_DIR")
    if asked:
        return Path(asked)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home())
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nadam"


def folder() -> Path | None:
    """That directory, made where it is not there yet; None where it cannot be used."""
    reason = None
    with suppress(Exception):
        found = directory()
        found.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = _distrusted(found.stat())
        if reason is None:
            return found
    if reason is not None:
        _warn(found, f"{reason}, so kernels are compiled in each process instead of being kept there")
    return None


def read(path: Path) -> bytes | None:
    """What `write` wrote to a file; None where there is none, it is damaged, or others can have written it."""
    with suppress(OSError), open(path, "rb", opener=_opened) as file:
        status = os.fstat(file.fileno())  # of what is read, whatever lies at the path by now
        reason = _distrusted(status)
        if not stat.S_ISREG(status.st_mode):
            reason = "not a regular file"
        if reason is not None:
            _warn(path, f"{reason}, so it is not loaded: the kernel is compiled anew")
            return None
        content = file.read(LARGEST + 1)
        if len(content) <= LARGEST and hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return content[_DIGEST:]
    return None


def write(path: Path, content: bytes) -> None:
    """Put a file there, whole or not at all."""
    with suppress(Exception):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)  # at once: another process sees the old file, the new one or none
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _opened(path: str, flags: int) -> int:
    """A descriptor, at once even of a pipe that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def unusable(path: Path) -> str | None:
    """Why kernels are not kept in a folder; None where they are, or will be once it is made."""
    try:
        found = next(each for each in (path, *path.parents) if each.exists())
        if not os.access(found, os.W_OK):
            return f"{found} cannot be written to"
        return _distrusted(path.stat()) if found == path else None
    except OSError as error:
        return str(error)


def _distrusted(status: os.stat_result) -> str | None:
    """Who else can have written a file, or to a folder; None for nobody. Of Windows this is not asked."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"user {status.st_uid} owns it"
    return f"others can write to it (mode {stat.S_IMODE(status.st_mode):o})" if status.st_mode & _OTHERS else None


def _warn(path: Path, problem: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{path}: {problem}", RuntimeWarning, stacklevel=2)
