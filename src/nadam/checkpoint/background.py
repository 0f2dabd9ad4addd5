"""Saves on threads of their own: one at a time for each path, finished before Python exits, their errors never lost."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress


class PendingSave:
    """A save that goes on in the background, from `save_async`.

    Attributes:
        path: Where it saves to.
    """

    def __init__(self, path: str | os.PathLike[str], work: Callable[[], None]) -> None:
        self.path = path
        self._work = work
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"nadam.checkpoint: {os.fspath(path)}")

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised where somebody waits
            error.add_note(f"while saving {os.fspath(self.path)} in the background")
            self._error = error
        del self._work  # and with it the snapshot

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        self._check_process()
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end of the save.

        Raises:
            OSError: The file could not be written. One that was there is left as it was.
            RuntimeError: In a forked process, which does not have the thread; its parent does the saving.
        """
        self._check_process()
        self._thread.join()
        _forget(self)
        if self._error is not None:
            raise self._error

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(f"{os.fspath(self.path)} is being saved by process {self._process}, not by this one")


_lock = threading.Lock()
_pending: dict[str, PendingSave] = {}  # by real path, until somebody has waited for it


def _forget(save: PendingSave) -> None:
    with _lock:
        for path, other in list(_pending.items()):
            if other is save:
                del _pending[path]


def settle(path: str | os.PathLike[str]) -> None:
    """Wait for a save to a path; raise the error of any save that has failed where nobody waited."""
    with _lock:
        mine = _pending.get(os.path.realpath(path))
        waiting = [save for save in _pending.values() if save is mine or save.done]
    for save in waiting:
        save.wait()


def start(path: str | os.PathLike[str], work: Callable[[], None]) -> PendingSave:
    """Begin a save to a path once no other goes there."""
    save, target = PendingSave(path, work), os.path.realpath(path)
    while True:
        settle(path)
        with _lock:
            if target not in _pending:
                save._thread.start()
                _pending[target] = save
                return save


class _Unsaved:
    """In the place of the standard output: fails to be flushed as Python exits, which makes its exit code 120."""

    closed = False

    def flush(self) -> None:
        raise RuntimeError("nadam.checkpoint: not saved, see above")


@atexit.register
def _report() -> None:
    """Print the errors that nobody has seen. Python has waited for the threads by now."""
    failed = [save for save in _pending.values() if save._error is not None]
    for save in failed:
        traceback.print_exception(save._error)
    if failed:
        with suppress(Exception):
            sys.stdout.flush()
        sys.stdout = _Unsaved()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _pending.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
