"""How a checkpoint file takes its place: nothing is left of killed saves, modes are kept, symbolic links followed."""

import errno
import os
import stat

import pytest

from nadam import checkpoint
from nadam.checkpoint import atomic
from test_files import SAVING, python

pytest.importorskip("fcntl")

OLD, NEW = {"iteration": 1}, {"iteration": 2}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def replaced(path):
    checkpoint.save(path, NEW)
    assert checkpoint.load(path) == NEW


# Each child saves on from what it finds, until it is killed; now and then nobody saves after it.
KILLED = """
def work():
    for iteration in range(load() + 1, 10**9):
        save(iteration)
draw = random.Random(7)
left = []
for _ in range(100):
    killed(work, draw.uniform(0.0, 0.03))
    left.append(len(os.listdir(os.path.dirname(path))) - 1)
last = load()
save(last + 1)
print(json.dumps([left, os.listdir(os.path.dirname(path)), load() - last]))
"""
# Five processes save to one path; two of them are killed.
TOGETHER = """
def child(number):
    process = os.fork()
    if process == 0:
        for _ in range(100):
            save(number)
        os._exit(0)
    return process
children = [child(number) for number in range(5)]
time.sleep(0.1)
for process in children[:2]:
    os.kill(process, signal.SIGKILL)
ends = [os.waitpid(process, 0)[1] for process in children]
save(9)
print(json.dumps([ends, os.listdir(os.path.dirname(path)), load()]))
"""


def test_nothing_is_left_of_a_hundred_killed_saves(path):
    left, names, more = python(SAVING + KILLED, path)
    assert sum(left) > 20
    assert max(left) == 1
    assert (names, more) == ([path.name], 1)


def test_processes_save_to_one_path_at_once(path):
    assert python(SAVING + TOGETHER, path) == [[9, 9, 0, 0, 0], [path.name], 9]


def leftover(path, name="0123abcd"):
    file = path.parent / f".{path.name}.{name}.tmp"
    file.write_bytes(b"half")
    return file


def test_only_leftovers_of_the_same_target_are_removed(path):
    others = [
        path.parent / ".run.nadam.tmp",
        path.parent / ".run.nadam.notes.tmp",
        path.parent / "run.nadam.0123abcd.tmp",
        leftover(path.parent / "run.nadam.0123abcd"),
        leftover(path.parent / "run"),
        leftover(path.parent / "run_nadam"),
    ]
    for other in others:
        other.write_bytes(b"mine")
    mine = leftover(path)
    replaced(path)
    assert not mine.exists()
    assert sorted(path.parent.iterdir()) == sorted([path, *others])


def test_what_another_is_writing_is_not_removed(path):
    with atomic.replacing(path) as file:
        file.write(b"slow")
        replaced(path)
        assert len(os.listdir(path.parent)) == 2
    assert path.read_bytes() == b"slow"
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(path, monkeypatch):
    import fcntl

    calls = []

    def flock(handle, how, lock=fcntl.flock):
        if not calls:
            calls.append(how)
            atomic._remove_leftovers(path)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    replaced(path)
    assert calls == [fcntl.LOCK_EX]  # there was something to lock, and it was removed before it was
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("lock", [OSError(errno.ENOLCK, "No locks available"), None], ids=["no locks", "Windows"])
def test_without_locks_nothing_is_removed(path, monkeypatch, lock):
    def flock(*_):
        raise lock

    if lock is None:
        monkeypatch.setattr(atomic, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    other = leftover(path)
    replaced(path)
    replaced(path)
    assert sorted(path.parent.iterdir()) == sorted([path, other])


def test_windows_replaces_a_file_that_is_closed(path, monkeypatch):
    def replace(source, target, replace=os.replace):
        assert not any(os.path.realpath(f"/proc/self/fd/{fd}") == source for fd in os.listdir("/proc/self/fd"))
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("open files are not listed here")
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(os, "replace", replace)
    replaced(path)


@pytest.fixture(params=[0o022, 0o077], ids=["umask 022", "umask 077"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_mode_of_a_new_file_is_by_the_umask(path, umask):
    replaced(path)
    assert mode(path) == 0o666 & ~umask


@pytest.mark.parametrize("given", [0o644, 0o600, 0o664, 0o666, 0o444, 0o755, 0o640])
def test_the_mode_of_a_file_is_kept(path, umask, given):
    checkpoint.save(path, OLD)
    os.chmod(path, given)
    with atomic.replacing(path):
        (temporary,) = set(path.parent.iterdir()) - {path}
        assert mode(temporary) & ~given & ~stat.S_IRUSR == 0  # nobody reads meanwhile who cannot later
    replaced(path)
    assert mode(path) == given


def test_a_file_system_without_modes(path, monkeypatch):
    def chmod(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    checkpoint.save(path, OLD)
    monkeypatch.setattr(os, "chmod", chmod)
    replaced(path)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "dangling"])
def test_a_symbolic_link_stays(tmp_path, absolute, there):
    folder, links = tmp_path / "data", tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    target, link, second = folder / "run.nadam", links / "latest", links / "second"
    if there:
        checkpoint.save(target, OLD)
    link.symlink_to(target if absolute else "../data/run.nadam")
    second.symlink_to("latest")
    other = leftover(target)
    replaced(second)
    assert checkpoint.load(target) == NEW
    assert link.is_symlink()
    assert second.is_symlink()
    assert not target.is_symlink()
    assert not other.exists()
    assert sorted(os.listdir(links)) == ["latest", "second"]


def test_links_in_a_circle(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        checkpoint.save(one, NEW)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert one.is_symlink()


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="not a regular file"):
            checkpoint.save(tmp_path / name, NEW)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


# In a folder of one's own with such rights; nobody's, since root may write everywhere.
FOLDER = """
import json, os, sys, tempfile
from nadam import checkpoint
with tempfile.TemporaryDirectory() as folder:
    checkpoint.save(folder + "/run.nadam", {})  # nobody may be unable to import what a save needs
    os.unlink(folder + "/run.nadam")
    os.chmod(folder, int(sys.argv[1], 8))
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        result = checkpoint.save(folder + "/run.nadam", {"iteration": 2})
    except OSError as error:
        result = type(error).__name__
    os.chmod(folder, 0o700)
    print(json.dumps([result, os.listdir(folder)]))
    os.seteuid(os.getuid())
"""


@pytest.mark.parametrize("rights", ["700", "300", "500", "600"])
def test_rights_of_the_folder(rights):
    writable = rights in ("700", "300")
    assert python(FOLDER, rights) == ([None, ["run.nadam"]] if writable else ["PermissionError", []])
