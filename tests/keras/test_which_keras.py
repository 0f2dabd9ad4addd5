"""Which Nadam Keras's own, ours on this backend and TensorFlow's kernel are."""

import keras
import pytest

import test_published_run
from test_which import ROWS, check

BACKEND = keras.backend.backend()
# On TensorFlow Keras casts numbers of Python to float32 on their way.
PRECISION = "float32" if BACKEND == "tensorflow" else "float64"
EXPECTED = {"keras.optimizers.Nadam": ("keras", PRECISION, set())}
EXPECTED |= {name: (row.member, PRECISION, set()) for name, row in ROWS.items() if name.startswith("nadam.keras.Nadam")}
if BACKEND == "tensorflow":
    EXPECTED |= {
        "tf.raw_ops.ResourceApplyAdam(use_nesterov=True)": ("adam", "float64", {"eps"}),
        "tf_keras.optimizers.Nadam": ("keras", "float32", set()),
        "tf_keras.optimizers.legacy.Nadam": ("torch", "float32", set()),
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_the_one_that_the_table_says(name):
    check(name, EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_an_epoch_of_the_published_run(name, monkeypatch):
    test_published_run.check(name, EXPECTED[name][0], monkeypatch)
