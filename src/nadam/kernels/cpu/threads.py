"""Whose threads share a pass: PyTorch's own, or those of a small pool.

After a backward pass PyTorch's OpenMP workers are awake, spinning for work, and threads of ours would share the cores
with them: so its tensors are done in a parallel region of the runtime that it has loaded, 21M parameters in a training
loop in 11.5 to 12.8 ms where a pool beside them took 14.8 to 15.6. Everything else is done by a pool of ours, because
Numba's threading layers abort under concurrent calls, die after a fork and bring a second OpenMP runtime. The calling
thread always works too, and helpers that cannot be had (a fork, an interpreter that is shutting down, no more threads)
are done without.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from math import inf
from threading import Condition, Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nadam.kernels.layout import STOP, TICKET

if TYPE_CHECKING:
    from nadam.kernels.cpu.machine_code import Kernel

# Chunks that the calling thread does before it lets Python look at signals: a few milliseconds of work, more where it
# touches memory for the first time.
SLICE = 64
UNTIL_DONE = 1 << 62
# Below this many elements the calling thread is done before a helper of our pool has woken up; PyTorch's are awake.
WORTH_SHARING, WORTH_A_REGION = 1 << 20, 1 << 16
# Updates that try each way of sharing a pass in turn, and after how many the other one is tried again.
TRIALS, AGAIN = 6, 64

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


class Sharing:
    """How a pass over one group is shared: by PyTorch's threads or ours, whichever have lately been faster for it.

    Where other programs compute as well, a region of OpenMP waits for threads that do not run, and ours do not.
    """

    def __init__(self, elements: int, chunks: int, default_threads: Callable[[], int] | None) -> None:
        self._default_threads, self._chunks = default_threads, chunks
        self._pool = elements >= WORTH_SHARING
        self._region = elements >= WORTH_A_REGION and default_threads is not None
        self.worth_it = self._pool or self._region
        self._seconds, self._turn = [inf, inf], -1

    def run(self, kernel: Kernel, block: int, control: memoryview) -> None:
        """Run a pass over all chunks; arguments and exceptions are those of `share_out`."""
        threads = get_num_threads(self._default_threads) if self.worth_it else 1
        helpers = min(threads, self._chunks) - 1 if self._pool else 0
        # Always PyTorch's whole team: of a smaller one GNU's runtime ends the other threads.
        region = parallel() if self._region and threads > 1 and _requested is None else None
        if region is None:
            share_out(kernel, block, control, self._chunks, helpers)
            return
        self._turn += 1
        fastest = int(self._seconds[1] < self._seconds[0])
        ours = self._turn % 2 if self._turn <= TRIALS else fastest ^ (self._turn % AGAIN == 0)
        begin = perf_counter()
        if ours:
            share_out(kernel, block, control, self._chunks, helpers)
        else:
            share_region(region, kernel, block, control, self._chunks, threads)
        seconds, known = perf_counter() - begin, self._seconds[ours]
        if self._turn > 0:  # the first one touches the state's memory for the first time
            self._seconds[ours] = min(seconds, known) if self._turn <= TRIALS else 0.75 * known + 0.25 * seconds


def share_out(kernel: Kernel, block: int, control: memoryview, chunks: int, helpers: int) -> None:
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


def _work_off(kernel: Kernel, block: int, control: memoryview, chunks: int) -> None:
    """Slice after slice until all chunks are drawn; in between, Python looks at signals."""
    while control[TICKET] < chunks:
        kernel(block, SLICE)


class _Crew:
    """The helpers of one pass. They sign in and out themselves, so an interrupt of the calling thread loses none."""

    def __init__(self, kernel: Kernel, block: int) -> None:
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


# Chunks that each thread does before the calling one lets Python look at signals: some milliseconds of work.
REGION_SLICE = 256
# What each thread of a region calls: data -> kernel(block, budget), in Numba's calling convention.
_ENTRY = """
define void @entry(i64* %data) {
    %unused = alloca [64 x i8]
    %nowhere = bitcast [64 x i8]* %unused to i8*
    %address = load i64, i64* %data
    %kernel = inttoptr i64 %address to i32 (i8*, i8*, i64, i64)*
    %second = getelementptr i64, i64* %data, i64 1
    %block = load i64, i64* %second
    %third = getelementptr i64, i64* %data, i64 2
    %budget = load i64, i64* %third
    %called = call i32 %kernel(i8* %nowhere, i8* %nowhere, i64 %block, i64 %budget)
    ret void
}
"""
_forked = False


def parallel() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the runtime that PyTorch is linked with; None where there is none that may be used."""
    return None if _forked else _find()


@cache
def _find() -> Any:
    """GNU's interface, which the runtimes of LLVM and Intel have too, of the library that PyTorch itself loaded."""
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or torch is None:
        return None
    with suppress(OSError, AttributeError):
        library = os.path.join(os.path.dirname(torch.__file__ or ""), "lib", "libtorch_cpu.so")
        # Of a library that is loaded already; a symbol is sought in it and in those that it depends on.
        function = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return function
    return None


@cache
def _entry() -> int:
    from nadam.kernels.cpu import machine_code

    return machine_code.function_of(_ENTRY, "entry")


def share_region(
    region: Callable[..., None], kernel: Kernel, block: int, control: memoryview, chunks: int, threads: int
) -> None:
    """Run a kernel over all chunks of its table on a team of so many threads, the calling one among them.

    Between regions nobody works, and Python looks at signals: the chunks that were not drawn by then are left as they
    were.
    """
    control[TICKET] = control[STOP] = 0
    data = (ctypes.c_int64 * 3)(kernel.address, block, REGION_SLICE)
    while control[TICKET] < chunks:
        region(_entry(), data, threads, 0)


def _forget_region() -> None:
    """The workers of the parent's team are not here, and the runtime would wait for them forever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
    os.register_at_fork(after_in_child=_forget_region)
