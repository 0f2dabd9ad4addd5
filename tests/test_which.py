"""Every Nadam that is installed here is the one that docs/which.md says; and ours are all four, on every host."""

import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from nadam.conformance import identify

ROOT = Path(__file__).resolve().parent.parent


def from_examples(name):
    """Import a program of examples/."""
    spec = spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nadams = from_examples("nadams")
ROWS = {row.name: row for row in nadams.ROWS}
# Member, precision, and the cases that depart from it. Those of Keras and TensorFlow: keras/test_which_keras.py.
EXPECTED = {
    "torch.optim.NAdam": ("torch", "float32", set()),
    "torch.optim.NAdam, foreach=True": ("torch", "float32", set()),
    "optax.nadam": ("optax", "float64", set()),
    "optax.nadamw": ("optax", "float64", set()),
    "timm.optim.NAdamW": ("adam", "float64", set()),
    "timm.optim.NAdamLegacy": ("torch", "float64", set()),
    "heavyball.NAdam": ("torch", "float32", {"eps", "coupled_weight_decay"}),
    "paddle.optimizer.NAdam": ("torch", "float32", set()),
    "mindspore.experimental.optim.NAdam": ("torch", "float32", set()),
    "mxnet.optimizer.Nadam": ("torch", "float64", {"plain", "betas", "eps", "coupled_weight_decay"}),
}
EXPECTED |= {row.name: (row.member, "float64", set()) for row in nadams.OURS if row.library != "keras"}


@contextmanager
def of_row(name):
    """A row of the table, if it can run here; warnings of others are theirs."""
    row = ROWS[name]
    if sys.modules.get(row.library) is None and find_spec(row.library) is None:
        pytest.skip("not installed")
    with warnings.catch_warnings():
        if row.member is None:
            warnings.simplefilter("ignore")
        yield row


def check(name, expected):
    with of_row(name) as row:
        found = identify(row.make)
    assert (found.member, found.precision, set(found.departures)) == expected
    if row.member is not None and found.precision == "float64":
        assert max(found.ulps.values()) <= 4


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_the_one_that_the_table_says(name):
    check(name, EXPECTED[name])


def test_the_table_of_the_page_has_every_row():
    page = (ROOT / "docs" / "which.md").read_text()
    assert not [row.name for row in nadams.PEERS if f"`{row.name.partition(',')[0]}`" not in page]


def test_a_host_that_is_another_member_is_seen():
    with pytest.raises(AssertionError):
        check("nadam.Nadam as keras", EXPECTED["nadam.Nadam as torch"])


def example(name, *arguments):
    """What an example prints."""
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_example_prints_rows():
    lines = example("which_nadam.py", "nadam.Nadam as").splitlines()
    assert len(lines) == len(nadams.MEMBERS)
    assert re.fullmatch(r"nadam\.Nadam as optax \(numba [\d.]+\): optax's, within \d ulps of float64", lines[2])


def test_the_example_draws_both_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = [Path(line) for line in example("draw_family.py", "--out", tmp_path).splitlines()]
    assert sorted(path.name for path in drawn) == sorted(
        path.name for path in (ROOT / "docs" / "images").glob("family-*")
    )
    for path in drawn:
        assert path.read_text().count("AlgoPerf, timm, TensorFlow 1") >= 1
