"""Moments of 8 bits and remainders of 8 in the GPU kernels, in Triton's interpreter; see test_triton.py."""

import copy
import io

import numpy as np
import pytest
import torch
from training import apart
from triton_host import give as give_normal
from triton_host import kernels, on_cpu, values  # noqa: F401  # a fixture
from triton_interpreted import EVERYTHING, UNITS, Device, drawn, give
from triton_interpreted import on_cpu as cpu_twin

from nadam.core import compressed
from nadam.core.rounding import keys
from nadam.kernels.gpu.passes import ALIGNED, CHUNK, FLAGS
from nadam.torch import NAdam
from nadam.torch.compressed import SCALES
from nadam.torch.fallback import joined
from nadam.torch.gpu import bucket_cache as gpu_parts
from nadam.torch.gpu.tables import takes

# Two whole blocks, two that are too small, and a chunk, a block and a part of a block.
SHAPES = [(4096,), (5,), (4095,), (CHUNK + 2048 + 5,)]
FORMATS = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "seed": 123456789},
    "remainder of 16": {"dtype": torch.bfloat16, "remainder": True},
    "remainder of 8": {"dtype": torch.bfloat16, "remainder": 8, "seed": 2**32 - 1},
    "half gradients": {"grads": torch.bfloat16},
}
# Where fused products and sums differ, parameters may by a unit in their own last place: so many of float32's.
COARSE = {"float16": 2.0**13, "bfloat16": 2.0**16, "remainder of 8": 2.0**8}
CASES = [*((name, False) for name in FORMATS), ("float32", True), ("remainder of 8", True)]
MOMENTS = ("exp_avg", "exp_avg_sq")


