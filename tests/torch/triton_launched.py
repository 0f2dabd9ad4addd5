"""Steps launched by Triton's own launcher, compiled for a GPU, onto a driver library that does nothing: no_gpu.c.

What it launches is seen, with the addresses it passes; the numbers are those of nobody. See test_triton.py.
"""

import ctypes
import os

import pytest
import torch
from training import Gradients, parameters
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton_host import OPTIONS

from nadam.torch import NAdam
from nadam.torch.gpu import bucket_cache as gpu_parts
from nadam.torch.gpu import launch as gpu_launch

POINTERS = {"one_pass": 6, "measure": 4, "prepare": 2, "sums": 2}  # how many of its first arguments are looked at
HEARD = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))


@pytest.fixture(scope="module", autouse=True)
def triton_driver():
    """Triton's, which else asks PyTorch for a GPU."""
    made = CudaDriver()
    made.get_current_device = made.get_current_stream = lambda device=None: 0
    made.get_device_capability = lambda device=None: (9, 0)
    driver.set_active(made)


@pytest.fixture
def launched(monkeypatch):
    """(kernel, programs, pointers) of each launch."""
    monkeypatch.setattr(gpu_parts, "DEVICES", {"cpu"})
    library = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
    heard, seen = ctypes.c_void_p.in_dll(library, "heard"), []

    def hear(name, programs, arguments):
        kernel = name.decode()
        seen.append((kernel, programs, tuple(arguments[i][0] for i in range(POINTERS[kernel]))))

    callback = HEARD(hear)
    heard.value = ctypes.cast(callback, ctypes.c_void_p).value
    yield seen
    heard.value = None


def stepped(steps=1, dtype=torch.float32, **options):
    params = parameters(dtype, shapes=[(3, 4), (5000,), (), (0, 2)])
    optimizer = NAdam(params, lr=0.02, **options)
    Gradients().give(params)
    for _ in range(steps):
        optimizer.step()
    return optimizer


EVERYTHING = {
    "clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 3, "weight_decay": 0.1, "skip_nonfinite": True,
    "gradient_accumulation_steps": 2, "remainder": True, "exp_avg_dtype": torch.bfloat16,
}  # fmt: skip


MORE = {
    "everything": (torch.bfloat16, EVERYTHING),
    "8 bits": (torch.bfloat16, {"remainder": 8, "state_bits": 8, "use_ema": True}),
}


@pytest.mark.parametrize("name", [*OPTIONS, *MORE])
def test_every_launch_after_the_first_is_as_the_first(name, launched):
    """The first is by Triton's lookup, the others without it."""
    dtype, options = MORE[name] if name in MORE else (torch.float32, OPTIONS[name])
    gpu_launch._compiled.clear()
    optimizer = stepped(dtype=dtype, **options)
    first = list(launched)
    assert 2 <= len(first) <= 4
    for _ in range(3):
        optimizer.step()
    counted = [(kernel, programs) for kernel, programs, _ in launched]
    assert counted == 4 * [(kernel, programs) for kernel, programs, _ in first]
    passes = [pointers for kernel, _, pointers in launched if kernel in ("one_pass", "prepare")]
    assert passes == 4 * passes[: len(passes) // 4]
    assert len(gpu_launch._compiled) == len(first)


def test_what_the_pass_is_given(launched):
    optimizer = stepped(steps=2)
    plan = optimizer._gpu.buckets[0].plan
    kind = plan.tables.kinds[0]
    given = [
        plan.tables.rows,
        kind.chunks,
        plan.scalars["float32"],
        plan.factors["float32"],
        plan.active,
        plan.step_key,
    ]
    expected = ("one_pass", 4, tuple(tensor.data_ptr() for tensor in given))
    assert [launch for launch in launched if launch[0] == "one_pass"] == 2 * [expected]
    assert kind.programs == 4  # 12, 5,000 and 1 elements, 4,096 each


def test_formats_and_rates_have_code_of_their_own(launched):
    for dtype in (torch.float32, torch.bfloat16):
        for rate in (0.02, torch.tensor(0.02), torch.tensor(0.02, dtype=torch.float64)):
            optimizer = stepped(2, dtype)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.step()
    assert [kernel for kernel, *_ in launched] == ["prepare", "one_pass"] * (6 * 4)


@pytest.mark.parametrize("scale", [torch.float32, torch.float64])
def test_loss_scaling_is_part_of_the_step(launched, scale):
    optimizer = stepped(2, global_clipnorm=0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), dtype=scale), torch.zeros(())
    optimizer.step()
    assert [kernel for kernel, *_ in launched] == ["measure", "prepare", "one_pass"] * 3
