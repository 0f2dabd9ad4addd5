"""The metadata, the Makefile and the workflows name only what there is."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):.*## ", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def targets(script):
    """The targets of make that a script names."""
    lines = re.findall(r"(?:^|\s)make +([^#\n]*)", script)
    return {word for line in lines for word in line.split() if re.fullmatch(r"[a-z][a-z-]*", word)}


def test_extras_are_those_that_the_errors_and_the_readme_name():
    extras = PROJECT["project"]["optional-dependencies"]
    assert list(extras) == ["torch", "keras", "jax", "demo", "bench", "all"]
    assert extras["all"] == [f"nadam[{','.join(name for name in extras if name != 'all')}]"]
    named = re.findall(r"nadam\[([\w,]+)\]", (ROOT / "README.md").read_text())
    assert {name for names in named for name in names.split(",")} == {"torch", "keras", "jax", "bench"}


def test_what_the_makefile_installs_is_there():
    needs = re.findall(r"^NEEDS_[\w-]+ := (.*)$", MAKEFILE, re.MULTILINE)
    assert len(needs) >= 10
    for need in needs:
        for names in re.findall(r"'\.\[([\w,-]+)\]'", need):
            assert set(names.split(",")) <= PROJECT["project"]["optional-dependencies"].keys(), need
        assert set(re.findall(r"--group ([\w-]+)", need)) <= PROJECT["dependency-groups"].keys(), need


def test_the_pictures_of_the_demos_are_ignored_and_cleaned():
    ignored, clean = (ROOT / ".gitignore").read_text(), re.search(r"^clean:.*\n\trm (.*)", MAKEFILE, re.MULTILINE)[1]
    for name in ("demo.png", "torch_char_lm.png", "keras_mnist.png", "jax_mnist.png"):
        assert name in ignored
        assert name in clean or f"{Path(name).stem}.*" in clean


def test_ci_makes_targets_that_there_are():
    assert {"demo", "test", "lint", "package"} <= targets((ROOT / ".ci" / "run").read_text()) <= TARGETS


def test_the_pythons_are_those_of_the_classifiers():
    classifiers = PROJECT["project"]["classifiers"]
    assert [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)] == PYTHONS
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.15"


def test_the_oldest_versions_are_those_that_are_admitted():
    oldest = dict(re.findall(r"^([a-z]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["torch"], *extras["keras"], *extras["jax"]]
    for name, least in re.findall(r"^(\w+)>=([\d.]+)$", "\n".join(asked), re.MULTILINE):
        assert f"{oldest[name]}.".startswith(f"{least}."), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_make_targets_that_there_are(path):
    workflow = pytest.importorskip("yaml").safe_load(path.read_text())
    jobs = workflow["jobs"]
    for name, job in jobs.items():
        assert set(job.get("needs", [])) <= jobs.keys(), name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), name
            assert targets(step.get("run", "")) <= TARGETS, step
            assert "@" in step.get("uses", "@"), step
    everything = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert {"lint", "types", "docs", "test", "package"} <= targets(everything)
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    for entry in jobs["versions"]["strategy"]["matrix"]["include"]:
        assert Path(ROOT / entry["constraints"]).exists()
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert jobs["publish"]["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_a_missing_target_would_be_seen():
    assert not targets("make bogus\nmake lint ARGS=-x PYTHON=python") <= TARGETS
    assert WORKFLOWS
