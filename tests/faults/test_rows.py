"""The table of faults is complete, and every test that it names is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from faults import bad_input
from faults.rows import CASES, NAMES, NOT, ROWS, read, shown

TESTS = Path(__file__).parent.parent


@cache
def functions(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def wrong_with(number, name, parts):
    """What is wrong with what shows a row on a host."""
    cases = number in bad_input.rows(name)
    wrong = [] if parts else ["nothing"]
    wrong += ["cases that the table does not name"] if cases and CASES not in parts else []
    for part in parts:
        if part.startswith(NOT):
            continue
        if part == CASES:
            wrong += [] if cases else ["no cases"]
        elif "::" in part:
            file, _, function = part.partition("::")
            is_there = (TESTS / file).is_file() and function in functions(file) and function.startswith("test_")
            wrong += [] if is_there else [f"no {part}"]
        elif not list(TESTS.glob(part)):
            wrong.append(f"no file {part}")
    return wrong


def test_there_are_forty_rows():
    assert list(ROWS) == list(range(1, 41))
    keys = {"all", *NAMES, *(name.split()[0] for name in NAMES)}
    assert {key for row in ROWS.values() for key in row.shown} <= keys


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", ROWS)
def test_a_row_is_shown(number, name):
    assert wrong_with(number, name, shown(number, name)) == []


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ([], ["nothing"]),
        (["test_faults.py::test_that_is_not_there"], ["no test_faults.py::test_that_is_not_there"]),
        (["test_none.py::test_a_read_only_array"], ["no test_none.py::test_a_read_only_array"]),
        (["test_faults.py::trained"], ["no test_faults.py::trained"]),
        ([CASES], ["no cases"]),
        (["test_none_*.py"], ["no file test_none_*.py"]),
    ],
)
def test_a_gap_would_be_seen(parts, wrong):
    assert wrong_with(14, "numpy", parts) == wrong
    assert wrong_with(1, "numpy", [f"{NOT}a reason"]) == ["cases that the table does not name"]
    with pytest.raises(AttributeError):
        read("1. what is given -> what it gives\n  numpy:\n")
