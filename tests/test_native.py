"""Compiled kernels on disk: used when whole and current, done without in every other case."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

import nadam
from nadam.core import element, gradient, rule, scalars
from nadam.kernels.cpu import disk, machine_code

# Three steps of a small model; what it prints is the result, and how it got its kernels.
STEPS = """
import hashlib, json, sys
import numpy as np
import nadam
draw = np.random.default_rng(7)
params = [np.zeros(300, np.float32), np.zeros((7, 5), np.float32)]
optimizer = nadam.Nadam(0.125)
for _ in range(3):
    optimizer.apply([draw.normal(size=p.shape).astype(np.float32) for p in params], params)
from nadam.kernels.cpu import disk
from nadam.kernels.cpu import machine_code
arrays = [*params, *optimizer.variables]
print(json.dumps({
    "bits": hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest(),
    "moved": params[0][:5].tolist(),
    "compiled": machine_code.compilations,
    "numba": "numba" in sys.modules,
}))
"""
KERNELS = 3  # that these steps need
NO_HOME = "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"
NO_WRITING = "import tempfile\ndef denied(**_): raise OSError(30, 'Read-only file system')\ntempfile.mkstemp = denied\n"
NO_RENAMING = "import os\ndef denied(*_): raise OSError(28, 'No space left')\nos.replace = denied\n"
READ_ONLY = """
import os, sys
from importlib.util import find_spec
home = os.path.dirname(find_spec("nadam").origin)

def refuse(event, args):
    changes = event in ("os.mkdir", "os.rename", "os.remove") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if changes and str(args[0]).startswith(home):
        print("wrote", args[0], file=sys.stderr)
        raise OSError(30, "Read-only file system")

sys.addaudithook(refuse)
"""
FULL_DISK = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"


def python(program, warned="", timeout=300, **environment):
    """What a process of its own prints as JSON, warning as said; a variable that is None is not set for it."""
    given = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    given = {name: str(value) for name, value in given.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert re.search(warned, done.stderr) if warned else done.stderr == ""
    return json.loads(done.stdout)


def steps(cache, before="", **options):
    return python(before + STEPS, NADAM_CACHE_DIR=cache, **options)


def files(cache):
    return sorted(Path(cache).iterdir())


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """(a cache that a first process has filled, what that process printed)."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, steps(cache)


@pytest.fixture
def warm(cold, tmp_path):
    """A full cache of the test's own."""
    return Path(shutil.copytree(cold[0], tmp_path / "warm"))


def test_a_cold_cache_is_filled(cold):
    cache, first = cold
    assert first["compiled"] == KERNELS
    assert first["numba"]
    assert len(files(cache)) == KERNELS
    assert all(disk.read(path) for path in files(cache))


def test_a_warm_cache_needs_no_compiler(cold):
    cache, first = cold
    assert steps(cache) == {**first, "compiled": 0, "numba": False}


def test_a_warm_cache_that_cannot_be_written_is_used(cold, warm):
    for path in files(warm):
        path.chmod(0o400)
    warm.chmod(0o500)
    again = steps(warm, NO_WRITING)
    warm.chmod(0o700)
    assert again["compiled"] == 0
    assert again["bits"] == cold[1]["bits"]


@pytest.mark.parametrize("before", [NO_WRITING, NO_RENAMING, FULL_DISK], ids=["read-only", "no rename", "full disk"])
def test_a_cache_that_takes_nothing_is_done_without(cold, tmp_path, before):
    result = steps(tmp_path, before)
    assert result["bits"] == cold[1]["bits"]
    assert result["compiled"] == KERNELS
    assert files(tmp_path) == []  # no part of a file either


def test_an_installation_that_is_read_only(cold, tmp_path):
    """Nothing is written into it, with a cold cache: what is tried is printed, which `python` takes for a failure."""
    assert steps(tmp_path, READ_ONLY) == cold[1]


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_is_no_directory_is_done_without(cold, tmp_path, place):
    (tmp_path / "file").write_text("here already")
    result = steps(tmp_path / "file" if place == "a file" else tmp_path / "file" / "cache")
    assert result["bits"] == cold[1]["bits"]
    assert (tmp_path / "file").read_text() == "here already"


