"""Bits of the Keras host on this backend, as recorded: test_golden.py."""

import keras

import golden
from hosts import HOSTS

BACKEND = keras.backend.backend()


def test_bits_are_as_recorded():
    golden.check([name for name in HOSTS if name.startswith(f"keras {BACKEND}")])
