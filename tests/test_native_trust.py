"""Compiled kernels on disk: machine code that somebody else can have written is not loaded, and nothing hangs."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from nadam.kernels.cpu import disk
from test_native import KERNELS, files, steps

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes of files")
SOMEBODY, ELSE = 12345, 54321
only_root = pytest.mark.skipif("os.geteuid() != 0", reason="only root gives files away")
ONCE = r"^(?!(.*\n)*.*RuntimeWarning(.*\n)*.*RuntimeWarning)(.*\n)*.*RuntimeWarning: "  # for all of the process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a cache that a process has filled, what that process printed)."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, steps(cache)


@pytest.fixture
def cache(made):
    """A copy of the full cache, in a folder that everybody can come to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(shutil.copytree(made[0], Path(folder) / "cache"))


def test_a_trusted_cache_is_loaded(made, cache):
    assert steps(cache)["compiled"] == 0


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777], ids=oct)
def test_a_folder_that_others_can_write_to_is_not_used(made, cache, mode):
    files(cache)[0].unlink()
    left = files(cache)
    cache.chmod(mode)
    result = steps(cache, warned=rf"{ONCE}{cache}: others can write to it \(mode {mode:o}\)")
    assert result["compiled"] == KERNELS  # nothing read
    assert files(cache) == left  # nothing written
    assert result["bits"] == made[1]["bits"]


@only_root
def test_a_folder_of_somebody_else_is_not_used(made, cache):
    os.chown(cache, SOMEBODY, -1)
    result = steps(cache, warned=f"{ONCE}{cache}: user {SOMEBODY} owns it")
    assert result["compiled"] == KERNELS
    assert result["bits"] == made[1]["bits"]


@pytest.mark.parametrize("mode", [0o660, 0o602], ids=oct)
def test_a_file_that_others_can_write_to_is_replaced(made, cache, mode):
    for path in files(cache):
        path.chmod(mode)
    result = steps(cache, warned=rf"{ONCE}{cache}/\S+.kernel: others can write to it \(mode {mode:o}\)")
    assert result["compiled"] == KERNELS
    assert result["bits"] == made[1]["bits"]
    assert steps(cache)["compiled"] == 0


@only_root
def test_a_file_of_somebody_else_is_replaced(made, cache):
    for path in files(cache):
        os.chown(path, SOMEBODY, -1)
    assert steps(cache, warned=rf"{ONCE}{cache}/\S+.kernel: user {SOMEBODY} owns it")["compiled"] == KERNELS
    assert steps(cache)["compiled"] == 0


@only_root
def test_what_root_keeps_is_loaded_by_everybody(made, cache, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    monkeypatch.setenv("NADAM_CACHE_DIR", str(cache))
    monkeypatch.setattr(disk, "_warned", True)
    path = files(cache)[0]
    assert disk.folder() == cache
    assert disk.read(path)
    os.chown(path, SOMEBODY, -1)
    assert disk.read(path)
    os.chown(path, ELSE, -1)
    assert disk.read(path) is None
    os.chown(cache, ELSE, -1)
    assert disk.folder() is None


def test_a_link_to_a_file_of_ones_own_is_followed(made, cache):
    for path in files(cache):
        path.symlink_to(path.rename(cache.parent / path.name))
    assert steps(cache)["compiled"] == 0


def test_a_link_to_a_file_that_others_can_write_to_is_not(made, cache):
    for path in files(cache):
        target = path.rename(cache.parent / path.name)
        target.chmod(0o666)
        path.symlink_to(target)
    assert steps(cache, warned="others can write to it")["compiled"] == KERNELS
    assert steps(cache)["compiled"] == 0  # from a file in the link's place


PLACED = {"pipe": lambda path: os.mkfifo(path, 0o600), "device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("put", PLACED.values(), ids=PLACED)
def test_what_is_no_file_is_replaced(made, cache, put):
    for path in files(cache):
        path.unlink()
        put(path)
    result = steps(cache, warned=rf"{ONCE}{cache}/\S+.kernel: not a regular file", timeout=60)
    assert result["compiled"] == KERNELS
    assert steps(cache)["compiled"] == 0


def test_a_file_of_unreasonable_size_is_replaced(made, cache):
    for path in files(cache):
        kernel = path.read_bytes()[32:]
        assert len(kernel) < disk.LARGEST / 50
        for size in (disk.LARGEST, disk.LARGEST + 1):
            content = kernel.ljust(size - 32, b"\0")
            path.write_bytes(hashlib.sha256(content).digest() + content)
            assert disk.read(path) == (content if size == disk.LARGEST else None)
    assert steps(cache)["compiled"] == KERNELS
    assert steps(cache)["compiled"] == 0


def test_what_is_looked_at_is_what_is_read(made, cache, monkeypatch):
    path, trusted = files(cache)[0], cache / "trusted"
    shutil.copy(path, trusted)
    path.chmod(0o666)
    opened = os.open

    def exchanged(*args):
        descriptor = opened(*args)
        trusted.replace(path)
        return descriptor

    monkeypatch.setattr(disk, "_warned", False)
    monkeypatch.setattr(os, "open", exchanged)
    with pytest.warns(RuntimeWarning, match="others can write to it"):
        assert disk.read(path) is None
