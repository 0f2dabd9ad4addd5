"""Bad input on this backend of Keras: tests/faults/bad_input.py."""

import keras
import pytest

from faults import bad_input

HERE = [f"keras {keras.backend.backend()}"]


@pytest.mark.parametrize(("name", "argument", "value"), bad_input.arguments(HERE))
def test_an_argument_out_of_range(name, argument, value):  # rows 1 to 3
    bad_input.check_argument(name, argument, value)


@pytest.mark.parametrize("name", HERE)
def test_two_clips_or_an_unknown_argument(name):  # row 4
    bad_input.check_unknown_argument(name)


@pytest.mark.parametrize(("name", "argument", "value"), bad_input.arguments(HERE, bad_input.settable))
def test_a_setting_out_of_range_during_training(name, argument, value):  # row 5
    bad_input.check_setting(name, argument, value)


@pytest.mark.parametrize(("name", "kind"), bad_input.gradients(HERE))
def test_a_gradient_that_does_not_fit(name, kind):  # rows 15 to 17 and 20
    bad_input.check_gradient(name, kind)
