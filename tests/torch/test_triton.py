"""The GPU kernels: in Triton's interpreter, compiled to PTX, and where there is a GPU, on it.

Triton decides when it is imported whether it interprets, so each of these files runs in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


CASES = {
    "kernels": ("triton_interpreted.py", {"TRITON_INTERPRET": "1"}),
    "codes": ("triton_codes.py", {"TRITON_INTERPRET": "1"}),
    "8 bits": ("triton_compressed.py", {"TRITON_INTERPRET": "1"}),
    "NAdam": ("triton_host.py", {"TRITON_INTERPRET": "1", "MALLOC_PERTURB_": "165"}),
    "extremes": ("test_torch_extremes.py", {"TRITON_INTERPRET": "1"}),
    "PTX": ("triton_compiled.py", {"TRITON_INTERPRET": "0"}),
}
HAS_GPU = bool(find_spec("torch")) and import_module("torch").cuda.is_available()
if HAS_GPU:
    ON_GPU = {"TRITON_INTERPRET": "0", "NADAM_TEST_DEVICE": "cuda"}
    HOST = ["drop_in", "extras", "faults", "extremes", "around", "libraries"]
    HOST += ["sharding"] if import_module("torch").cuda.device_count() > 1 else []
    CASES |= {f"{name} on a GPU": (f"test_torch_{name}.py", ON_GPU) for name in HOST}
    CASES["NAdam on a GPU"] = ("triton_host.py", ON_GPU)
    CASES["graphs and streams"] = ("triton_cuda.py", ON_GPU)


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    run(*CASES[name])


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.skipif(not (find_spec("triton") and shutil.which("cc")), reason="no Triton, or no C compiler for it")
def test_launches_without_a_gpu(tmp_path):
    """By Triton's own launcher, which loads the driver library that it finds there."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "no_gpu.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    folders = {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    run("triton_launched.py", {"TRITON_INTERPRET": "0", **folders, "TRITON_CACHE_DIR": str(tmp_path / "cache")})


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_bits_are_as_recorded():
    import golden

    golden.check(["triton"])


def run(file, environment):
    from hosts.on_torch import has_interpreter

    if environment["TRITON_INTERPRET"] == "1" and not has_interpreter():
        pytest.skip("Triton 3.6 interprets only with NumPy before 2.4")
    # What NumPy says of NaN and infinity while it stands in for a GPU is no fault, nor of Triton 3.6's loops.
    options = ["-q", "-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
