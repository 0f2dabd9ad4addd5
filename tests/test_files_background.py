"""Saves in the background: a copy of the state at the call, errors never lost, nothing pending when Python exits."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from nadam import checkpoint
from nadam.checkpoint import background, container
from test_files import python


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


@pytest.fixture
def gate(monkeypatch):
    """Writes in the background wait until this is set; it is at the end."""
    gate = threading.Event()

    def write(*args, write=container.write):
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
        write(*args)

    monkeypatch.setattr(container, "write", write)
    yield gate
    gate.set()
    for save in list(background._pending.values()):
        save.wait()


@pytest.fixture
def failing(monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "write", write)
    return monkeypatch


def test_the_state_of_the_call_is_saved(path, gate):
    torch = pytest.importorskip("torch")
    arrays = {"a": np.zeros(3), "b": np.zeros((2, 3)).T, "c": np.float32(0), "t": torch.zeros(3)}
    save = checkpoint.save_async(path, {"iteration": 1, **arrays}, metadata={"epoch": 2})
    for array in (arrays["a"], arrays["b"], arrays["t"]):
        array += 1
    assert not save.done
    assert not path.exists()
    gate.set()
    save.wait()
    assert save.done
    found = checkpoint.load(path)
    assert not any(np.asarray(found[name]).any() for name in arrays)
    assert checkpoint.inspect(path).metadata == {"epoch": 2}


def test_what_cannot_be_saved_is_refused_at_the_call(path):
    with pytest.raises(TypeError, match=r"state\['a'\]"):
        checkpoint.save_async(path, {"a": object()})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save_async(path, {}, keep=0)
    assert not background._pending


@pytest.mark.parametrize("second", ["save", "save_async", "load"])
def test_one_at_a_time_goes_to_a_path(path, gate, second):
    checkpoint.save_async(path, {"iteration": 1})
    threading.Timer(0.05, gate.set).start()
    if second == "load":
        assert checkpoint.load(path) == {"iteration": 1}
        return
    getattr(checkpoint, second)(path, {"iteration": 2})
    assert checkpoint.load(path) == {"iteration": 2}


def test_two_paths_do_not_wait_for_each_other(path, gate):
    first = checkpoint.save_async(path, {"iteration": 1})
    checkpoint.save(path.with_name("other"), {"iteration": 2})
    assert checkpoint.load(path.with_name("other")) == {"iteration": 2}
    assert not first.done


def test_many_threads_save_to_one_path(path):
    def work():
        for number in range(10):
            checkpoint.save_async(path, {"iteration": number})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checkpoint.load(path)["iteration"] == 9
    assert os.listdir(path.parent) == [path.name]
    assert not background._pending


def test_numbered_files_in_the_background(path):
    for number in range(4):
        checkpoint.save_async(path, {"iteration": number}, keep=2)
    assert checkpoint.load(path) == {"iteration": 3}
    assert sorted(os.listdir(path)) == ["000003.nadam", "000004.nadam"]


def test_an_error_is_raised_where_somebody_waits(path, failing):
    save = checkpoint.save_async(path, {})
    with pytest.raises(OSError, match="No space") as error:
        save.wait()
    assert error.value.__notes__ == [f"while saving {path} in the background"]
    failing.undo()
    checkpoint.save(path, {"iteration": 1})  # and nowhere else
    assert checkpoint.load(path) == {"iteration": 1}


@pytest.mark.parametrize("call", ["save", "save_async", "load"])
def test_an_error_is_raised_by_the_next_call(path, failing, call):
    other = path.with_name("other")
    failing.undo()
    checkpoint.save(other, {"iteration": 1})
    failing.setattr(container, "write", lambda *_: 1 / 0)
    save = checkpoint.save_async(path, {})
    save._thread.join()
    failing.undo()
    with pytest.raises(ZeroDivisionError):
        getattr(checkpoint, call)(other, *[{"iteration": 2}] * (call != "load"))
    assert checkpoint.load(other) == {"iteration": 1}  # nothing was begun, and the error comes once


def exits(program, path):
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


SLOW = """
import sys, time, numpy as np
from nadam import checkpoint
from nadam.checkpoint import container
def slowly(*args, write=container.write):
    time.sleep(0.3)
    write(*args)
container.write = slowly
checkpoint.save_async(sys.argv[1], {"iteration": 3})
print("end")
"""
FAILS = SLOW.replace("write(*args)\n", "raise OSError(28, 'No space left on device')\n", 1)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "1 / 0"])
def test_a_save_is_finished_before_exit(path, end):
    code, out, _ = exits(SLOW + end, path)
    assert (code, out) == ({"": 0, "sys.exit(3)": 3, "1 / 0": 1}[end], "end\n")
    assert checkpoint.load(path) == {"iteration": 3}


@pytest.mark.parametrize(
    "end", ["", "sys.exit(0)", "sys.stdout = None", "import atexit; atexit.register(print, 'last')"]
)
def test_an_error_that_nobody_saw_is_printed_and_sets_the_exit_code(path, end):
    code, out, err = exits(FAILS + end, path)
    assert code == 120
    assert out == "end\n" + "last\n" * ("last" in end)
    assert "No space left on device" in err
    assert f"while saving {path} in the background" in err
    assert "not saved, see above" in err
    assert not path.exists()


def test_an_error_that_somebody_saw_is_not_printed(path):
    code, _, err = exits(FAILS.replace("checkpoint.save_async(", "save = checkpoint.save_async(") + WAITS, path)
    assert (code, err) == (0, "")


WAITS = """
try:
    save.wait()
except OSError:
    pass
"""
FORKED = """
import json, os, signal, sys, threading
from nadam import checkpoint
from nadam.checkpoint import container
path, gate = sys.argv[1], threading.Event()
def held(*args, write=container.write):
    if threading.current_thread() is not threading.main_thread():
        gate.wait(60)
    write(*args)
container.write = held
save = checkpoint.save_async(path, {"iteration": 1})
read, write = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(30)  # rather than hang
    said = []
    for ask in (save.wait, lambda: save.done):
        try:
            ask()
        except RuntimeError as error:
            said.append(str(error))
    checkpoint.save(path, {"iteration": 2})
    gate.set()
    checkpoint.save_async(path + "2", {"iteration": 3}).wait()
    os.write(write, json.dumps([said, checkpoint.load(path), checkpoint.load(path + "2")]).encode())
    os._exit(0)
status = os.waitpid(child, 0)[1]
gate.set()
save.wait()
print(json.dumps([status, json.loads(os.read(read, 9999)), checkpoint.load(path), os.getpid()]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_none_of_it_and_does_not_hang(path):
    status, (said, first, second), last, parent = python(FORKED, path)
    assert status == 0
    assert said == [f"{path} is being saved by process {parent}, not by this one"] * 2
    assert (first, second, last) == ({"iteration": 2}, {"iteration": 3}, {"iteration": 1})
