"""An interrupt during a step: the counters agree with what moved, no chunk is half done, and it does not take long."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import partial
from math import inf
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

import nadam
from nadam.kernels import layout
from nadam.kernels.cpu import threads

CHUNK = 64
SHAPES = [(30, 10), (10,), (150,)]
SETTINGS = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.5, "weight_decay": 0.01, "use_ema": True},
    "checked": {"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 1},
    "accumulated": {"clipnorm": 0.5, "use_ema": True, "gradient_accumulation_steps": 2},
}


class Model:
    """Parameters, their gradients, and an optimizer that has done some steps."""

    def __init__(self, settings="plain", steps=0, shapes=SHAPES, dtypes=(np.float32,)):
        draw = np.random.default_rng(4)
        drawn = [draw.normal(size=(2, *shape)).astype(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
        self.params, self.grads = [pair[0] for pair in drawn], [pair[1] for pair in drawn]
        self.optimizer = nadam.Nadam(0.05, **SETTINGS[settings])
        self.optimizer.build(self.params)
        for _ in range(steps):
            self.step()

    def step(self):
        self.optimizer.apply(self.grads, self.params)

    def step_interrupted(self):
        with pytest.raises(KeyboardInterrupt):
            self.step()

    def arrays(self):
        state = self.optimizer.state_dict()["state"].values()
        return [[param, *slots.values()] for param, slots in zip(self.params, state, strict=True)]

    def counters(self):
        state = self.optimizer.state_dict()
        return [state[name] for name in ("iteration", "momentum_product", "skipped_steps", "accumulated")]


def moved(now, old, new, chunk=CHUNK):
    """For each chunk whether it is at its new values; if not it is at its old ones, and the counters fit."""
    sides = []
    for arrays in zip(now.arrays(), old.arrays(), new.arrays(), strict=True):
        for start in range(0, arrays[0][0].size, chunk):
            part = slice(start, start + chunk)
            n, o, w = ([array.reshape(-1)[part].tobytes() for array in each] for each in arrays)
            assert (n == o) != (n == w)
            sides.append(n == w)
    assert now.counters() == (new if any(sides) else old).counters()
    return sides


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(threads, "_requested", 1)


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the calling thread when no slice is `left` to do; `working` counts the helpers at work, slow ones."""
    interrupt, share_out = SimpleNamespace(left=inf, working=0, linger=0.02), threads.share_out

    def watched(kernel, block, control, chunks, helpers):
        caller, helping = threading.get_ident(), threading.Event()

        def watch(block, budget):
            if threading.get_ident() == caller:
                helping.wait(5 if helpers else 0)
                if interrupt.left == 0:
                    interrupt.left = inf
                    raise KeyboardInterrupt
                interrupt.left -= 1
                kernel(block, budget)
                return
            interrupt.working += 1
            kernel(block, 1)
            helping.set()
            while control[layout.TICKET] < chunks and not control[layout.STOP]:
                time.sleep(0.02)
                kernel(block, 1)
            time.sleep(interrupt.linger)
            interrupt.working -= 1

        share_out(watch, block, control, chunks, helpers)

    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(threads, "SLICE", 1)
    monkeypatch.setattr(layout, "cut_into_chunks", partial(layout.cut_into_chunks, chunk=CHUNK))
    monkeypatch.setattr(threads, "share_out", watched)
    return interrupt


