"""Mutated checkpoint files and states, given to what loads them, for seconds: `python tests/fuzz.py 60`.

Each is loaded or refused by a ValueError, in little memory, and meanwhile no code runs, nothing is imported and no
process started. Hypothesis makes the choices: what fails is shrunk, printed and ends it.
"""

import copy
import os
import sys
import tempfile
import time
import tracemalloc
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

import nadam
from files import BEGINNING, framed, signed
from nadam import checkpoint
from nadam.bench.checkpoints import no_fsync

os.environ.setdefault("KERAS_BACKEND", "torch")
SLACK = 1_000_000  # bytes, beside ten times the file: of errors and their tracebacks, and of a tensor's memory
EXECUTES = {"exec", "compile", "import", "marshal.loads", "code.__new__", "pickle.find_class", "ctypes.dlopen"}
EXECUTES |= {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect"}
ODD = [None, True, -1, 2**70, float("nan"), "x", [], {}, (), np.zeros(2), np.array(["x"])]

executed = None  # what ran while something was loaded; None while nothing is


@lru_cache
def listening():
    """Audit what runs, once in a process: hooks stay."""
    sys.addaudithook(listen)


def listen(event, args):
    if executed is not None and event in EXECUTES:
        executed.append((event, str(args)[:200]))


@contextmanager
def watched(size=0):
    """Fails if what is done within runs code, or takes more than ten times a file of a size in bytes."""
    global executed
    tracemalloc.start()
    executed = []
    try:
        yield
    finally:
        ran, executed = executed, None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not ran, ran
        assert peak < 10 * size + SLACK, (peak, size)


def mutated(draw, value):
    """A copy of a nested state with one place of it removed, replaced, or changed in one element."""
    value = copy.deepcopy(value)
    place, key = None, None
    inner = value
    while isinstance(inner, (dict, list)) and inner and (place is None or draw.random() < 0.8):
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        place, inner = inner, inner[key]
    if hasattr(inner, "dtype") and draw.random() < 0.5:  # an array or a tensor
        inner.reshape(-1)[: draw.randint(0, 2)] = draw.choice([0, 1, 2])
    elif draw.random() < 0.3:
        del place[key]
    else:
        place[key] = copy.deepcopy(draw.choice(ODD))
    return value


def fuzz_files(draw, path):
    """Bytes of the file, or of a header under a right digest."""
    many = [0.5, {}, [], "x"][draw.randrange(4)]
    state = {"a": {"w": np.ones(3), "t": (1, {2: np.int8(1)})}, "b": [np.zeros((2, 2), "f"), 0.5]}
    checkpoint.save(path, {**state, "c": [many] * draw.choice([0] * 9 + [30_000])})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    resign = draw.random() < 0.8
    for _ in range(draw.randint(1, 3)):
        first, last = (8 + len(BEGINNING), 8 + length) if resign else (0, len(content))
        content[draw.randrange(first, last)] = draw.choice(b'0129-[]{}:,"\\aU.')
    if resign:
        content = framed(signed(bytes(content[8 : 8 + length])), bytes(content[8 + length :]))
    path.write_bytes(bytes(content))
    with watched(len(content)):
        checkpoint.load(path)


def fuzz_numpy(draw, path):
    params = [np.ones(3), np.ones((2, 2))]
    optimizer = nadam.Nadam(use_ema=True)
    optimizer.apply([np.ones_like(p) for p in params], params)
    state = mutated(draw, optimizer.state_dict())
    with watched():
        optimizer.load_state_dict(state)
    optimizer.apply([np.ones_like(p) for p in params], params)


def fuzz_torch(draw, path):
    import torch

    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = nadam.torch.NAdam(params, use_ema=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = mutated(draw, optimizer.state_dict())
    with watched():
        optimizer.load_state_dict(state)
    with suppress(ValueError, TypeError):  # settings, which are checked where a step uses them, as they can be edited
        optimizer.step()


def fuzz_keras(draw, path):
    import keras

    params = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    optimizer, store = nadam.keras.Nadam(), {}
    optimizer.build(params)
    optimizer.save_own_variables(store)
    labelled = draw.random() < 0.5
    state = mutated(draw, {name: value if labelled else np.array(value) for name, value in store.items()})
    with watched():
        optimizer.load_own_variables(state)


def fuzz_resumed(draw, path):
    """The state of an optimizer, changed in a file that is whole."""
    params = {"w": np.ones(3), "v": np.ones((2, 2))}
    optimizer = nadam.Nadam(use_ema=True)
    optimizer.apply({name: np.ones_like(p) for name, p in params.items()}, params)
    checkpoint.save(path, optimizer, params)
    checkpoint.save(path, mutated(draw, checkpoint.load(path)))
    with watched(path.stat().st_size):
        checkpoint.load(path, nadam.Nadam(use_ema=True), params)


TARGETS = {
    "files": fuzz_files,
    "resumed": fuzz_resumed,
    "NumPy": fuzz_numpy,
    "torch": fuzz_torch,
    "keras": fuzz_keras,
}


def rounds(target, path, counts, seed, examples):
    """Draw examples, counted as refused or loaded."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.randoms(use_true_random=False))
    def run(draw):
        try:
            target(draw, path)
            counts[1] += 1
        except ValueError:
            counts[0] += 1

    run()


def main(seconds, seed=0):
    """How many calls of each target were refused, and how many loaded, with seeds from one on."""
    listening()
    counts = {}
    for module in ("ml_dtypes", "torch"):  # whose dtypes a file may name
        if find_spec(module):
            import_module(module)
    targets = [name for name in TARGETS if name not in ("torch", "keras") or find_spec(name)]
    with tempfile.TemporaryDirectory() as folder, no_fsync(), warnings.catch_warnings(action="ignore"):
        for name in targets:
            counts[name] = [0, 0]
            end = time.monotonic() + seconds / len(targets)
            while time.monotonic() < end:
                seed += 1
                rounds(TARGETS[name], Path(folder) / "run.nadam", counts[name], seed, 50)
    return counts


if __name__ == "__main__":
    begin = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**32
    print(f"again: python tests/fuzz.py SECONDS {begin}")
    for name, (refused, loaded) in main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, begin).items():
        print(f"{name}: {refused} refused, {loaded} loaded")
