"""`make fuzz`, for two seconds."""

import fuzz


def test_mutations_are_refused_or_load():
    counts = fuzz.main(2.0)
    assert counts["files"][0] > 10
    assert counts["NumPy"][0] > 3
