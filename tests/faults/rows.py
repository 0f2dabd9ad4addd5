"""What each kind of bad input and each fault gives on each host, and what shows it: rows.txt.

A row is its number, what is given, an arrow and what it must give. Below it stands for each host, or for all hosts of
a framework, or for all, what shows it there: ``cases``, which are those of bad_input.py; tests, as ``file::function``
from the folder of tests, where more functions of the same file follow without it; or ``not:`` and why the row does not
apply. What a host's own name has goes before what its framework has, and that before what all have.
"""

import re
from pathlib import Path
from typing import NamedTuple

NAMES = ("numpy", "torch", "jax kernel", "jax transform", "keras torch", "keras jax", "keras tensorflow")
CASES, NOT = "cases", "not: "

# Files and what is wrong with them are the same for every host, since each saves by `nadam.checkpoint`: the patterns of
# the files that test them, beside what the rows have.
FILES = {
    23: "test_files_*.py",
    28: "test_files.py",
    29: "test_files.py",
    40: "test_files_*.py",
}


class Row(NamedTuple):
    given: str
    gives: str
    shown: dict  # by the name of a host or framework, or "all"


def read(text):
    rows = {}
    for block in text.strip().split("\n\n"):
        head, *lines = re.sub(r"\n {6}", " ", block).splitlines()
        number, given, gives = re.fullmatch(r"(\d+)\. (.+) -> (.+)", head).groups()
        assert int(number) not in rows
        rows[int(number)] = Row(given, gives, dict(re.fullmatch(r"  ([a-z ]+): (.+)", line).groups() for line in lines))
    return rows


ROWS = read(Path(__file__).with_suffix(".txt").read_text())


def shown(number, name):
    """What shows a row on a host: why it does not apply, CASES, tests with their files, patterns of files."""
    row, parts, file = ROWS[number].shown, [], None
    found = next((row[key] for key in (name, name.split()[0], "all") if key in row), "")
    if found.startswith(NOT):
        return [found]
    for word in found.split():
        whole = word if "::" in word or word == CASES else f"{file}::{word}"
        file = whole.partition("::")[0]
        parts.append(whole)
    return parts + ([FILES[number]] if number in FILES else [])
