"""What the README shows runs, and every command in it is one that CI runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_in_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "StepReport(step=100" in capsys.readouterr().out
    assert (tmp_path / "run.nadam").exists()


@pytest.mark.parametrize("page", ["torch", "jax"])
def test_the_python_in_the_documentation_runs(page, tmp_path, monkeypatch):
    pytest.importorskip(page)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), {"__name__": "documentation"})


def test_ci_runs_every_command_in_it():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    assert {"make demo", "make test", "pip install ."} <= set(commands)
    for command in commands:
        words = re.escape(command).replace("\\ ", ".* ")  # options may stand between them
        assert re.search(rf"(^|\W){words}(\s|$)", ci, re.MULTILINE), command


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md", "src/nadam/kernels/README.md"])
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
