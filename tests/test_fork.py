"""One call at a time, and forks in the middle of one: the child goes on, or is told why it cannot."""

import json
import os
import subprocess
import sys
import threading
from copy import deepcopy
from importlib.util import find_spec

import numpy as np
import pytest

import nadam
from nadam.core.exclusive import Exclusive
from nadam.numpy import optimizer as optimizer_module

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
FORK = """
import json, os, signal, sys, threading, time, warnings
import numpy as np
warnings.simplefilter("ignore")  # forks with threads are what this is about
inside, go_on = threading.Event(), threading.Event()

def on_a_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert inside.wait(60)
    return thread

def in_child(work):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # rather than hang
        try:
            result = work()
        except Exception as error:
            result = repr(error)
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child hangs"
    return json.loads(result)
"""
# What makes a model with so many settings; `module.step` does its steps.
HOSTS = {
    "numpy": """
import nadam
from nadam.numpy import optimizer as module

class Model:
    def __init__(self, **settings):
        self.params, self.grads = [np.ones(300, "f"), np.ones((7, 5))], [np.full(300, 0.5, "f"), np.ones((7, 5))]
        self.optimizer = nadam.Nadam(0.05, **settings)

    def step(self):
        self.optimizer.apply(self.grads, self.params)

    def state(self):
        state = self.optimizer.state_dict()
        return state["iteration"], [array.tobytes().hex() for array in [*self.params, *self.optimizer.variables]]
""",
    "torch": """
import torch
from nadam.torch import NAdam
from nadam.torch import optimizer as module

class Model:
    def __init__(self, **settings):
        self.params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(300,), (7, 5)]]
        for param in self.params:
            param.grad = torch.full_like(param, 0.5)
        self.optimizer = NAdam(self.params, 0.05, **settings)

    def step(self):
        self.optimizer.step()

    def state(self):
        state = self.optimizer.state_dict()
        arrays = [value.numpy() for entry in state["state"].values() for value in entry.values()]
        arrays += [param.detach().numpy() for param in self.params]
        return state["param_groups"][0].get("accumulation_position"), [array.tobytes().hex() for array in arrays]
""",
    "keras": """
import keras, torch
import nadam.keras
from nadam.keras import on_torch as module

class Model:
    def __init__(self, **settings):
        self.params, self.grads = [keras.Variable(np.ones(300, "f"))], [torch.full((300,), 0.5)]
        self.optimizer = nadam.keras.Nadam(0.05, **settings)

    def step(self):
        self.optimizer.apply(self.grads, self.params)

    def state(self):
        arrays = [variable.numpy() for variable in [*self.params, *self.optimizer.variables]]
        return int(self.optimizer._iterations.numpy()), [array.tobytes().hex() for array in arrays]
""",
}
STEPS = """
step, main = module.step, threading.get_ident()

def stopping(where, *args, **options):
    if threading.get_ident() == main:
        return step(*args, **options)
    report = step(*args, **options) if where == "after" else None
    inside.set()
    go_on.wait(60)
    return step(*args, **options) if report is None else report

def stepped(model):
    model.step()
    return list(model.state())

found = {}
for where in ("before", "after"):
    for settings in ({}, {"gradient_accumulation_steps": 2, "use_ema": True}):
        inside.clear()
        go_on.clear()
        model, other = Model(**settings), Model(**settings)
        expected = [stepped(other) for _ in range(6)]
        assert [stepped(model), stepped(model)] == expected[:2]
        module.step = lambda *args, **options: stopping(where, *args, **options)
        thread = on_a_thread(model.step)
        done = 3 if where == "after" else 2
        in_child_is = in_child(lambda: [list(model.state()), stepped(model), stepped(model)])
        go_on.set()
        thread.join(60)
        in_parent = [list(model.state()), stepped(model), stepped(model)]
        found[f"{where}, {settings}"] = [
            in_child_is == expected[done - 1 : done + 2] or str(in_child_is)[:1000], in_parent == expected[2:5]
        ]
print(json.dumps(found))
"""