@pytest.fixture
def alarm():
    """When the timer rings, the handler in it is called in this thread."""
    handlers = []
    before = signal.signal(signal.SIGALRM, lambda *args: handlers and handlers.pop()(*args))
    yield handlers
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("dtypes", [(np.float32,), (np.float64, np.float16)], ids=["one pass", "two passes"])
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_after_any_slice(interrupt, settings, steps, dtypes):
    old, seen = Model(settings, steps, dtypes=dtypes), set()
    new, interrupt.left = deepcopy(old), 1000
    new.step()
    for slices in range(1000 - interrupt.left):
        model = deepcopy(old)
        interrupt.left = slices
        model.step_interrupted()
        sides = moved(model, old, new)
        seen.add(sum(sides))
        model.step()  # it goes on; where nothing had moved, as if nothing had been
        assert model.counters()[0] == steps + any(sides) + 1
        assert any(sides) or all(moved(model, old, new))
    assert seen == set(range(len(sides)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_with_helpers_at_work(interrupt, settings):
    old, new = Model(settings, 2), Model(settings, 3)
    nadam.set_num_threads(3)
    for slices in range(4):
        model = deepcopy(old)
        interrupt.left = slices
        model.step_interrupted()
        assert interrupt.working == 0
        assert not all(moved(model, old, new))


def test_while_helpers_are_waited_for(interrupt, alarm):
    model, old, new = Model(steps=2), Model(steps=2), Model(steps=3)
    nadam.set_num_threads(3)
    interrupt.linger = 0.5
    alarm.extend([signal.default_int_handler] * 3)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)
    model.step_interrupted()
    working, signals = interrupt.working, alarm.copy()
    alarm.clear()
    assert (working, signals) == (0, [])
    assert all(moved(model, old, new))


def test_while_helpers_are_asked_for(interrupt, monkeypatch):
    model, old, new = Model(steps=2), Model(steps=2), Model(steps=3)
    submit = ThreadPoolExecutor.submit

    def submit_and_no_further(*args):
        submit(*args)
        time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_no_further)
    nadam.set_num_threads(2)
    model.step_interrupted()
    assert interrupt.working == 0
    moved(model, old, new)


@pytest.mark.parametrize("shapes", [SHAPES, [(10 * layout.CHUNK + 1,), (70, 3)]], ids=["small", "larger"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_random_moments(alarm, monkeypatch, settings, shapes):
    monkeypatch.setattr(threads, "SLICE", 1)
    draw, old, new = Random(5), Model(settings, 1, shapes), Model(settings, 2, shapes)
    for _ in range(30):
        model = deepcopy(new)
        with suppress(KeyboardInterrupt):
            alarm.append(signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 1e-3))
            for _ in range(1000):
                model.step()
            alarm.clear()
        while new.counters()[0] < model.counters()[0]:
            old = deepcopy(new)
            new.step()
        moved(model, old, new, layout.CHUNK)


# Sends itself SIGINT at random moments of long first steps. Prints for each whether it came too late, how long the
# answer took, the share of the parameters that had moved by then, and the count of steps.
LONG = """
import json, nadam, os, random, signal, threading, time
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)
nadam.set_num_threads(1)
draw = random.Random(8)
{arrays}
def first_step(delay):
    def interrupt():
        time.sleep(delay)
        begin.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    param[...] = 1
    optimizer = nadam.Nadam(0.05, {settings})
    optimizer.build([param])
    late, begin = False, [time.perf_counter()]
    try:
        if delay:
            threading.Thread(target=interrupt).start()
        optimizer.apply([grad])
        late = True
        time.sleep(60 if delay else 0)
    except KeyboardInterrupt:
        pass
    return late, time.perf_counter() - begin[-1], np.mean(param != 1), optimizer.iterations
duration = [first_step(None)[1] for _ in range(2)][1]
print(json.dumps([first_step(draw.uniform(0.05, 0.75) * duration) for _ in range(7)]))
"""
LONG_STEPS = {
    "float32": {"arrays": "param, grad = np.ones((2, 60_000_000), 'f')", "settings": ""},
    "float64": {"arrays": "param, grad = np.ones((2, 25_000_000))", "settings": "clipnorm=9.0, use_ema=True"},
    "strided": {"arrays": "param, grad = np.ones((2, 25_000_000, 2), 'f')[..., 0]", "settings": ""},
}


@pytest.mark.parametrize("case", LONG_STEPS)
def test_a_signal_is_answered_soon(case):
    command = [sys.executable, "-c", LONG.format(**LONG_STEPS[case])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tries = [measured for late, *measured in json.loads(done.stdout) if not late]
    assert any(0 < share < 1 for _, share, _ in tries)
    assert all(steps == (share > 0) for _, share, steps in tries)
    assert sorted(tries)[len(tries) // 2][0] < 0.1, tries
