"""The CPU's passes as foreign functions of XLA: called by compiled programs, and equal to XLA's own loops."""

import os
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402

from nadam.core import traced  # noqa: E402
from nadam.core.gradient import Check  # noqa: E402
from nadam.core.hyperparameters import Hyperparameters, Now  # noqa: E402
from nadam.core.scalars import Scalars  # noqa: E402
from nadam.jax.step import XP  # noqa: E402
from nadam.kernels.xla import ffi  # noqa: E402

SIZES = [(3, 4), (), (0, 2), (5,), (70_001,), (1 << 19,)]


def state(h, dtype, grad_dtype, seed=0):
    rng = np.random.default_rng(seed)
    tensors, grads = [], []
    for shape in SIZES:
        wide = jnp.float32

        def draw(kind, shape=shape):
            return jnp.asarray(rng.normal(size=shape), kind)

        averaged = draw(wide) if h.use_ema else None
        accumulator = draw(wide) if h.gradient_accumulation_steps else None
        tensors.append(traced.Tensor(draw(dtype), draw(wide), draw(wide) ** 2, averaged, accumulator))
        grads.append(draw(grad_dtype))
    return tensors, grads


def updated(h, tensors, grads, one_pass):
    """The jitted update, its arguments donated."""
    infos = [traced.ParamInfo(decays=bool(i % 2), constraint=None) for i in range(len(tensors))]

    def update(tensors, grads, product, updates):
        now = Now(lr=0.01, beta1=0.9, beta2=0.999)
        means = traced.Means(None, jax.lax.optimization_barrier, one_pass)
        return traced.update(XP, h, infos, means, traced.Progress(updates, product, tensors), grads, now, 0.5)

    compiled = jax.jit(update, donate_argnums=0)
    arguments = (tensors, grads, jnp.float32(0.3), jnp.int32(3))
    return compiled.lower(*arguments).as_text(), compiled(*arguments)


# Every option by itself is in test_hosts_agree.py; here are tensors of many chunks, which XLA's threads share.
@pytest.mark.parametrize("settings", [
    {"clipvalue": 0.5, "use_ema": True, "ema_overwrite_frequency": 4},
    {"global_clipnorm": 1e-3, "gradient_accumulation_steps": 4, "weight_decay": 0.1}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")], ids=str)
def test_equal_to_the_loops_of_xla(settings, dtypes):
    h = Hyperparameters(**settings)
    loops, (expected, *_) = updated(h, *state(h, *dtypes), lambda *_: {})
    calls, (found, *_) = updated(h, *state(h, *dtypes), ffi.one_pass)
    assert "nadam-one_pass" in calls
    assert "nadam-one_pass" not in loops
    for one, other in zip(found, expected, strict=True):
        for field in one._fields:
            value, wanted = getattr(one, field), getattr(other, field)
            if wanted is None:
                assert value is None
            elif field == "accumulator":
                assert not value.any()  # cleared by the kernel, not by the loops
            else:
                # As many units of the last place as there are fused multiply-adds and reciprocals in the rule.
                unit = float(jnp.finfo(value.dtype).eps)
                np.testing.assert_allclose(np.float64(value), np.float64(wanted), rtol=8 * unit, atol=4 * unit)


def test_nothing_is_copied():
    """So memory traffic is the kernel's, 28 bytes for a float32 parameter; XLA's own figure leaves it out."""
    h, shape = Hyperparameters(), (1 << 20,)
    tensor = traced.Tensor(*(jnp.ones(shape) for _ in range(3)), None, None)

    def update(tensors, grads):
        means, before = traced.Means(None, one_pass=ffi.one_pass), traced.Progress(0, jnp.float32(1.0), tensors)
        infos, now = [traced.ParamInfo(False, None)], Now(0.1, 0.9, 0.999)
        return traced.update(XP, h, infos, means, before, grads, now, 1.0).tensors

    compiled = jax.jit(update, donate_argnums=0).lower([tensor], [jnp.ones(shape)]).compile()
    assert compiled.cost_analysis()["bytes accessed"] / shape[0] < 0.1
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4096
    assert memory.alias_size_in_bytes >= 3 * tensor.param.nbytes


def test_a_constraint_and_an_unknown_format_are_left_to_the_compiler():
    h = Hyperparameters()
    tensors, grads = state(h, "float32", "float32")
    infos = [traced.ParamInfo(False, abs if i == 1 else None) for i in range(len(tensors))]
    grads[2], grads[3] = grads[2].astype("float8_e4m3fn"), None
    everything = traced.Pass(grads, grads, Scalars(*[jnp.float32(0.1)] * 11), [jnp.float32(1.0)], h.flags, False)
    assert sorted(ffi.one_pass(everything, tensors, infos)) == [0, 4, 5]


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms(dtype, accumulated):
    h = Hyperparameters(gradient_accumulation_steps=2 if accumulated else None)
    tensors, grads = state(h, "float32", dtype)
    found, passed = ffi.measure(tensors, grads, 0.25, accumulated=accumulated, check=Check.SQUARES_FINITE)
    assert passed
    sums = [
        np.float64(g) * 0.25 + np.float64(t.accumulator) if accumulated else np.float64(g)
        for g, t in zip(grads, tensors, strict=True)
    ]
    np.testing.assert_allclose(found, [np.linalg.norm(value) for value in sums], rtol=1e-6)


@pytest.mark.parametrize(("value", "check", "passes"), [
    (np.nan, Check.FINITE, False),
    (-np.inf, Check.FINITE, False),
    (1e20, Check.FINITE, True),
    (1e20, Check.SQUARES_FINITE, False),
    (1e18, Check.SQUARES_FINITE, True),
])  # fmt: skip
def test_checks(value, check, passes):
    tensors, grads = state(Hyperparameters(), "float32", "float32")
    grads[4] = grads[4].at[70_000].set(value)
    found, passed = ffi.measure(tensors, grads, 1.0, accumulated=False, check=check)
    assert bool(passed) == passes
    if passes:
        assert abs(float(found[4]) / value - 1) < 1e-6  # no square overflows


def test_norms_that_the_kernel_leaves_to_the_compiler():
    tensors, grads = state(Hyperparameters(), "float32", "float32")
    grads[0] = grads[0].astype("float16")  # more than one format
    assert ffi.measure(tensors, grads, 1.0, accumulated=False, check=Check.FINITE) is None


def run(program, **environment):
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


def test_loaded_from_disk_without_numba():
    program = """
import sys
from nadam.kernels.xla import ffi
from nadam.kernels.cpu import machine_code
assert ffi.usable()
print(machine_code.compilations, "numba" in sys.modules)
"""
    run(program)
    assert run(program) == "0 False\n"


def test_not_where_arrays_may_be_split():
    program = "from nadam.kernels.xla import ffi; print(ffi.usable())"
    assert run(program, XLA_FLAGS="--xla_force_host_platform_device_count=2") == "False\n"


def test_a_refusal_falls_back_with_a_warning(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such interface")

    ffi._registered.cache_clear()
    monkeypatch.setattr(ffi, "_target", refuse)
    with pytest.warns(UserWarning, match="no such interface"):
        assert not ffi.usable()
    ffi._registered.cache_clear()
