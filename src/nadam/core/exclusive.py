"""One call at a time: the others wait, or are refused where waiting would never end. Locks that outlive a fork."""

import logging  # noqa: F401  # has to register its hooks before ours, see the end
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock, get_ident
from typing import TypeVar
from weakref import WeakSet

Result = TypeVar("Result")
PATIENCE = 30.0  # seconds that a fork waits for what another thread compiles
_loading = RLock()
_cut_off = False


class Exclusive:
    """Keeps apart the calls that change one optimizer.

    Other threads wait. A call from within another one on the same thread, as by a signal handler, is refused. In the
    child of a fork a call of any thread but the one that forked counts as interrupted: that thread is not there.

    Example:
        >>> exclusive = Exclusive()
        >>> exclusive.run("step", abs, -1)
        1
        >>> exclusive.run("step", exclusive.run, "state_dict", abs, -1)
        Traceback (most recent call last):
        RuntimeError: state_dict: called from within a step, as by a signal handler
    """

    def __init__(self) -> None:
        self._renew()
        _instances.add(self)

    def _renew(self) -> None:
        self._lock = RLock()
        self._at_work: int | None = None  # the thread whose call this is

    # No context manager: an interrupt within one's `__enter__` would leave the lock taken.
    def run(self, method: str, work: Callable[..., Result], *args: object) -> Result:
        """What ``work(*args)`` gives."""
        with self._lock:
            if self._at_work is not None:
                raise RuntimeError(f"{method}: called from within a step, as by a signal handler")
            self._at_work = get_ident()
            try:
                return work(*args)
            finally:
                self._at_work = None


_instances: "WeakSet[Exclusive]" = WeakSet()


@contextmanager
def loading() -> Iterator[None]:
    """Around what imports modules or compiles kernels in the middle of a step: one thread at a time, and no fork.

    A fork waits, since locks of Python's imports and of Numba's would stay taken in its child.
    """
    with _loading:
        if _cut_off:
            raise RuntimeError("forked while another thread was compiling a kernel: do a step first, then fork")
        yield


def _before_fork() -> None:
    _loading.acquire(timeout=PATIENCE)


def _after_fork_in_parent() -> None:
    with suppress(RuntimeError):  # it waited in vain
        _loading.release()


def _after_fork_in_child() -> None:
    """Locks of threads that are not here are nobody's to open."""
    global _loading, _cut_off
    try:
        _loading.release()
    except RuntimeError:
        _loading, _cut_off = RLock(), True
    for each in _instances:
        if each._at_work != get_ident():
            each._renew()


# What was registered last comes first: logging takes its own lock before a fork, and a compiler may wait for that one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
