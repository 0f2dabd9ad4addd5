"""The example learns, goes on from its checkpoint as if unbroken, and leaves a checkpoint of the whole run."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

for module in ("equinox", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)
ocp = pytest.importorskip("orbax.checkpoint")

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "jax_mnist.py"
EPOCHS, BATCH = 3, 100


def run(*arguments):
    command = list(map(str, [sys.executable, EXAMPLE, *arguments]))
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "digits"
    done = run("--epochs", EPOCHS, "--batch-size", BATCH, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_it_learns_and_resumes_bit_for_bit(ran):
    _, done = ran
    number = r"([\d.]+)"
    pattern = rf"^epoch (\d): loss {number}, held-out accuracy {number}%, of the averaged weights {number}%$"
    rows = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 2, 3]  # unbroken, then once more from the checkpoint
    losses, accuracies, averaged = ([float(row[i]) for row in rows] for i in (1, 2, 3))
    assert losses[2] < losses[1] < losses[0]
    assert min(accuracies[2], averaged[2]) > 75
    assert rows[1:3] == rows[3:]
    assert "the two runs are equal, bit for bit, in weights and state" in done.stdout
    assert re.match(r"JAX \S+ on \w+: about \d+ seconds", done.stdout)
    assert f"epoch {EPOCHS}" in done.stderr  # the progress
    assert "onated" not in done.stderr  # JAX warns of buffers that it could not use


def test_the_curves_are_drawn(ran):
    folder, _ = ran
    assert folder.with_name(f"{folder.name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_is_of_the_whole_run(ran):
    folder, done = ran
    images = int(re.search(r"(\d+) to train on", done.stdout)[1])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(folder)
    counts = [leaf for path, leaf in jax.tree.leaves_with_path(saved) if "count" in jax.tree_util.keystr(path)]
    assert [int(count) for count in counts] == [EPOCHS * (images // BATCH)]


def test_a_single_epoch_is_refused():
    done = run("--epochs", 1)
    assert done.returncode == 2
    assert "expected at least 2, to stop half-way" in done.stderr
