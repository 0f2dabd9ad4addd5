"""The study of convergence: its page shows what its record has, its comparisons are fair, and all of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "matplotlib", "scipy", "sklearn"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import convergence, convergence_report  # noqa: E402

from test_published_run import DEVIATION, FIRST  # noqa: E402

PICTURES = {f"convergence-{name}.svg" for name in ("curves", "rates", "published")}
REDRAW = "python -m benchmarks.convergence --draw"


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "docs" / "data" / "convergence.json").read_text())


def test_the_page_has_the_tables_of_the_record(record):
    page = (ROOT / "docs" / "convergence.md").read_text()
    for key, part in convergence_report.parts_of(record).items():
        assert convergence_report.section(key, part) in page, REDRAW
    assert all(f"(images/{name})" in page for name in PICTURES)


def test_the_pictures_were_drawn_from_the_record(record):
    for name in PICTURES:
        assert convergence_report.fingerprint(record) in (ROOT / "docs" / "images" / name).read_text(), REDRAW


def test_the_published_run_in_the_record(record):
    part = record["parts"]["published"]
    for member, first in FIRST.items():
        found = np.array(part[member])[:, part["epochs"].index(1)]
        assert np.abs(found - first).max() < 4 * DEVIATION[1]


@pytest.mark.parametrize("part", ["mlp", "text-warmup"])
def test_all_optimizers_of_a_seed_have_the_same_weights_and_batches(part):
    task = convergence.TASKS[part]()._replace(steps=3)
    still = [convergence.run(task, name, 0.0, seed=1) for name in convergence.OPTIMIZERS]
    assert all(found == still[0] for found in still)
    assert convergence.run(task, "Adam", 0.0, seed=2) != still[0]
    assert convergence.run(task, "Adam", 1e-3, seed=1) != still[0]


def test_batches_have_every_row_once_before_any_a_second_time():
    rows = np.arange(10)
    task = convergence.Task(None, (rows, rows), (rows, rows), steps=10, batch=3)
    drawn = convergence.batches(task, seed=3)
    assert drawn.shape == (10, 3)
    assert all(sorted(some) == list(rows) for some in drawn.reshape(3, 10))


def test_the_best_rate_is_of_the_least_mean_and_never_one_that_diverged():
    runs = {
        "0.1": {"held_out": [[9.0, 2.0], [9.0, 2.0]]},
        "0.2": {"held_out": [[9.0, 1.0], [9.0, 2.0]]},
        "0.4": {"held_out": [[9.0, 0.1], [9.0, None]]},
    }
    assert convergence_report.best(runs) == "0.2"


def test_over_adam_is_seed_by_seed():
    def runs(*losses):
        return {"0.1": {"held_out": [[loss] for loss in losses]}}

    part = {"runs": {"Adam": runs(1.0, 2.0, 4.0), "SGD": runs(1.1, 2.2, 4.4)}}
    assert convergence_report.over_adam(part, "SGD") == pytest.approx((10.0, 0.0))
    part["runs"]["SGD"] = runs(1.1, 2.4, 5.2)
    # Student's t with two degrees of freedom, 4.3027, by 10 / sqrt(3).
    assert convergence_report.over_adam(part, "SGD") == pytest.approx((20.0, 24.84), abs=0.01)


def test_a_quick_run_records_and_draws_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks.convergence", "--quick", "--docs", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "data" / "convergence.json").read_text())
    assert found["parts"].keys() == {*convergence.PARTS}
    assert {path.name for path in (tmp_path / "images").iterdir()} == PICTURES
    assert convergence_report.section("mlp", convergence_report.parts_of(found)["mlp"]) in done.stdout


def test_a_quick_run_does_not_take_the_place_of_the_record():
    command = [sys.executable, "-m", "benchmarks.convergence", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2
    assert "--docs" in done.stderr
