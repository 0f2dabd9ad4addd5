"""Threads: how many, that the bits do not depend on them, and that a step does without those it cannot have."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import nadam
from nadam.kernels import layout
from nadam.kernels.cpu import threads

SETTINGS = {
    "plain": {},
    "global_clipnorm": {"global_clipnorm": 0.5, "weight_decay": 0.01, "use_ema": True},
    "clipnorm": {"clipnorm": 0.5, "weight_decay": 0.01, "use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"global_clipnorm": 0.5, "use_ema": True, "gradient_accumulation_steps": 2},
}
SHAPES = [(5000,), (33, 100), (1,), (0,), (40, 7, 21)]


@pytest.fixture(autouse=True)
def default_threads(monkeypatch):
    monkeypatch.setattr(threads, "_requested", None)


@pytest.fixture
def small(monkeypatch):
    """Chunks so small, and shared out so early, that a few thousand elements do."""
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(layout, "cut_into_chunks", partial(layout.cut_into_chunks, chunk=64))


@pytest.fixture
def watch(monkeypatch):
    """Has each pass run `around(kernel, threads)` in the place of its kernel."""

    real = threads.share_out

    def share_out(around, kernel, block, control, chunks, helpers):
        real(around(kernel, helpers + 1), block, control, chunks, helpers)

    return lambda around: monkeypatch.setattr(threads, "share_out", partial(share_out, around))


@pytest.fixture
def together(watch):
    """The threads of a pass begin all at once; gives how many each pass had."""
    counts = []

    def at_once(kernel, count):
        counts.append(count)
        barrier = threading.Barrier(count, timeout=30)
        here = threading.local()

        def begin(*args):
            if not hasattr(here, "met"):
                here.met = barrier.wait()
            return kernel(*args)

        return begin

    watch(at_once)
    return counts


def train(count, shapes=SHAPES, steps=4, seed=3, dtype=np.float32, **settings):
    """Bytes of parameters and state after some steps on so many threads."""
    nadam.set_num_threads(count)
    draw = np.random.default_rng(seed)
    params = [draw.normal(size=shape).astype(dtype) for shape in shapes]
    optimizer = nadam.Nadam(0.05, **settings)
    for _ in range(steps):
        optimizer.apply([draw.normal(size=shape).astype(dtype) for shape in shapes], params)
    return [array.tobytes() for array in [*params, *optimizer.variables]]


def python(program, **environment):
    """What a process of its own prints as JSON."""
    given = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("small")
def test_bits_do_not_depend_on_threads(together, settings, dtype):
    assert len({tuple(train(count, dtype=dtype, **SETTINGS[settings])) for count in [1, 2, 4] * 20}) == 1
    assert set(together) == {1, 2, 4}


@pytest.mark.parametrize("settings", ["plain", "global_clipnorm"])
def test_bits_of_a_large_tensor_do_not_depend_on_threads(together, settings):
    assert len({tuple(train(count, [(3_000_001,), (7,)], 2, **SETTINGS[settings])) for count in (1, 2, 4)}) == 1
    assert set(together) == {1, 2, 4}


def test_a_small_model_stays_on_the_calling_thread(together):
    train(4)
    assert set(together) == {1}


@pytest.mark.usefixtures("small")
def test_eight_threads_with_an_optimizer_each():
    settings, start = [*SETTINGS.values()] * 2, threading.Barrier(8, timeout=30)
    serial = [train(1, steps=20, seed=seed, **each) for seed, each in enumerate(settings)]

    def work(seed):
        start.wait()
        return train(3, steps=20, seed=seed, **settings[seed])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == serial


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("small")
def test_two_threads_with_one_optimizer(settings):
    def train_on(count):
        draw = np.random.default_rng(5)
        params, grads = ([draw.normal(size=shape) for shape in SHAPES] for _ in range(2))
        optimizer, start = nadam.Nadam(0.05, **SETTINGS[settings]), threading.Barrier(count)

        def work(_):
            start.wait(30)
            for _ in range(100 // count):
                optimizer.apply(grads, params)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
        return optimizer.iterations, [array.tobytes() for array in [*params, *optimizer.variables]]

    nadam.set_num_threads(2)
    serial = train_on(1)
    assert serial[0] == 100 // SETTINGS[settings].get("gradient_accumulation_steps", 1)
    assert train_on(2) == serial


SMALL = """
import atexit, json, nadam, os, signal
import numpy as np
from nadam.kernels.cpu import threads
threads.WORTH_SHARING = 1
nadam.set_num_threads(2)
param, grad = np.ones(1 << 17), np.linspace(-1, 1, 1 << 17)
optimizer = nadam.Nadam(0.05)
def step():
    optimizer.apply([grad], [param])
    return [float(param.sum()), param.tobytes()[:64].hex()]
