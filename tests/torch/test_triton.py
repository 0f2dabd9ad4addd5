"""The GPU kernels: in Triton's interpreter, compiled to PTX, and where there is a GPU, on it.

Triton decides when it is imported whether it interprets, so each of these files runs in a process of its own.
"""

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


CASES = {
    "kernels": ("triton_interpreted.py", {"TRITON_INTERPRET": "1"}),
    "NAdam": ("triton_host.py", {"TRITON_INTERPRET": "1"}),
    "PTX": ("triton_compiled.py", {"TRITON_INTERPRET": "0"}),
}
if find_spec("torch") and import_module("torch").cuda.is_available():
    CASES["NAdam on a GPU"] = ("triton_host.py", {"TRITON_INTERPRET": "0", "NADAM_TEST_DEVICE": "cuda"})
    CASES["graphs and streams"] = ("triton_cuda.py", {"TRITON_INTERPRET": "0", "NADAM_TEST_DEVICE": "cuda"})


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    file, environment = CASES[name]
    # What NumPy says of NaN and infinity while it stands in for a GPU is no fault.
    options = ["-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / file)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
