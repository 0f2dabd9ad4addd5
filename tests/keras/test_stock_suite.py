"""Keras's own tests of its Nadam, which come with Keras, run on ours."""

import inspect
import unittest

import pytest
from keras.src.optimizers import nadam_test

import nadam.keras

SUITE = nadam_test.NadamTest


@pytest.fixture
def counts(monkeypatch):
    """How often ours was constructed and applied; the suite finds it in its own module, where it imported Keras's."""
    found = {"__init__": 0, "apply": 0}

    def counted(name):
        real = getattr(nadam.keras.Nadam, name)

        def method(self, *args, **kwargs):
            found[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(nadam.keras.Nadam, name, method)

    for name in found:
        counted(name)
    monkeypatch.setattr(nadam_test, "Nadam", nadam.keras.Nadam)
    return found


@pytest.mark.parametrize("name", unittest.TestLoader().getTestCaseNames(SUITE))
def test_the_suite_of_keras_passes_on_ours(name, counts):
    result = unittest.TestResult()
    SUITE(name).run(result)
    failed = [text for _, text in result.failures + result.errors]
    assert not failed, failed[0]
    assert (result.testsRun, result.skipped) == (1, [])
    assert counts["__init__"] > 0
    assert (counts["apply"] > 0) == ("apply_gradients" in inspect.getsource(getattr(SUITE, name)))


def test_the_suite_has_the_tests_that_apply():
    sources = [inspect.getsource(getattr(SUITE, name)) for name in unittest.TestLoader().getTestCaseNames(SUITE)]
    assert sum("apply_gradients" in source for source in sources) >= 3
