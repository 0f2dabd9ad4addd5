"""The study of fewer bytes: its page shows what its record has, its comparisons are fair, and all of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("torch", "matplotlib", "scipy", "sklearn"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import convergence, fewer_bytes, fewer_bytes_report  # noqa: E402
from benchmarks.convergence_report import fingerprint  # noqa: E402

REDRAW = "python -m benchmarks.fewer_bytes --draw"
OURS = [name for name in fewer_bytes.CONTESTANTS if fewer_bytes_report.is_ours(name)]


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "docs" / "data" / "fewer_bytes.json").read_text())


def test_the_page_has_the_tables_and_the_picture_of_the_record(record):
    page = (ROOT / "docs" / "fewer-bytes.md").read_text()
    assert fewer_bytes_report.kept(record["parts"]) in page, REDRAW
    for key in fewer_bytes_report.TITLES:
        assert fewer_bytes_report.section(key, record["parts"][key]) in page, REDRAW
    assert f"(images/{fewer_bytes_report.PICTURE})" in page
    assert fingerprint(record) in (ROOT / "docs" / "images" / fewer_bytes_report.PICTURE).read_text(), REDRAW


@pytest.mark.parametrize("key", fewer_bytes_report.TITLES)
def test_each_format_trains_as_float32_does(record, key):
    runs = record["parts"][key]["runs"]
    assert all(len(runs[name]["held_out"]) == fewer_bytes.SEEDS[key] for name in runs)
    formats = [name for name in OURS if name != "bfloat16 alone"]
    assert [name for name in formats if not fewer_bytes_report.is_within(runs, name)] == []


def test_the_bytes_in_the_record_are_those_of_a_step(record):
    for name in OURS:
        if "nudged" not in name:
            assert fewer_bytes.counted(name) == record["parts"]["bytes"][name]


def test_all_of_a_seed_begin_alike_and_see_the_same_batches():
    task = fewer_bytes.task_of("conv")._replace(steps=3)

    def trained(name, lr, seed=1):
        contestant = fewer_bytes.CONTESTANTS[name]
        make = lambda params: contestant.make(params, seed=seed, lr=lr)  # noqa: E731
        return convergence.train(fewer_bytes.task_for(task, name), make, seed)

    still = {name: trained(name, 0.0) for name in (*OURS, "AdamW")}
    for name, found in still.items():
        like = "bfloat16 alone" if name.startswith("bfloat16") else name if "nudged" in name else "float32"
        assert found == still[like]
        # Weights of a rounding unit of bfloat16 apart.
        assert found["held_out"][0] == pytest.approx(still["float32"]["held_out"][0], rel=2**-8)
    assert trained("float32", 0.0, seed=2) != still["float32"]
    assert trained("float32", 1e-2) != still["float32"]


def test_nudged_weights_are_one_rounding_unit_higher():
    task = fewer_bytes.task_of("conv")
    made = []
    for name in ("float32", "float32, nudged"):
        fewer_bytes.torch.manual_seed(0)
        made.append(fewer_bytes.task_for(task, name).make())
    for before, after in zip(*(model.parameters() for model in made), strict=True):
        assert (after > before).all()
        assert (after <= before + before.abs() * 2**-23).all()


def test_within_is_the_mean_between_the_least_and_the_largest_seed_of_float32():
    def runs(*losses):
        return {"held_out": [[9.0, loss] for loss in losses]}

    found = {"float32": runs(1.0, 2.0, 4.0), "AdamW": runs(1.0, 1.1, 1.2), "a": runs(2.0, 4.0, 5.9)}
    found |= {"b": runs(1.0, 1.0, 0.9), "AdamW8bit": runs(1.0, 1.0, 2.0), "c": runs(1.0, 2.0, None)}
    within = {name: fewer_bytes_report.is_within(found, name) for name in found}
    assert within == {"float32": True, "AdamW": True, "a": True, "b": False, "AdamW8bit": False, "c": False}
    assert list(fewer_bytes_report.over(found, "a", "float32")) == pytest.approx([100, 100, 47.5])


def test_a_quick_run_records_and_draws_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fewer_bytes", "--quick", "--docs", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "data" / "fewer_bytes.json").read_text())
    assert found["parts"].keys() == {*fewer_bytes.PARTS}
    assert (tmp_path / "images" / fewer_bytes_report.PICTURE).exists()
    assert fewer_bytes_report.section("conv", found["parts"]["conv"]) in done.stdout


def test_a_quick_run_does_not_take_the_place_of_the_record():
    command = [sys.executable, "-m", "benchmarks.fewer_bytes", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 2
    assert "--docs" in done.stderr
