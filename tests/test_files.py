"""Checkpoint files: whole or not at all, refused when damaged, and training goes on from them bit for bit."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

import nadam
from nadam import checkpoint

ARRAYS = {
    "float32": np.linspace(-1, 1, 7, dtype=np.float32).reshape(7, 1),
    "float64": np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1.5]),
    "nan": np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32),  # each has bits of its own
    "complex": np.array([[1 + 2j, -0.0j]]),
    "int": np.array([2**62, -1]),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 3)),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


@pytest.fixture
def saved(path):
    checkpoint.save(path, {"iteration": 3, "state": {"w": {"exp_avg": np.arange(4.0)}}})
    return path.read_bytes()


def exact(value):
    """A tree in which equal means of one type and, for arrays, bit for bit."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else (type(value), value)


def test_a_round_trip_is_exact(path):
    tree = {"a": {"b": {"c": ARRAYS}, "": {}}, "float": 0.1, "none": None, "yes": True, "list": [1, "é"], "big": 2**70}
    checkpoint.save(path, tree)
    assert exact(checkpoint.load(path)) == exact(tree)


def test_bfloat16_stays_bfloat16(path):
    tree = {"weights": np.arange(4).astype(pytest.importorskip("ml_dtypes").bfloat16)}
    checkpoint.save(path, tree)
    assert exact(checkpoint.load(path)) == exact(tree)


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not a nadam checkpoint") as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


def test_no_damage_goes_unseen(path, saved):
    draw, end = np.random.default_rng(1), len(saved)
    for position in {*range(200), *range(end - 40, end), *draw.choice(end, 150).tolist()}:
        flipped = bytes([saved[position] ^ 1 << draw.integers(8)])
        refusal(path, saved[:position] + flipped + saved[position + 1 :])
    for position in {*range(64), *range(0, end, 64), *range(end - 40, end)}:
        refusal(path, saved[:position])
    for content in (saved + b"\0", saved[19:], b"PK\3\4"):
        refusal(path, content)


def test_what_is_damaged_is_said(path, saved):
    path.write_bytes(saved[:-1] + b"x")
    with pytest.raises(ValueError, match=r"tensor 'state/w/exp_avg' is damaged: expected XXH3 \w{32}, found \w{32}$"):
        checkpoint.load(path)
    path.write_bytes(saved[:-1])
    with pytest.raises(ValueError, match=rf"the tensors end at byte {len(saved)}, the file at {len(saved) - 1}"):
        checkpoint.load(path)
    path.write_bytes(saved[:100] + b"x" + saved[101:])
    with pytest.raises(ValueError, match=r"the header is damaged: expected XXH3 \w{32}, found \w{32}$"):
        checkpoint.load(path)


def test_a_missing_file_is_not_found(path):
    with pytest.raises(FileNotFoundError, match=r"run\.nadam"):
        checkpoint.load(path)


def test_a_missing_directory_is_an_error(path):
    with pytest.raises(OSError, match="missing"):
        checkpoint.save(path.parent / "missing" / "run.nadam", {"iteration": 1})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", ["os.fdopen", "nadam.checkpoint.container.write", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(path, saved, monkeypatch, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(name, fail)
    with pytest.raises(type(error)):
        checkpoint.save(path, {"iteration": 4})
    assert path.read_bytes() == saved
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([None, "x"])], ids=["object", "set", "array of objects"])
def test_what_cannot_be_saved_leaves_the_old_file(path, saved, value):
    with pytest.raises((TypeError, ValueError)):
        checkpoint.save(path, {"iteration": 4, "state": {"w": value}})
    assert path.read_bytes() == saved
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupt_after_the_new_file_is_there_stays_one(path, saved, monkeypatch):
    def replace_and_interrupt(*args, replace=os.replace):
        replace(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"iteration": 4})
    assert checkpoint.load(path) == {"iteration": 4}
    assert os.listdir(path.parent) == [path.name]


