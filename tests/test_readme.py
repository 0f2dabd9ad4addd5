"""The README has a program for each host, and CI runs every command in it; test_docs.py runs the programs."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def host(block):
    """The framework whose host a program imports."""
    return re.search(r"^(?:from|import) nadam\.?(\w*)", block, re.MULTILINE)[1] or "numpy"


def test_each_host_has_a_program():
    assert list(map(host, BLOCKS)) == ["numpy", "torch", "keras", "jax"]  # the first is what CI runs from the wheel


def test_the_chart_has_the_figures_of_the_tables(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import draw_loops

    panels = draw_loops.read((ROOT / "docs" / "performance.md").read_text())
    assert all(len(rows) >= 10 for rows in panels.values())
    chart = unescape((ROOT / "docs" / "images" / "loops.svg").read_text())
    assert json.dumps(panels) in chart, "python examples/draw_loops.py --out docs/images"


def test_ci_runs_every_command_in_it():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    assert {"make demo", "make test", "pip install ."} <= set(commands)
    for command in commands:
        words = re.escape(command).replace("\\ ", ".* ")  # options may stand between them
        assert re.search(rf"(^|\W){words}(\s|$)", ci, re.MULTILINE), command


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "src/nadam/kernels/README.md"])
def test_the_files_it_names_are_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_everything_public_is_there():
    import nadam

    assert set(nadam.__all__) <= set(dir(nadam))
    assert all(getattr(nadam, name) is not None for name in nadam.__all__)
    with pytest.raises(AttributeError, match="'nadam' has no attribute 'Adam'"):
        nadam.Adam  # noqa: B018
