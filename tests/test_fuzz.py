"""`make fuzz`, for two seconds, and that it fails where it should."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")

import fuzz


def test_mutations_are_refused_or_load():
    counts = fuzz.main(2.0)
    assert counts["files"][0] > 10
    assert counts["NumPy"][0] > 3
    for refused, loaded in counts.values():
        assert refused
        assert loaded


@pytest.mark.parametrize(
    "work", [lambda: eval("1 + 1"), lambda: __import__("this_is_not_there"), lambda: np.ones(2 * fuzz.SLACK)]
)
def test_what_executes_or_takes_memory_fails(work, tmp_path):
    def target(draw, path):
        with fuzz.watched():
            work()

    fuzz.listening()
    with pytest.raises(AssertionError):
        fuzz.rounds(target, tmp_path, [0, 0], seed=1, examples=1)


def test_errors_that_are_no_refusals_fail(tmp_path):
    def target(draw, path):
        raise KeyError(draw.random())

    with pytest.raises(KeyError):
        fuzz.rounds(target, tmp_path, [0, 0], seed=1, examples=1)