"""
FORK = """
step()
assert threads._pool is not None
read, write = os.pipe()
threads._lock.acquire()  # as another thread may have it
child = os.fork()
if child == 0:
    signal.alarm(60)  # rather than hang
    os.write(write, json.dumps(step()).encode())
    os._exit(0)
threads._lock.release()
os.close(write)
in_child = json.loads(os.read(read, 1000))
assert step() == in_child
print(json.dumps(in_child))
"""


@pytest.mark.parametrize(
    "way", [FORK, "atexit.register(lambda: print(json.dumps(step()))); step()"], ids=["fork", "exit"]
)
def test_a_step_in_the_child_of_a_fork_and_at_exit(way):
    assert python(SMALL + way) == python(SMALL + "step(); print(json.dumps(step()))")


@pytest.fixture
def available(monkeypatch):
    """The system has as many threads to give as there are items in this, and the pool has none yet."""
    available, start = [], threading.Thread.start

    def limited(thread):
        if not available:
            raise RuntimeError("can't start new thread")
        available.pop()
        start(thread)

    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_pool_size", 0)
    monkeypatch.setattr(threading.Thread, "start", limited)
    return available


@pytest.mark.usefixtures("small", "available")
def test_a_pool_that_gives_no_threads_is_done_without():
    assert train(4) == train(1)


@pytest.mark.usefixtures("small")
def test_the_helpers_that_could_be_had_are_waited_for(watch, available):
    caller, begun, working = threading.get_ident(), threading.Event(), [1]

    def run(kernel, *args):
        if threading.get_ident() == caller:
            begun.wait(5)
            kernel(*args)
        else:
            begun.set()
            time.sleep(0.1)
            working.clear()

    watch(lambda kernel, count: partial(run, kernel))
    available.append("one of two")
    train(3, steps=1)
    assert working == []


@pytest.mark.usefixtures("small")
def test_a_helper_that_could_not_begin_never_does(watch, available):
    passes, late = [], []

    def around(kernel, count):
        passes.append(kernel)
        mine = len(passes)
        return lambda *args: late.append(mine) if mine != len(passes) else kernel(*args)

    watch(around)
    train(2, steps=1)
    available.append("now")
    train(2, steps=3)
    time.sleep(0.3)
    assert late == []


def test_none_is_the_default_number_of_threads_again():
    nadam.set_num_threads(1 + nadam.get_num_threads())
    nadam.set_num_threads(None)
    assert nadam.get_num_threads() == threads._default_num_threads()


@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, True, "2", float("nan")])
def test_what_is_no_number_of_threads_is_refused(count):
    nadam.set_num_threads(3)
    with pytest.raises(ValueError, match="expected an integer, count >= 1"):
        nadam.set_num_threads(count)
    assert nadam.get_num_threads() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("", 1), ("0", 1), ("-2", 1), ("many", 1)])
def test_the_environment_or_else_the_affinity_says_how_many(asked, count):
    program = (
        "import nadam, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(nadam.get_num_threads())"
    )
    assert python(program, NUMBA_NUM_THREADS=asked) == count
