"""Where Keras's backend is torch: the GPU kernels, in Triton's interpreter, which is chosen when it is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import pytest


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of the torch backend")
def test_memory_that_is_exchanged_between_steps():
    file = Path(__file__).parent / "exchanged_run.py"
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "exchanged 12\n"


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of the torch backend")
@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_on_a_gpu():
    file = Path(__file__).parent / "triton_keras.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
