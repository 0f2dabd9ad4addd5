"""Our own small thread pool over kernels that release the GIL.

A pool of ours, because Numba's threading layers abort under concurrent calls, die after a fork and bring a second
OpenMP runtime beside PyTorch's. The calling thread always works too, and helpers that cannot be had (a fork, an
interpreter that is shutting down, no more threads) are done without: the calling thread then does it all.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Lock

from nadam.kernels.layout import STOP, TICKET

# Chunks that the calling thread does before it lets Python look at signals: a few milliseconds of work, more where it
# touches memory for the first time.
SLICE = 64
UNTIL_DONE = 1 << 62

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_requested: int | None = None


def get_num_threads(default: Callable[[], int] | None = None) -> int:
    """Number of threads that a pass may use, the calling one included.

    What `set_num_threads` asked for, else the environment's NUMBA_NUM_THREADS, else the CPUs that this process may run
    on; for the tensors of a framework that has such a setting, its number of threads instead of those two.

    Example:
        >>> get_num_threads() >= 1
        True
    """
    return _requested if _requested is not None else (default or _default_num_threads)()


def set_num_threads(count: int | None) -> None:
    """Set the number of threads that a pass may use; the results do not depend on it.

    Args:
        count: At least 1; None for the default again.

    Raises:
        ValueError: count is not an integer of at least 1.

    Example:
        >>> set_num_threads(1)
        >>> get_num_threads()
        1
        >>> set_num_threads(None)
    """
    global _requested
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"count={count!r}: expected an integer, count >= 1, or None")
    _requested = count


def _default_num_threads() -> int:
    asked = os.environ.get("NUMBA_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_out(kernel: Callable[[int, int], None], block: int, control: memoryview, chunks: int, helpers: int) -> None:
    """Run a kernel over all chunks of its table, on the calling thread and up to ``helpers`` more."""
    control[TICKET] = control[STOP] = 0
    if not helpers:
        return _work_off(kernel, block, control, chunks)
    crew = _Crew(kernel, block)
    try:
        crew.call(helpers)
        _work_off(kernel, block, control, chunks)
        crew.dismiss()
    except BaseException:
        control[STOP] = 1  # helpers end with the chunk that they are at
        crew.dismiss()
        raise


def _work_off(kernel: Callable[[int, int], None], block: int, control: memoryview, chunks: int) -> None:
    """Slice after slice until all chunks are drawn; in between, Python looks at signals."""
    while control[TICKET] < chunks:
        kernel(block, SLICE)


class _Crew:
    """The helpers of one pass. They sign in and out themselves, so an interrupt of the calling thread loses none."""

    def __init__(self, kernel: Callable[[int, int], None], block: int) -> None:
        self._kernel, self._block = kernel, block
        self._changed = Condition()
        self._over, self._working = False, 0

    def call(self, count: int) -> None:
        """Ask for helpers; those that cannot be had are done without."""
        with suppress(RuntimeError):  # the interpreter is shutting down, or the system gives no more threads
            pool = _get_pool(count)
            for _ in range(count):
                pool.submit(self._help)

    def _help(self) -> None:
        with self._changed:
            if self._over:
                return
            self._working += 1
        try:
            self._kernel(self._block, UNTIL_DONE)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify()

    def dismiss(self) -> None:
        """Wait until no helper works any more, whatever signals come: they work on memory that the caller may free."""
        interrupt = None
        while True:
            try:
                with self._changed:
                    self._over = True
                    self._changed.wait_for(lambda: not self._working)
                break
            except KeyboardInterrupt as signal:
                interrupt = signal
        if interrupt is not None:
            raise interrupt


def _get_pool(helpers: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < helpers:
            # A smaller one is left to finish what it runs; it goes with its last reference.
            _pool, _pool_size = ThreadPoolExecutor(helpers, "nadam"), helpers
        return _pool


def _forget_pool() -> None:
    """In the child of a fork: the threads of the parent's pool are not here."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
