"""The table of faults is complete, and every test that it names is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from faults import bad_input
from faults.rows import CASES, FILES, NAMES, ROWS, Not, shown

TESTS = Path(__file__).parent.parent


@cache
def functions(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def explained(number, name):
    """What explains a row on a host: CASES, tests, patterns of files, or why it does not apply."""
    found = shown(number, name)
    parts = [found] if isinstance(found, Not) else (found or "").split()
    return parts + ([FILES[number]] if number in FILES else [])


def unexplained(number, name, parts):
    """What is wrong with that."""
    cases = number in bad_input.rows(name)
    wrong = [] if parts else ["nothing"]
    wrong += ["cases that the table does not name"] if cases and CASES not in parts else []
    for part in parts:
        if isinstance(part, Not):
            wrong += [] if part.why else ["no reason"]
        elif part == CASES:
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
    assert set(bad_input.HOSTS) > set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", ROWS)
def test_a_row_is_explained(number, name):
    assert unexplained(number, name, explained(number, name)) == []
    keys = {"all", *NAMES, *(other.split()[0] for other in NAMES)}
    assert set(ROWS[number].shown) <= keys


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ([], ["nothing"]),
        (["test_faults.py::test_that_is_not_there"], ["no test_faults.py::test_that_is_not_there"]),
        (["test_none.py::test_a_read_only_array"], ["no test_none.py::test_a_read_only_array"]),
        (["test_faults.py::trained"], ["no test_faults.py::trained"]),
        ([CASES], ["no cases"]),
        ([Not("")], ["no reason"]),
        (["test_none_*.py"], ["no file test_none_*.py"]),
    ],
)
def test_a_gap_in_the_table_would_be_seen(parts, wrong):
    assert unexplained(14, "numpy", parts) == wrong
    assert unexplained(1, "numpy", [Not("a reason")]) == ["cases that the table does not name"]
