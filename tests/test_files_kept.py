"""Numbered files in a folder: the newest whole ones stay, the newest whole one is loaded."""

import os
import warnings

import numpy as np
import pytest

from nadam import checkpoint
from test_files import SAVING, python


def state(number):
    return {"iteration": number, "weights": np.full(100, float(number))}


def names(folder):
    return sorted(os.listdir(folder))


def damage(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "first"


def fill(folder, numbers, keep):
    for number in numbers:
        checkpoint.save(folder, state(number), keep=keep)


def test_the_newest_are_kept(folder):
    fill(folder, range(1, 6), 3)
    assert names(folder) == ["000003.nadam", "000004.nadam", "000005.nadam"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(folder)["iteration"] == 5
    assert checkpoint.load(folder / "000003.nadam")["iteration"] == 3
    fill(folder, [6], 1)
    assert names(folder) == ["000006.nadam"]


def test_numbers_go_on_and_other_files_stay(folder):
    folder.mkdir(parents=True)
    others = ["notes.txt", "12.nadam", "000002.nadam.bak", "x000003.nadam"]
    for name in others:
        (folder / name).write_text("mine")
    (folder / "999999.nadam").write_bytes(b"")
    fill(folder, range(3), 2)
    assert names(folder) == sorted([*others, "1000001.nadam", "1000002.nadam"])
    assert checkpoint.load(folder)["iteration"] == 2


def test_a_damaged_one_is_skipped_with_a_warning(folder):
    fill(folder, range(1, 4), 3)
    damage(folder / "000003.nadam")
    with pytest.warns(UserWarning, match=r"skipped .*000003\.nadam: tensor 'weights' is damaged: expected") as seen:
        assert checkpoint.load(folder)["iteration"] == 2
    assert [warning.filename for warning in seen] == [__file__]
    damage(folder / "000002.nadam", 100)
    (folder / "000001.nadam").write_bytes((folder / "000001.nadam").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000003\.nadam.*000002\.nadam: the header.*000001\.nadam: .*cut off"):
        checkpoint.load(folder)


def test_a_folder_without_files(folder):
    folder.mkdir(parents=True)
    (folder / "other").touch()
    with pytest.raises(FileNotFoundError, match=str(folder)):
        checkpoint.load(folder)


def test_what_is_not_whole_does_not_count(folder):
    fill(folder, range(1, 4), 3)
    for number in (2, 3):
        damage(folder / f"{number:06d}.nadam", 100)
    fill(folder, [4], 2)
    assert names(folder) == [f"{number:06d}.nadam" for number in (1, 2, 3, 4)]
    fill(folder, [5], 2)
    assert names(folder) == ["000004.nadam", "000005.nadam"]


@pytest.mark.parametrize("name", ["nadam.checkpoint.container.write", "os.fsync", "os.replace"])
def test_a_save_that_fails_removes_nothing(folder, monkeypatch, name):
    fill(folder, range(1, 4), 2)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(name, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, state(4), keep=1)
    assert names(folder) == ["000002.nadam", "000003.nadam"]


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "3"])
def test_keep_is_a_number_of_files(folder, keep):
    with pytest.raises(ValueError, match=r"keep=.*: expected an integer, keep >= 1"):
        checkpoint.save(folder, state(1), keep=keep)
    assert not folder.exists()


def test_a_folder_is_no_file_nor_a_file_a_folder(folder):
    fill(folder, [1], 1)
    with pytest.raises(OSError, match="not a regular file"):
        checkpoint.save(folder, state(2))
    with pytest.raises(OSError, match="exists"):
        checkpoint.save(folder / "000001.nadam", state(2), keep=1)
    assert names(folder) == ["000001.nadam"]


def test_a_link_to_a_folder_is_followed(folder):
    folder.mkdir(parents=True)
    link = folder.parent / "latest"
    link.symlink_to(folder)
    fill(link, [1, 2], 1)
    assert names(folder) == ["000002.nadam"]
    assert checkpoint.load(link)["iteration"] == 2


# Each child saves into the folder until it is killed.
KILLED = """
folder = path + "s"
def work():
    for iteration in range(10**9):
        checkpoint.save(folder, {"iteration": iteration, "weights": np.full(50_000, float(iteration))}, keep=2)
draw, found = random.Random(5), []
checkpoint.save(folder, {"iteration": 0, "weights": np.zeros(3)}, keep=2)
for _ in range(30):
    killed(work, draw.uniform(0.002, 0.03))
    state = checkpoint.load(folder)
    assert (state["weights"] == state["iteration"]).all()
    found.append(len([name for name in os.listdir(folder) if name[0] != "."]))
checkpoint.save(folder, {}, keep=2)
print(json.dumps([found, [name[-6:] for name in os.listdir(folder)]]))
"""
# Three processes save into one folder at once.
TOGETHER = """
folder = path + "s"
def child():
    process = os.fork()
    if process == 0:
        for _ in range(20):
            checkpoint.save(folder, {}, keep=100)
        os._exit(0)
    return process
ends = [os.waitpid(process, 0)[1] for process in [child() for _ in range(3)]]
print(json.dumps([ends, sorted(os.listdir(folder))]))
"""


def test_kills_leave_a_folder_that_loads(folder):
    pytest.importorskip("fcntl")
    folder.mkdir(parents=True)
    found, left = python(SAVING + KILLED, folder / "run")
    assert max(found) <= 3
    assert sum(found) > 30
    assert left == [".nadam"] * 2


def test_processes_that_save_together_take_numbers_of_their_own(folder):
    pytest.importorskip("fcntl")
    folder.mkdir(parents=True)
    ends, left = python(SAVING + TOGETHER, folder / "run")
    assert ends == [0, 0, 0]
    assert left == [f"{number:06d}.nadam" for number in range(1, 61)]
