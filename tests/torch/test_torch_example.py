"""The example that trains a transformer learns, draws its picture, and goes on after a kill as if unbroken."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "torch_char_lm.py"
STEPS, EVERY = 20, 10


def start(folder, name, *arguments):
    command = [sys.executable, EXAMPLE, "--steps", STEPS, "--every", EVERY, "--checkpoint", folder / f"{name}.pt"]
    command += ["--out", folder / f"{name}.png", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out


def checkpoint(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    return folder, output(start(folder, "unbroken"))


@pytest.fixture(scope="module")
def resumed(unbroken):
    folder, _ = unbroken
    process = start(folder, "resumed")
    deadline = time.monotonic() + 120
    while not (folder / "resumed.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = len(checkpoint(folder, "resumed")["losses"])
    assert 0 < done < STEPS, "killed too late"
    return folder, done, output(start(folder, "resumed"))


def test_loss_falls_and_the_curve_is_drawn(unbroken):
    folder, text = unbroken
    losses = checkpoint(folder, "unbroken")["losses"]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    rows = re.findall(r"^(?:averaged )?weights +(\d+\.\d+) +(\d+\.\d+)$", text, re.MULTILINE)
    assert len(rows) == 2
    assert all(float(value) < losses[0] for row in rows for value in row)
    assert re.search(r"^twice 20 steps: about \d+ seconds", text)
    assert (folder / "unbroken.png").read_bytes().startswith(b"\x89PNG")


def test_its_loss_is_that_of_stock(unbroken):
    _, text = unbroken
    ours, theirs = map(
        float, re.search(r"^loss of the last \d+ batches: (\S+), with torch.*? (\S+)$", text, re.M).groups()
    )
    assert abs(ours - theirs) < 0.02  # 1e-6 in clip_grad_norm_, and what training makes of it


def equal(one, other):
    """Whether two checkpoints, or parts of them, are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(resumed):
    folder, done, text = resumed
    assert f"goes on from step {done}\n" in text
    ended, expected = checkpoint(folder, "resumed"), checkpoint(folder, "unbroken")
    for name, weight in expected["model"].items():
        assert torch.equal(ended["model"][name], weight), name
    assert ended.keys() == expected.keys()
    for part in expected:
        assert equal(ended[part], expected[part]), part


def test_a_checkpoint_of_another_run_is_refused(unbroken):
    folder, _ = unbroken
    process = start(folder, "unbroken", "--seed", "1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "of a run with other steps, another seed or another text" in err