def memory(tensor):
    """A dense tensor's elements in their order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def widened(state):
    return compressed.widened(*(memory(state[name]) for name in (*MOMENTS, *SCALES.values())))


def whole(param, state):
    return joined(param, {**state, "exp_avg_sq": torch.zeros(())})


def begun(full, **how):
    dtype = how.pop("dtype", torch.float32)
    grads = how.pop("grads", dtype)
    params = drawn(SHAPES, dtype)
    params.append(drawn([(2, 8, 16, 17)], dtype)[0].contiguous(memory_format=torch.channels_last))
    return params, grads, {**how, **(EVERYTHING if full else {})}


def gradients(params, dtype, seed):
    """With groups of zeros, and others of many sizes."""
    grads = drawn([param.shape for param in params], torch.float32, seed)
    for i, grad in enumerate(grads):
        grad.mul_(10.0 ** torch.linspace(-3, 0, grad.numel()).view(grad.shape))
        if i == 0:
            grad[7::64] = 0
    return [grad.to(dtype) for grad in grads]


@pytest.mark.parametrize(("name", "full"), CASES)
def test_codes_are_those_of_wide_moments_narrowed_by_the_core(name, full):
    """Beside a twin with float32 moments: the same parameters, and moments to be narrowed."""
    params, dtype, how = begun(full, **FORMATS[name])
    device, twin = Device(params, state_bits=8, **how), Device([param.clone() for param in params], **how)
    of_8 = [all(scale in state for scale in SCALES.values()) for state in device.states]
    assert of_8 == [True, False, False, True, True]
    for step in range(1, 5 if full else 3):
        for state, other in zip(device.states, twin.states, strict=True):
            if "exp_avg_scale" in state:
                for moment, values in zip(MOMENTS, widened(state), strict=True):
                    memory(other[moment])[:] = values
        grads = gradients(params, dtype, 10 + step)
        for each in (device, twin):
            each.step(grads)
        assert all(map(torch.equal, device.params, twin.params))
        updates = int(device.states[0]["step"])
        pairs = zip(device.states, twin.states, keys(how.get("seed", 0), updates, np.arange(5)), strict=True)
        for state, other, key in pairs:
            same = [k for k in state if k not in (*MOMENTS, *SCALES.values()) or "exp_avg_scale" not in state]
            assert all(torch.equal(state[k], other[k]) for k in same)
            if "exp_avg_scale" not in state or (full and step % 2):
                continue
            wide = [compressed.in_blocks(memory(other[moment])) for moment in MOMENTS]
            chance = compressed.noise(np.arange(wide[0].size, dtype=np.uint32), key).reshape(wide[0].shape)
            size = state["exp_avg"].numel()
            names = (*MOMENTS, *SCALES.values())
            for k, values in zip(names, compressed.narrow(*wide, chance), strict=True):
                assert (memory(state[k]) == values.reshape(-1)[: size if k in MOMENTS else None]).all(), k
    assert bool(device.states[0]["exp_avg"].any())


@pytest.mark.parametrize(("name", "full"), CASES)
def test_as_on_the_cpu(name, full, kernels, monkeypatch):  # noqa: F811
    params, dtype, how = begun(full, **FORMATS[name])
    device = Device([param.clone() for param in params], state_bits=8, **how)
    optimizer, others = cpu_twin(params, state_bits=8, **how)
    for other, param in zip(others, params, strict=True):
        other.grad_dtype = None
        assert other.stride() == param.stride()
    for step in range(4 if full else 2):
        grads = gradients(params, dtype, 10 + step)
        device.step(grads)
        give(others, grads)
        on_cpu(monkeypatch, optimizer.step)
        assert len(kernels) == step + 1
        entries = [optimizer.state[other] for other in others]
        for param, state, other, entry in zip(device.params, device.states, others, entries, strict=True):
            assert state.keys() == entry.keys()
            assert all(state[k].dtype == entry[k].dtype for k in state)
            # A last place of float32 that differs may, seldom, round to another code, and that parameter differs then.
            for k in (*MOMENTS, *SCALES.values()) if "exp_avg_scale" in state else ():
                assert (state[k] == entry[k]).double().mean() > 0.999, k
            ours, theirs = whole(param, state), whole(other.detach(), entry)
            assert (abs(ours - theirs) <= abs(theirs) * 2.0**-6 + 1e-6).double().mean() > 0.999
            if step == int(full):  # the first update
                assert apart([ours], [theirs]) <= COARSE.get(name, 0.0) + UNITS
        if how.get("remainder") == 8:
            pairs = zip(device.states, entries, strict=True)
            same = [(state["remainder"] == entry["remainder"]).flatten() for state, entry in pairs]
            assert torch.cat(same).double().mean() > 0.95


@pytest.mark.parametrize("name", ["float32", "bfloat16", "remainder of 8"])
def test_alignment(name):
    how = dict(FORMATS[name])
    dtype = how.pop("dtype", torch.float32)
    sizes = [shape[0] for shape in ((4096,), (CHUNK + 2047,), (5000,))]
    starts, grads = drawn([(size,) for size in sizes], dtype), drawn([(size,) for size in sizes], dtype, seed=1)
    aligned, shifted = ([torch.full((size + 32,), 77.0, dtype=dtype) for size in sizes] for _ in range(2))
    params = [m[:s] for m, s in zip(aligned, sizes, strict=True)]
    others = [m[1 : s + 1] for m, s in zip(shifted, sizes, strict=True)]
    for param, other, start in zip(params, others, starts, strict=True):
        param.copy_(start)
        other.copy_(start)
    how |= {"state_bits": 8, "use_ema": True, "global_clipnorm": 1.0, "eps": 0.1}
    one, two = (Device(each, **how) for each in (params, others))
    for _ in range(2):
        one.step(grads)
        two.step([torch.cat([g.new_zeros(1), g])[1:] for g in grads])
    flags = [(each.plan.tables.rows[:, FLAGS] & ALIGNED).bool() for each in (one, two)]
    assert bool(flags[0].all())
    assert not bool(flags[1].any())
    assert all(map(torch.equal, one.copy(), two.copy()))
    assert all(bool((m[s:] == 77).all()) for m, s in zip(aligned, sizes, strict=True))
    assert all(bool((m[0] == 77) & (m[s + 1 :] == 77).all()) for m, s in zip(shifted, sizes, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_goes_its_way_as_on_the_cpu(value, kernels, monkeypatch):  # noqa: F811
    params = drawn([(5000,)])
    device = Device([param.clone() for param in params], state_bits=8)
    optimizer, others = cpu_twin(params, state_bits=8)
    for step in range(3):
        grads = drawn([(5000,)], seed=step)
        if step == 1:
            grads[0][4321] = value
        device.step(grads)
        give(others, grads)
        on_cpu(monkeypatch, optimizer.step)
    assert len(kernels) == 3
    assert torch.equal(device.params[0].isnan(), others[0].isnan())
    assert device.params[0].isnan().sum() == len(range(4321 % 64 + 4096, 5000, 64))  # all of its group
    skipping = Device(params, state_bits=8, skip_nonfinite=True)
    before, grads = skipping.copy(), drawn([(5000,)], seed=1)
    grads[0][7] = value
    assert skipping.step(grads).skipped
    assert all(map(torch.equal, before, skipping.copy()))


HOST = {
    "float32": (torch.float32, {"state_bits": 8, "seed": 3}),
    "bfloat16": (torch.bfloat16, {"state_bits": 8, "remainder": 8, "gradient_accumulation_steps": 2}),
    "remainder": (torch.bfloat16, {"remainder": 8}),
    "rounded": (torch.bfloat16, {"remainder": 8, "exp_avg_dtype": torch.bfloat16}),
}


def made(dtype):
    params = [torch.nn.Parameter(each) for each in drawn([(70, 71), (5,), (2, 8, 16, 17)], dtype)]
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


def train(optimizer, params, steps, first=1):
    for step in range(first, first + steps):
        give_normal(params, step)
        optimizer.step()


@pytest.mark.parametrize("name", HOST)
@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_goes_on_from_its_state(name, way, kernels):  # noqa: F811
    dtype, options = HOST[name]
    params = made(dtype)
    optimizer = NAdam(params, lr=0.02, **options)
    train(optimizer, params, 2)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    if way == "deepcopy":
        other, others = copy.deepcopy((optimizer, params))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = NAdam(others, lr=0.02, **options)
        other.load_state_dict(torch.load(file))
    train(optimizer, params, 2, first=3)
    train(other, others, 2, first=3)
    assert len(kernels) == 6
    assert apart(values(optimizer, params), values(other, others)) == 0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "remainder"])
def test_goes_on_between_devices(name, kernels, monkeypatch):  # noqa: F811
    dtype, options = HOST[name]
    params, others = made(dtype), made(dtype)
    optimizer, other = (NAdam(each, lr=0.02, **options) for each in (params, others))
    train(optimizer, params, 2)
    on_cpu(monkeypatch, lambda: train(optimizer, params, 2, first=3))
    train(optimizer, params, 2, first=5)
    assert len(kernels) == 4
    on_cpu(monkeypatch, lambda: train(other, others, 6))
    assert len(kernels) == 4
    for one, two in zip(values(optimizer, params), values(other, others), strict=True):
        assert (((one - two).abs() <= two.abs() * 2.0**-6 + 1e-6).double()).mean() > 0.99


def test_float32_moments_become_codes_and_back(kernels):  # noqa: F811
    params = made(torch.float32)
    wide = NAdam(params, lr=0.02)
    train(wide, params, 2)
    narrow = NAdam(params, lr=0.02, state_bits=8)
    with pytest.warns(UserWarning, match=r"state_bits=8: the moments of \['params\[0\]', 'params\[2\]'\] are rounded"):
        narrow.load_state_dict(wide.state_dict())
    train(narrow, params, 1, first=3)
    assert narrow.state[params[0]]["exp_avg"].dtype == torch.int8
    wide.load_state_dict(narrow.state_dict())
    train(wide, params, 1, first=4)
    assert wide.state[params[0]]["exp_avg"].dtype == torch.float32
    assert len(kernels) == 4


@pytest.mark.parametrize(("option", "needs"), [({"state_bits": 8}, "state_bits=8"), ({"remainder": 8}, "remainder=8")])
def test_what_the_kernels_cannot_take_is_refused(option, needs, kernels):  # noqa: F811
    params = made(torch.bfloat16)
    params[0].data = torch.zeros(70, 142, dtype=torch.bfloat16)[:, ::2]
    optimizer = NAdam(params, **option)
    give_normal(params, 1)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=f"{needs}: expected dense parameters of real numbers, all on GPUs"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state
    assert not kernels


def test_takes_codes_and_scales():
    device = Device(drawn([(4096,)]), state_bits=8)
    assert takes(device.params[0], device.states[0])
    assert gpu_parts.can_run(device.params) == ("cpu" in gpu_parts.DEVICES)
    device.step(drawn([(4096,)], seed=1))
    plan = device.plan
    assert plan.tables.kinds[0].rounds
    device.states[0]["exp_avg_scale"].data = device.states[0]["exp_avg_scale"].clone()
    assert not plan.fits(drawn([(4096,)], seed=1))  # the scales lie elsewhere