def python(program, **environment):
    """What a process of its own prints as JSON."""
    environment = {**os.environ, "KERAS_BACKEND": "torch", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_fork
@pytest.mark.parametrize("host", HOSTS)
def test_while_another_thread_is_within_a_step(host):
    missing = [name for name in {"numpy": [], "torch": ["torch"], "keras": ["torch", "keras"]}[host] if not here(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    found = python(FORK + HOSTS[host] + STEPS)
    assert len(found) == 4
    assert all(value == [True, True] for value in found.values()), found


def here(name):
    try:
        return find_spec(name) is not None
    except ValueError:  # as conftest.py marks what is absent
        return False


COLD = """
import nadam

def step():
    params = [np.ones(300, "f")]
    nadam.Nadam(0.05).apply([np.ones(300, "f")], params)
    return float(params[0][0])
"""
IMPORTING = """
class Slow:
    def find_spec(self, name, *_):
        if name == "nadam.kernels.layout":
            inside.set()
            time.sleep(1)
sys.meta_path.insert(0, Slow())
"""
COMPILING = """
from nadam.kernels.cpu import machine_code
compile_kernel = machine_code._compile

def compiling(*args):
    inside.set()
    go_on.wait({wait})
    return compile_kernel(*args)

machine_code._compile = compiling
"""


@needs_fork
@pytest.mark.parametrize("busy", [IMPORTING, COMPILING.format(wait=0)], ids=["importing", "compiling"])
def test_while_another_thread_is_loading_kernels(busy, tmp_path):
    program = FORK + COLD + busy + "thread = on_a_thread(step)\nin_child = in_child(step)\nthread.join(60)\n"
    child, parent = python(program + "print(json.dumps([in_child, step()]))", NADAM_CACHE_DIR=str(tmp_path))
    assert child == parent
    assert 0 < parent < 1


@needs_fork
def test_a_compilation_that_does_not_end_is_an_error_in_the_child(tmp_path):
    program = FORK + COLD + COMPILING.format(wait=60)
    program += "from nadam.core import exclusive\nexclusive.PATIENCE = 0.5\nthread = on_a_thread(step)\n"
    program += "child = in_child(step)\ngo_on.set()\nthread.join(60)\nprint(json.dumps([child, step()]))"
    child, parent = python(program, NADAM_CACHE_DIR=str(tmp_path))
    assert "forked while another thread was compiling" in child
    assert 0 < parent < 1


@needs_fork
def test_a_fork_within_a_step_of_ones_own():
    """The child is in the middle of that step too: it refuses another, ends that one and does the next."""
    exclusive, children = Exclusive(), []

    def work():
        children.append(os.fork())
        if children[0] == 0:
            try:
                exclusive.run("step", int)
            except RuntimeError:
                return "refused"
        return "parent" if children[0] else "not refused"

    result = exclusive.run("step", work)
    if children[0] == 0:
        os._exit(0 if result == "refused" and exclusive.run("step", lambda: 7) == 7 else 1)
    assert result == "parent"
    assert os.waitpid(children[0], 0)[1] == 0


def test_other_threads_wait():
    exclusive, inside, go_on, done = Exclusive(), threading.Event(), threading.Event(), []

    def first():
        inside.set()
        go_on.wait(30)
        done.append("first")

    threads = [threading.Thread(target=exclusive.run, args=("step", first))]
    threads[0].start()
    assert inside.wait(30)
    threads.append(threading.Thread(target=exclusive.run, args=("step", done.append, "second")))
    threads[1].start()
    threads[1].join(0.1)
    assert done == []
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert done == ["first", "second"]


def test_after_an_error_or_an_interrupt_the_next_call_works():
    exclusive = Exclusive()
    for error in (ValueError, KeyboardInterrupt):

        def work(error=error):
            raise error

        with pytest.raises(error):
            exclusive.run("step", work)
    assert exclusive.run("step", int) == 0
    reached = threading.Event()
    threading.Thread(target=exclusive.run, args=("step", reached.set), daemon=True).start()
    assert reached.wait(30)


def test_a_copy_that_is_made_within_a_step_is_within_none(monkeypatch):
    params, grads = [np.ones(5)], [np.ones(5)]
    optimizer, copies, step = nadam.Nadam(0.05), [], optimizer_module.step

    def during(*args, **options):
        copies.append(deepcopy(optimizer))
        return step(*args, **options)

    monkeypatch.setattr(optimizer_module, "step", during)
    optimizer.apply(grads, params)
    monkeypatch.undo()
    copies[0].apply(grads)
    assert copies[0].iterations == optimizer.iterations == 1
