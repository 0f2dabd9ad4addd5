"""The PyTorch host's tests, where PyTorch is installed; on another device than the CPU with NADAM_TEST_DEVICE=cuda."""

import os
import warnings
from importlib.util import find_spec

import pytest

# Programs for torchrun, and what test_triton.py runs in processes of their own.
PROGRAMS = ("interpreted", "host", "compiled", "launched", "cuda")
collect_ignore = ["sharded_run.py", "edits_run.py", *(f"triton_{name}.py" for name in PROGRAMS)]
collect_ignore_glob = [] if find_spec("torch") else ["*.py"]


@pytest.fixture(autouse=True)
def on_the_device():
    """Tensors are made on it where a test names none."""
    if "NADAM_TEST_DEVICE" not in os.environ:
        yield
        return
    import torch

    # What the kernels do not take, strided and complex parameters, is done otherwise there, with a warning.
    warnings.filterwarnings("ignore", "nadam: no kernel for", UserWarning)
    with torch.device(os.environ["NADAM_TEST_DEVICE"]):
        yield
