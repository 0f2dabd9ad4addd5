"""The GPU kernels where there is no GPU: in Triton's interpreter, and compiled to PTX.

Triton decides when it is imported whether it interprets, so each of the two files runs in a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(("file", "interpreted"), [("triton_interpreted.py", "1"), ("triton_compiled.py", "0")])
def test_triton(file, interpreted):
    # What NumPy says of NaN and infinity while it stands in for a GPU is no fault.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        str(HERE / file),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": interpreted},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