SAVING = """
import json, os, random, resource, signal, sys, time
import numpy as np
from nadam import checkpoint
from nadam.checkpoint import container
path = sys.argv[1]
def save(iteration):
    checkpoint.save(path, {"iteration": iteration, "weights": np.full(50_000, float(iteration))})
def load():
    state = checkpoint.load(path)
    assert (state["weights"] == state["iteration"]).all()
    return state["iteration"]
def killed(work, delay=None):
    process = os.fork()
    if process == 0:
        work()
        os._exit(1)
    if delay:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    return load()
save(0)
"""
# Each child saves on from what it finds, until it is killed.
ANY_MOMENT = """
def work():
    for iteration in range(load() + 1, 10**9):
        save(iteration)
draw = random.Random(3)
print(json.dumps([killed(work, draw.uniform(0.002, 0.03)) for _ in range(50)]))
"""
# Each child is killed as it calls a function, or (the last) as it comes back from it.
ANY_STAGE = """
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def replace_and_die(*args, replace=os.replace):
    die(replace(*args))
def saving(module, name, function):
    setattr(module, name, function)
    save(1)
before = [(os, "fdopen", die), (container, "write", die), (os, "fsync", die), (os, "replace", die)]
print(json.dumps([killed(lambda: saving(*stage)) for stage in [*before, (os, "replace", replace_and_die)]]))
"""
FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: save(1)
except OSError: print(json.dumps([load(), os.listdir(os.path.dirname(path))]))
"""


def python(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_any_moment(path):
    found = python(SAVING + ANY_MOMENT, path)
    assert found == sorted(found)
    assert found[-1] > 0


def test_killed_at_any_stage(path):
    assert python(SAVING + ANY_STAGE, path) == [0, 0, 0, 0, 1]
    for leftover in set(path.parent.iterdir()) - {path}:
        with suppress(ValueError):  # or it is whole
            assert checkpoint.load(leftover)["iteration"] == 1


def test_a_full_disk_leaves_the_old_file(path):
    assert python(SAVING + FULL_DISK, path) == [0, [path.name]]


OPTIONS = {
    "nothing": {},
    "schedule": {"learning_rate": nadam.schedules.CosineDecay(0.1, 8, warmup_target=0.2, warmup_steps=3)},
    "betas, epsilon": {"beta_1": 0.7, "beta_2": 0.9, "epsilon": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 1.0},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite_frequency": {"use_ema": True, "ema_overwrite_frequency": 3},
    "loss_scale_factor": {"loss_scale_factor": 4.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, average": {"gradient_accumulation_steps": 3, "use_ema": True, "global_clipnorm": 1.0},
    "momentum_decay": {"momentum_decay": 0.004, "bias_correction": "adam"},
    "skip_nonfinite": {"skip_nonfinite": True},
    "dynamic loss scale": {},
}


def make(option, dtype):
    """An optimizer and its parameters."""
    params = {"w": np.ones((3, 5), dtype), "b": np.full(4, 2, dtype)}
    optimizer = nadam.Nadam(**{"learning_rate": 0.05, **OPTIONS[option]})
    if option == "dynamic loss scale":
        optimizer = nadam.LossScaleOptimizer(optimizer, 1024.0, dynamic_growth_steps=2)
    optimizer.build(params)
    return optimizer, params


def train(optimizer, params, calls):
    """Bits after calls whose gradients depend on the call alone: one is missing at times, or NaN if that is skipped."""
    for call in calls:
        draw = np.random.default_rng(call)
        phase = 1 + 2j if params["w"].dtype.kind == "c" else 1.0
        grads = {name: (phase * draw.normal(size=p.shape)).astype(p.dtype) for name, p in params.items()}
        grads["b"] = None if call % 3 == 2 else grads["b"]
        if call in (2, 6) and getattr(optimizer, "skip_nonfinite", True):
            grads["w"][1, 1] = np.nan
        optimizer.apply(grads)
    return [array.tobytes() for array in [*params.values(), *optimizer.variables]], optimizer.last_step


CASES = [(option, "float32") for option in OPTIONS]
CASES += [("accumulation, average", name) for name in ("float16", "bfloat16", "float64", "complex64", "complex128")]


@pytest.mark.parametrize("stop", [1, 5, 6])
@pytest.mark.parametrize(("option", "dtype"), CASES)
def test_training_goes_on(path, option, dtype, stop):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    expected = train(*make(option, dtype), range(9))
    optimizer, params = make(option, dtype)
    train(optimizer, params, range(stop))
    checkpoint.save(path, optimizer.state_dict())
    resumed, weights = make(option, dtype)
    for name, array in weights.items():
        array[...] = params[name]
    resumed.load_state_dict(checkpoint.load(path))
    assert train(resumed, weights, range(stop, 9)) == expected
