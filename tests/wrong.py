"""The package with one thing wrong in it, and whether the comparison of agree.py sees that on every host.

Run by test_wrong_versions.py:

    python tests/wrong.py FOLDER HOST...    # prints, as JSON, version -> host -> case -> what was found, or null

A wrong version is a copy of the sources in which some text is exchanged. One process goes through all versions, since
importing a framework takes longer than what is done with it: the package is imported anew for each, and last once more
as it is, which shows that importing it anew breaks nothing. Hosts of one of GROUPS fit into one process, which begins
with all that they need.
"""

import importlib
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from agree import step_against_reference
from arguments import Case, has
from hosts import HOSTS

GROUPS = {
    "torch": ["numpy", "torch", "torch fallback", "triton", "keras torch"],
    "jax": ["jax kernel", "jax loops", "jax transform", "keras jax"],
    "tensorflow": ["keras tensorflow"],
}
RIGHT = "right"


class Wrong(NamedTuple):
    """What is exchanged, and the cases that show it, of which a host is given those that it has."""

    edits: list[tuple[str, str, str]]  # file, right, wrong
    cases: list[Case]


VERSIONS = {
    "no look-ahead": Wrong(
        [
            (
                "core/rule.py",
                "    step = (exp_avg_step * exp_avg + grad_step * grad)",
                "    step = exp_avg_step * exp_avg",
            )
        ],
        [Case("defaults", {})],
    ),
    "scalars exchanged": Wrong(
        [("core/scalars.py", "c.exp_avg_step,\n        c.grad_step", "c.grad_step,\n        c.exp_avg_step")],
        [Case("defaults", {})],
    ),
    "no decay": Wrong(
        [("core/element.py", "decay,\n        s.exp_avg_weight", "decay * 0.0,\n        s.exp_avg_weight")],
        [Case("weight_decay", {"weight_decay": 0.5})],
    ),
    # What is stored differs from what was computed where it is rounded and, with Keras, where it is constrained; there
    # PyTorch's backend averages outside of the element.
    "average of what is not stored": Wrong(
        [
            ("core/element.py", "    param = stored(param)\n", "    computed, param = param, stored(param)\n"),
            ("core/element.py", "average(ema, param, s.ema_momentum", "average(ema, computed, s.ema_momentum"),
            (
                "keras/on_torch.py",
                "slot.variable.assign(slot.variable.constraint(",
                "computed = slot.variable._value.clone(); slot.variable.assign(slot.variable.constraint(",
            ),
            ("keras/on_torch.py", "average(ema, param.to(", "average(ema, computed.to("),
        ],
        [
            Case("use_ema", {"use_ema": True, "ema_momentum": 0.5}, "bfloat16"),
            Case("constraint", {"use_ema": True, "ema_momentum": 0.5, "constraint": "NonNeg"}),
        ],
    ),
    # Each compiler clears it itself, behind its element.
    "accumulator not cleared": Wrong(
        [
            ("kernels/cpu/passes.py", "a[i] = to_compute(0.0)", "a[i] = total"),
            ("kernels/gpu/passes.py", "left, tl.zeros_like(accumulator), COMPUTE", "left, accumulator, COMPUTE"),
            ("torch/fallback.py", "torch._foreach_zero_([", "list(["),
            ("jax/step.py", "jnp.where(running, jnp.zeros_like(done), done)", "tensor.accumulator + 0.0 * done"),
            ("keras/on_tensorflow.py", "slot[4].assign(tf.zeros_like(slot[4]))", "slot[4].assign_add(0.0 * slot[4])"),
        ],
        [Case("gradient_accumulation_steps", {"gradient_accumulation_steps": 2, "eps": 0.1})],
    ),
}
# What cannot be seen on a host, and why.
EXEMPT = {
    ("jax transform", "scalars exchanged"): "optax's chain takes the coefficients by name and has no such scalars",
    ("jax transform", "no decay"): "a link of its own decays",
    ("jax transform", "average of what is not stored"): "it keeps no average",
    ("jax transform", "accumulator not cleared"): "optax.MultiSteps accumulates around it",
}


def cases_of(name, version):
    """The cases by which a host has to see a wrong version."""
    return [case for case in VERSIONS[version].cases if has(HOSTS[name](), case.settings)]


def copy_wrong(sources, folder, version):
    """A copy of the package with a version's text exchanged."""
    shutil.copytree(sources, folder / "nadam", ignore=shutil.ignore_patterns("__pycache__"))
    for name, right, wrong in VERSIONS[version].edits:
        file = folder / "nadam" / name
        text = file.read_text()
        assert text.count(right) == 1, f"{version}: {name} has {text.count(right)} of {right!r}"
        file.write_text(text.replace(right, wrong))


@contextmanager
def imported(folder, version, cache):
    """Around what is done with the package in a folder, imported anew; wrong kernels are not kept with the right."""
    before = dict(os.environ)
    if version != RIGHT:
        os.environ["NADAM_CACHE_DIR"] = str(cache)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nadam"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        package = importlib.import_module("nadam")
        assert Path(package.__file__).parent.parent == folder
        yield
    finally:
        sys.path.remove(str(folder))
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def own_targets(version):
    """XLA takes a handler by a name only once: with the version's."""
    jax = sys.modules.get("jax")
    if jax is None:
        yield
        return
    register, call = jax.ffi.register_ffi_target, jax.ffi.ffi_call
    prefix = f"{version} "
    with (
        patch.object(jax.ffi, "register_ffi_target", lambda name, *a, **k: register(prefix + name, *a, **k)),
        patch.object(jax.ffi, "ffi_call", lambda name, *a, **k: call(prefix + name, *a, **k)),
    ):
        yield


def found(name, case):
    """What the comparison finds; None for nothing."""
    try:
        step_against_reference(name, case)
    except AssertionError as error:
        return str(error) or repr(error)
    return None


@contextmanager
def by_kernel(name):
    """Around what a host has JAX call the kernels for, without trying first how they do: they have been called."""
    if "jax" not in name or name == "jax transform" or not HOSTS[name]().kernels:
        yield
        return
    from nadam.kernels.cpu import machine_code
    from nadam.kernels.xla import ffi

    with patch.object(ffi, "_registered", lambda: True):
        yield
    assert any(key[:2] == (machine_code.HANDLERS, "one_pass") for key in machine_code._kernels)


def run(sources, folder, names):
    """Every version on these hosts."""
    results = {}
    if any("jax" in name for name in names):
        importlib.import_module("jax")
    for version in [*VERSIONS, RIGHT]:
        home = sources.parent if version == RIGHT else folder / version.replace(" ", "_")
        if version != RIGHT:
            copy_wrong(sources, home, version)
        with imported(home, version, folder / "cache"), own_targets(version):
            for name in names:
                with by_kernel(name):
                    shown = VERSIONS if version == RIGHT else [version]
                    cases = {str(case): case for each in shown for case in cases_of(name, each)}
                    results.setdefault(version, {})[name] = {key: found(name, case) for key, case in cases.items()}
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sources = Path(importlib.import_module("nadam").__file__).parent
    print(json.dumps(run(sources, Path(sys.argv[1]), sys.argv[2:])))