def test_no_home_is_done_without(cold):
    result = steps(None, NO_HOME, HOME=None, XDG_CACHE_HOME=None)
    assert result["bits"] == cold[1]["bits"]
    assert result["compiled"] == KERNELS


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    if sys.platform in ("win32", "darwin"):
        pytest.skip("the XDG folders are for the other systems")
    monkeypatch.delenv("NADAM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.directory() == tmp_path / "nadam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk.directory() == tmp_path / ".cache" / "nadam"


def flip(content, position):
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


DAMAGE = {
    "empty": lambda content, draw: b"",
    "cut in the digest": lambda content, draw: content[:20],
    "cut by a byte": lambda content, draw: content[:-1],
    "one bit": lambda content, draw: flip(content, draw.randrange(8 * len(content))),
    "garbage": lambda content, draw: draw.randbytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_replaced(cold, warm, damage):
    draw = Random(1)
    whole = {path: path.read_bytes() for path in files(warm)}
    for path, content in whole.items():
        path.write_bytes(DAMAGE[damage](content, draw))
    result = steps(warm)
    assert result["compiled"] == KERNELS
    assert result["bits"] == cold[1]["bits"]
    assert files(warm) == sorted(whole)
    assert all(disk.read(path) for path in whole)


def test_a_directory_in_the_place_of_a_file_is_done_without(cold, warm):
    names = files(warm)
    for path in names:
        path.unlink()
        path.mkdir()
    assert steps(warm)["bits"] == cold[1]["bits"]
    assert files(warm) == names


def test_no_damage_goes_unseen(cold, tmp_path):
    draw = Random(2)
    path = tmp_path / "kernel"
    for source in files(cold[0]):
        content = source.read_bytes()
        path.write_bytes(content)
        assert disk.read(path) == content[32:]
        bits = [*range(64), *draw.sample(range(8 * len(content)), 200)]
        cuts = [*range(40), *draw.sample(range(len(content)), 100)]
        for damaged in [*(flip(content, bit) for bit in bits), *(content[:cut] for cut in cuts), content + b"\0"]:
            path.write_bytes(damaged)
            assert disk.read(path) is None


def test_a_changed_rule_is_never_served_from_an_old_cache(tmp_path):
    source, cache = tmp_path / "source", tmp_path / "cache"
    shutil.copytree(Path(nadam.__file__).parent, source / "nadam", ignore=shutil.ignore_patterns("__pycache__"))
    rule_file = source / "nadam" / "core" / "rule.py"
    text = rule_file.read_text()
    assert text.count("    return param") == 1

    old = steps(cache, PYTHONPATH=source)
    rule_file.write_text(text.replace("    return param", "    step = step + step\n    return param"))
    new = steps(cache, PYTHONPATH=source)
    np.testing.assert_allclose(new["moved"], 2 * np.array(old["moved"]), rtol=1e-6)
    rule_file.write_text(text)
    restored = steps(cache, PYTHONPATH=source)
    assert restored["bits"] == old["bits"]
    assert restored["compiled"] == 0


MATHEMATICS = [rule.update, gradient.clip_by_value, element.average, scalars.averaging]
MATHEMATICS += [scalars.coefficients, scalars.momentum, scalars.log]


@pytest.mark.parametrize("function", MATHEMATICS, ids=lambda f: f.__name__)
def test_a_file_is_named_after_the_mathematics(monkeypatch, function):
    before = machine_code._path("numba-one_pass")
    code = function.__code__.replace(co_consts=(*function.__code__.co_consts, 2.0))
    monkeypatch.setattr(function, "__code__", code)
    assert machine_code._path("numba-one_pass") != before
    monkeypatch.undo()
    assert machine_code._path("numba-one_pass") == before


def test_eight_cold_starts_at_once(cold, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(steps, [tmp_path / "cache"] * 8))
    assert {result["bits"] for result in results} == {cold[1]["bits"]}
    assert len(files(tmp_path / "cache")) == KERNELS
    assert all(disk.read(path) for path in files(tmp_path / "cache"))


def test_the_second_call_compiles_nothing():
    def train():
        params = [np.ones(10), np.ones((3, 4), np.float32)]
        nadam.Nadam(global_clipnorm=1.0, use_ema=True).apply([p + 1 for p in params], params)
        return machine_code.compilations, len(machine_code._engines)

    first = train()
    assert train() == first


def test_importing_brings_no_framework_and_no_compiler():
    heavy = ["numba", "llvmlite", "torch", "jax", "keras", "tensorflow", "optax", "scipy"]
    program = f"import json, sys, nadam\nprint(json.dumps([name for name in {heavy} if name in sys.modules]))"
    assert python(program) == []


def test_a_warm_step_brings_no_framework(cold):
    program = STEPS[: STEPS.index("from nadam.kernels")] + (
        "print(json.dumps([name for name in ['torch', 'jax', 'keras', 'tensorflow'] if name in sys.modules]))"
    )
    assert python(program, NADAM_CACHE_DIR=cold[0]) == []
