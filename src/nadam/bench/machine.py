"""The machine and what is installed, found out without importing a framework."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nadam.bench.options import HOSTS
from nadam.kernels.cpu.threads import get_num_threads

PACKAGES = (
    "nadam",
    "numpy",
    "numba",
    "torch",
    "triton",
    "keras",
    "jax",
    "optax",
    "tensorflow",
)
# Other distributions that have the module.
_ALSO = {"tensorflow": ("tensorflow-cpu", "tensorflow-macos"), "triton": ("pytorch-triton", "triton-windows")}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter here; of what is not installed none."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        for distribution in (name, *_ALSO.get(name, ())):
            with suppress(PackageNotFoundError):
                found[name] = version(distribution)
                break
    return found


def installed_hosts() -> list[str]:
    """Those of `HOSTS` whose packages are there."""
    return [host for host, (_, needs) in HOSTS.items() if all(find_spec(name) is not None for name in needs)]


def gpus() -> list[str]:
    """Names of NVIDIA's GPUs, by their own program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return []


def processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What a figure depends on, by name."""
    found = {
        "processor": processor(),
        "CPUs": f"{os.cpu_count()}, of which nadam uses {get_num_threads()}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }
    with suppress(AttributeError, ValueError, OSError):
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    found["GPU"] = ", ".join(gpus()) or "none found"
    with suppress(AttributeError, OSError):
        found["load at the start"] = f"{os.getloadavg()[0]:.1f}"
    return found


def busy_at(machine: Mapping[str, str]) -> bool:
    """Whether other programs computed on a machine as well, which makes figures worse and ratios wrong."""
    cpus = int(machine.get("CPUs", "1").partition(",")[0])
    return float(machine.get("load at the start", 0)) > 0.5 * cpus
