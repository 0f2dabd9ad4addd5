"""Every option, dtype and combination on this backend of Keras against the float64 reference: test_hosts_agree.py."""

import keras
import pytest

from agree import runs, step_against_reference
from hosts import HOSTS

BACKEND = keras.backend.backend()
NAMES = [name for name in HOSTS if name.startswith(f"keras {BACKEND}")]


@pytest.mark.parametrize(("name", "case"), runs(NAMES), ids=str)
def test_a_step_is_that_of_the_reference(name, case):
    step_against_reference(name, case)
