"""The GPU kernels in Triton's interpreter, against the float64 reference and the CPU kernel; see test_triton.py."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from training import apart

from nadam.core.counters import CALLS, SKIPPED
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.rounding import keys
from nadam.core.scalars import coefficients
from nadam.kernels.cpu import formats
from nadam.kernels.gpu import formats as triton_formats
from nadam.kernels.gpu import prepare as triton_prepare
from nadam.kernels.gpu.passes import ALIGNED, CHUNK, FLAGS, SCALARS
from nadam.torch import NAdam, buckets
from nadam.torch.fallback import joined
from nadam.torch.gpu import bucket_cache as gpu_parts
from nadam.torch.gpu import step as on_gpu
from nadam.torch.gpu.tables import takes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from agree import STEPS, runs, step_against_reference

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2), (1030,)]
DEFAULTS = {"lr": 0.02, "eps": 1e-8, "momentum_decay": 4e-3}
# Of float32, after a few steps: what a fused product and sum, and the order of a sum, make of the last places.
UNITS = 8.0


class Device:
    """Parameters that the GPU kernels move, with state as the optimizer keeps it."""

    def __init__(self, params, h=None, remainder=False, exp_avg_dtype=None, seed=0, state_bits=None, **settings):
        self.h = h or Hyperparameters(**{**DEFAULTS, **settings})
        self.options = buckets.StateOptions(remainder, exp_avg_dtype, seed, state_bits)
        self.params = params
        self.states = [buckets.new_state(p, self.h, self.options) for p in params]
        self.plan, self.skipped = None, 0

    def part(self, grads, lr=None):
        if self.plan is None or not self.plan.fits(grads):
            how = {"seed": self.options.seed, "position": self.position()}
            self.skipped += 0 if self.plan is None else int(self.plan.counters[SKIPPED])
            self.plan = on_gpu.DevicePlan(self.params, self.states, grads, self.h, **how)
        now = self.h.at(0)
        return on_gpu.Bucket(self.plan, self.h, now.lr if lr is None else lr, now.beta1, now.beta2)

    def position(self):
        steps = self.h.gradient_accumulation_steps or 1
        return 0 if self.plan is None else int(self.plan.counters[CALLS]) % steps

    def step(self, grads, lr=None, **options):
        part = self.part(grads, lr)
        return on_gpu.step([part], skipped=self.skipped, **options)

    def copy(self):
        state = [tensor.clone() for entry in self.states for tensor in entry.values()]
        return [*(p.clone() for p in self.params), *state]


def drawn(shapes=SHAPES, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def on_cpu(params, **settings):
    """Our optimizer on the CPU with copies of the same parameters."""
    settings = {**DEFAULTS, **settings}
    coupled = settings.pop("coupled_weight_decay", False)
    optimizer = NAdam(
        [torch.nn.Parameter(p.clone()) for p in params],
        **settings,
        decoupled_weight_decay=not coupled,
    )
    return optimizer, optimizer.param_groups[0]["params"]


def give(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def all_apart(device, optimizer, others):
    """Parameters and all state."""
    pairs = [(p, o.detach()) for p, o in zip(device.params, others, strict=True)]
    for entry, other in zip(device.states, others, strict=True):
        theirs = optimizer.state[other]
        assert entry.keys() == theirs.keys()
        assert entry["step"] == theirs["step"]
        assert abs(entry["mu_product"] - theirs["mu_product"]) <= 1e-15
        pairs += [(entry[k], theirs[k]) for k in entry if k not in ("step", "mu_product", "remainder")]
    return max(apart([a.to(wide(a))], [b.to(wide(b))]) / widening(a) for a, b in pairs)


def wide(tensor):
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


def widening(tensor):
    """How many units of what a tensor is compared in are one of its own."""
    return torch.finfo(tensor.dtype).eps / torch.finfo(wide(tensor)).eps


@pytest.mark.parametrize(("name", "case"), runs(["triton"]), ids=str)
def test_a_step_is_that_of_the_reference(name, case, monkeypatch):
    module, calls = gpu_parts.on_gpu(), []
    real = module.moved
    monkeypatch.setattr(module, "moved", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    step_against_reference(name, case)
    assert len(calls) == STEPS


EVERYTHING = {
    "global_clipnorm": 0.5, "eps": 0.1, "weight_decay": 0.1, "use_ema": True, "ema_momentum": 0.8,
    "ema_overwrite_frequency": 2, "gradient_accumulation_steps": 2, "skip_nonfinite": True, "maximize": True,
}  # fmt: skip


def test_a_comparison_that_can_fail():
    device = Device(drawn(), beta2=0.99)
    optimizer, others = on_cpu(device.params)
    for i in range(2):
        grads = drawn(seed=10 + i)
        device.step(grads)
        give(others, grads)
        optimizer.step()
    assert apart(device.params, others) > 20 * UNITS


ROUNDED = {
    "float32": {"seed": 7},
    "bfloat16": {"dtype": torch.bfloat16, "seed": 123456789},
    "split": {"dtype": torch.bfloat16, "remainder": True},
    "split 8": {"dtype": torch.bfloat16, "remainder": 8},
}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("name", ROUNDED)
def test_first_moments_are_rounded_by_the_chance_of_the_cpu(name, full):
    how = {"exp_avg_dtype": torch.bfloat16, **ROUNDED[name]}
    dtype = how.pop("dtype", torch.float32)
    options = EVERYTHING if full else {}
    device = Device(drawn(SHAPES[2:], dtype), **how, **options)
    optimizer, others = on_cpu(device.params, **how, **options)
    for i in range(4 if full else 2):
        grads = drawn(SHAPES[2:], dtype, seed=10 + i)
        device.step(grads)
        give(others, grads)
        optimizer.step()
        # A last place of float32 that differs may, seldom, round another way.
        assert all_apart(device, optimizer, others) <= 1.0 + UNITS
        if how.get("remainder"):
            ours = [joined(p, s) for p, s in zip(device.params, device.states, strict=True)]
            theirs = [joined(o.detach(), optimizer.state[o]) for o in others]
            assert apart(ours, theirs) <= (UNITS if how["remainder"] is True else 2.0**8 + UNITS)
        same = [(s["exp_avg"] == optimizer.state[o]["exp_avg"]) for s, o in zip(device.states, others, strict=True)]
        assert torch.cat([each.flatten() for each in same]).double().mean() > 0.99


def test_half_gradients_of_float32_parameters():
    params = drawn()
    device, twin = Device([p.clone() for p in params]), Device(params)
    for i in range(2):
        grads = [g.to(torch.float16 if j % 2 else torch.bfloat16) for j, g in enumerate(drawn(seed=i))]
        device.step(grads)
        twin.step([g.float() for g in grads])
    assert len(device.plan.tables.kinds) == 2
    assert all(torch.equal(a, b) for a, b in zip(device.params, twin.params, strict=True))


@triton.jit
def convert_kernel(values, chances, halves, rests, by_chance, back, rounded, hashed, count: tl.constexpr):
    offsets = tl.arange(0, count)
    value = tl.load(values + offsets)
    stored = triton_formats.narrow_bfloat16_split(value)
    rest = triton_formats.rest_of_bfloat16(value)
    tl.store(halves + offsets, triton_formats.narrow_bfloat16(value))
    tl.store(halves + count + offsets, stored)
    tl.store(rests + offsets, rest)
    chance = tl.load(chances + offsets).to(tl.uint32, bitcast=True)
    tl.store(by_chance + offsets, triton_formats.narrow_bfloat16_stochastic(value, chance))
    tl.store(back + offsets, triton_formats.join_bfloat16(stored, rest))
    tl.store(rounded + offsets, triton_formats.round_to_24_bits(value, chance))
    key = tl.full((), 0x89ABCDEF, tl.uint32)
    tl.store(hashed + offsets, triton_formats.hash32(offsets, key).to(tl.int32, bitcast=True))


def test_formats_are_those_of_the_cpu_to_the_bit():
    count = 1 << 13
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 1 << 32, count, np.uint32)
    halfway = (generator.integers(0, 1 << 16, 512, np.uint32) << 16) + np.uint32(0x8000)
    bits[:512], bits[512:1024] = halfway, halfway - np.uint32(1)
    bits[1024:1032] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF, 1]
    values, chances = bits.view(np.float32), generator.integers(0, 1 << 32, count, np.uint32)
    halves, rests, by_chance = (torch.zeros(n, dtype=torch.uint16) for n in (2 * count, count, count))
    back, rounded, hashed = torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.int32)
    given = torch.from_numpy(values.copy()), torch.from_numpy(chances.view(np.int32).copy())
    convert_kernel[(1,)](*given, halves, rests, by_chance, back, rounded, hashed, count=count)
    wanted = [formats.narrow_bfloat16(v) for v in values]
    assert halves[:count].tolist() == wanted
    zero = np.uint32(0)
    assert list(zip(halves[count:].tolist(), rests.tolist(), strict=True)) == [
        formats.split_bfloat16(v, zero) for v in values
    ]
    chance = [formats.narrow_bfloat16_stochastic(v, c) for v, c in zip(values, chances, strict=True)]
    assert by_chance.tolist() == chance
    finite = ~np.isnan(values)
    assert (back.numpy().view(np.uint32)[finite] == bits[finite]).all()
    assert (rounded.isnan().numpy() != finite).all()
    pairs = (formats.split_8_bits(v, c) for v, c in zip(values, chances, strict=True))
    assert rounded.view(torch.int32)[torch.from_numpy(finite)].tolist() == [
        int(np.float32(formats.join_8_bits(*pair)).view(np.int32))
        for pair, known in zip(pairs, finite, strict=True)
        if known
    ]
    key = np.uint32(0x89ABCDEF)
    assert hashed.numpy().view(np.uint32).tolist() == [formats.hash32(i, key) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sizes_and_alignment(dtype):
    sizes = [0, 1, 511, 512, 1025, CHUNK - 1, CHUNK, CHUNK + 1]
    starts = drawn([(size,) for size in sizes], dtype)
    grads = drawn([(size,) for size in sizes], dtype, seed=1)
    aligned, shifted = ([torch.full((size + 16,), 77.0, dtype=dtype) for size in sizes] for _ in range(2))
    params, others = (
        [m[:s] for m, s in zip(aligned, sizes, strict=True)],
        [m[1 : s + 1] for m, s in zip(shifted, sizes, strict=True)],
    )
    for memory in (params, others):
        for param, start in zip(memory, starts, strict=True):
            param.copy_(start)
    settings = {"use_ema": True, "global_clipnorm": 1.0, "eps": 0.1}
    one, two = Device(params, **settings), Device(others, **settings)
    for _ in range(2):
        one.step(grads)
        two.step([torch.cat([g.new_zeros(1), g])[1:] for g in grads])
    large = [s > 0 for s in sizes]
    flags = [(each.plan.tables.rows[:, FLAGS] & ALIGNED).bool() for each in (one, two)]
    assert bool(flags[0].all())  # PyTorch aligns what it allocates
    assert not bool(flags[1][large].any())
    assert all(torch.equal(p, o) for p, o in zip(params, others, strict=True))
    assert all(bool((m[s:] == 77).all()) for m, s in zip(aligned, sizes, strict=True))
    assert all(bool((m[0] == 77) & (m[s + 1 :] == 77).all()) for m, s in zip(shifted, sizes, strict=True))
    optimizer, theirs = on_cpu(starts, **settings)
    for _ in range(2):
        give(theirs, grads)
        optimizer.step()
    assert all_apart(one, optimizer, theirs) <= UNITS if dtype != torch.bfloat16 else 1.0 + UNITS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_a_step_that_is_skipped_changes_nothing(value):
    device = Device(drawn(), skip_nonfinite=True, use_ema=True, weight_decay=0.1, global_clipnorm=1.0)
    assert device.step(drawn(seed=1)).skipped is False
    before, grads = device.copy(), drawn(seed=2)
    grads[-1][1029] = value
    report = device.step(grads)
    assert (report.skipped, report.skipped_steps, report.step) == (True, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, device.copy(), strict=True))
    assert device.step(drawn(seed=2)).step == 2


def test_nan_goes_through_where_nobody_asked():
    device = Device(drawn())
    grads = drawn(seed=2)
    grads[0][1, 1] = math.nan
    device.step(grads)
    assert device.params[0].isnan().sum() == 1
    clipped = Device(drawn(), global_clipnorm=1.0)
    clipped.step(grads)
    assert all(bool(p.isnan().all()) for p in clipped.params)


def test_the_scale_of_grad_scaler():
    plain, scaled = Device(drawn(), global_clipnorm=0.5, eps=0.1), Device(drawn(), global_clipnorm=0.5, eps=0.1)
    scale = torch.tensor(1024.0)
    report = plain.step(drawn(seed=3))
    seen = scaled.step([g * 1024 for g in drawn(seed=3)], scale=scale, found=torch.tensor(0.0))
    assert seen.read() == report.read()
    assert all(torch.equal(a, b) for a, b in zip(plain.params, scaled.params, strict=True))
    before = scaled.copy()
    assert scaled.step(drawn(seed=4), scale=scale, found=torch.tensor(1.0)).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.copy(), strict=True))
    infinite = drawn(seed=4)
    infinite[0][0, 0] = math.inf
    assert scaled.step(infinite, must_be_finite=True).skipped_steps == 2


def test_a_learning_rate_on_the_device():
    one, two = Device(drawn()), Device(drawn())
    rate = torch.tensor(0.02, dtype=torch.float64)
    for i in range(2):
        rate.fill_(0.02 / (i + 1))
        one.step(drawn(seed=i), lr=0.02 / (i + 1))
        assert two.step(drawn(seed=i), lr=rate).learning_rate == 0.02 / (i + 1)
    assert all(torch.equal(a, b) for a, b in zip(one.params, two.params, strict=True))


def test_parameters_that_do_not_decay():
    decaying, plain, mixed = Device(drawn(), weight_decay=0.5), Device(drawn()), Device(drawn(), weight_decay=0.5)
    grads, decays = drawn(seed=1), [i % 2 == 0 for i in range(len(SHAPES))]
    mixed.plan = on_gpu.DevicePlan(mixed.params, mixed.states, grads, mixed.h, decays=decays)
    for device in (decaying, plain, mixed):
        device.step(grads)
    wanted = [a if d else b for a, b, d in zip(decaying.params, plain.params, decays, strict=True)]
    assert all(torch.equal(p, w) for p, w in zip(mixed.params, wanted, strict=True))
    assert not torch.equal(decaying.params[1], plain.params[1])


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_several_groups_and_many_tensors(clip, monkeypatch):
    monkeypatch.setattr(triton_prepare, "BLOCK", 4)  # so that few tensors are many blocks
    settings = {clip: 0.5, "eps": 0.1}
    shapes = [(n % 7,) for n in range(23)] + [(2 * CHUNK + 5,)]
    half, params = 9, drawn(shapes)
    _, others = on_cpu(params)
    groups = [{"params": others[:half], "lr": 0.1}, {"params": others[half:]}]
    optimizer = NAdam(groups, **{**DEFAULTS, **settings})
    one, two = Device(params[:half], lr=0.1, **settings), Device(params[half:], **settings)
    for i in range(2):
        grads = drawn(shapes, seed=i)
        report = on_gpu.step([one.part(grads[:half]), two.part(grads[half:])])
        give(others, grads)
        optimizer.step()
        assert math.isclose(report.clip_factor, optimizer.last_step.clip_factor, rel_tol=1e-12)
    assert all_apart(one, optimizer, others[:half]) <= UNITS
    assert all_apart(two, optimizer, others[half:]) <= UNITS


def test_norms_do_not_overflow():
    device = Device(drawn(dtype=torch.float64), global_clipnorm=1.0)
    grads = drawn(dtype=torch.float64, seed=1, scale=1e200)
    norm = math.hypot(*(float(x) for g in grads for x in g.flatten()))
    assert math.isclose(device.step(grads).grad_norm, norm, rel_tol=1e-12)
    single = Device(drawn(), global_clipnorm=1.0)
    assert math.isfinite(single.step([g * 1e37 for g in drawn(seed=1)]).grad_norm)
    assert all(bool(p.isfinite().all()) for p in (*single.params, *device.params))


def test_sums_handed_on_to_others():
    seen = []

    def combine(entries):
        seen.append(entries.shape)
        return torch.cat([entries, entries])  # another process with the same

    device = Device(drawn(), global_clipnorm=1.0, eps=0.1)
    report = device.step(drawn(seed=1), combine=combine)
    alone = Device(drawn(), global_clipnorm=1.0, eps=0.1).step(drawn(seed=1))
    assert math.isclose(report.grad_norm, alone.grad_norm * math.sqrt(2.0), rel_tol=1e-12)
    assert seen == [(len(SHAPES), 3)]


def test_gradients_that_are_missing_in_a_window():
    settings = {"gradient_accumulation_steps": 3, "eps": 0.1, "clipnorm": 0.5}
    device = Device(drawn(), **settings)
    optimizer, others = on_cpu(device.params, **settings)
    before = device.params[5].clone()
    for i in range(6):
        grads = drawn(seed=i)
        grads[5] = None  # in all of them: nothing of it moves
        grads[4] = grads[4] if i == 0 else None  # in the second window: nothing moves any more
        grads[i % 3] = None
        report = device.step(grads)
        give(others, grads)
        optimizer.step()
        assert report.step == optimizer.last_step.step
    assert torch.equal(device.params[5], before)
    assert [float(state["step"]) for state in device.states] == [2, 2, 2, 2, 1, 0]
    assert apart(device.params, others) <= UNITS
    assert all(not bool(s["grad_accumulator"].any()) for s in device.states)


def test_a_skipped_call_does_not_count_in_its_window():
    settings = {"gradient_accumulation_steps": 2, "eps": 0.1, "skip_nonfinite": True}
    device = Device(drawn(), **settings)
    optimizer, others = on_cpu(device.params, **settings)
    for i in range(5):
        grads = drawn(seed=i)
        if i in (1, 3):
            grads[0][0, 0] = math.inf
        device.step(grads)
        give(others, grads)
        optimizer.step()
    assert device.states[0]["step"] == 1
    assert all_apart(device, optimizer, others) <= UNITS


def test_counters_go_on_where_gradients_change_their_format():
    settings = {"gradient_accumulation_steps": 3, "eps": 0.1, "skip_nonfinite": True}
    device, twin = Device(drawn(), **settings), Device(drawn(), **settings)
    for i in range(7):
        grads = [g.to(torch.bfloat16) for g in drawn(seed=i)]
        grads[0] = grads[0] if i % 3 == 0 else None  # only in the first call of a window
        if i == 1:
            grads[1][0] = math.nan
        wide = [None if g is None else g.float() for g in grads]
        mixed = [w if (i + j) % 2 else g for j, (w, g) in enumerate(zip(wide, grads, strict=True))]
        seen, report = device.step(mixed), twin.step(wide)
        assert seen.read() == report.read()
    assert report.skipped_steps == 1
    assert device.position() == 0
    assert all(torch.equal(a, b) for a, b in zip(device.copy(), twin.copy(), strict=True))


def test_tables_follow_the_gradients():
    device = Device(drawn())
    device.step(drawn(seed=1))
    plan, rows = device.plan, device.plan.tables.rows.clone()
    assert plan.fits(kept := drawn(seed=2))
    assert not torch.equal(rows, plan.tables.rows)
    rows = plan.tables.rows
    again = rows.clone()
    assert plan.fits(kept)
    assert torch.equal(rows, again)
    assert not plan.fits([g.double() for g in kept])
    assert not plan.fits(kept[:-1])
    device.params[0].data = device.params[0].data.clone()
    assert not plan.fits(kept)


def test_other_orders_of_dimensions():
    shape = (2, 3, 4, 5)
    params = [p.contiguous(memory_format=torch.channels_last) for p in drawn([shape])]
    device = Device(params)
    optimizer, others = on_cpu(params)
    for i, order in enumerate([torch.channels_last, torch.contiguous_format]):
        grads = [g.contiguous(memory_format=order) for g in drawn([shape], seed=i)]
        assert takes(params[0], device.states[0])
        device.step(grads)
        give(others, grads)
        optimizer.step()
    assert device.params[0].is_contiguous(memory_format=torch.channels_last)
    assert apart(device.params, others) <= UNITS
    strided = torch.zeros(4, 6)[:, ::2]
    assert not takes(strided, buckets.new_state(strided, device.h, device.options))


def test_the_report_is_read_when_somebody_looks():
    device = Device(drawn())
    report, later = device.step(drawn(seed=1)), device.step(drawn(seed=2))
    assert (report.step, later.step) == (1, 2)
    assert "step=1" in repr(report)
    report._values[0][0, 1] = 41.0  # as a replay would
    assert report.step == 41


@pytest.mark.parametrize("momentum_decay", [0.0, 0.004, 1.0, math.inf])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("bias_correction", ["nadam", "adam"])
def test_coefficients_are_those_of_the_host(momentum_decay, beta2, bias_correction):
    settings = {"beta2": beta2, "momentum_decay": momentum_decay}
    device = Device([torch.zeros(3)], **settings, bias_correction=bias_correction)
    settings["adam_correction"] = bias_correction == "adam"
    grads = [torch.ones(3)]
    for step in (1, 2, 10, 1000, 10**6):
        part = device.part(grads)
        part.plan.counters[:2] = torch.tensor([step - 1.0, 0.75])
        on_gpu.step([part])
        c, product = coefficients(step, lr=0.02, beta1=0.9, eps=1e-8, momentum_product=0.75, **settings)
        scalars = dict(zip(SCALARS, part.plan.scalars["float64"].tolist(), strict=True))
        ours = [scalars[name] for name in c._fields]
        np.testing.assert_allclose(ours, c, rtol=1e-14, atol=0)
        assert math.isclose(part.plan.counters[1], product, rel_tol=1e-14)


@triton.jit
def keys_kernel(seed, step, members, out, count: tl.constexpr):
    offsets = tl.arange(0, count)
    of_step = triton_formats.hash32(tl.load(step), tl.load(seed).to(tl.uint32))
    tl.store(out + offsets, triton_formats.hash32(tl.load(members + offsets), of_step).to(tl.int64))


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (1, 2), (123456789, 1000), (2**32 - 1, 2**31)])
def test_keys_of_stochastic_rounding_are_those_of_the_cpu(seed, step):
    members, out = np.arange(8), torch.zeros(8, dtype=torch.int64)
    keys_kernel[(1,)](torch.tensor(seed), torch.tensor(step), torch.from_numpy(members), out, count=8)
    assert out.tolist() == keys(seed, step, members).tolist()


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_learning_rate_on_the_device_out_of_its_range_is_not_silent(rate):
    device = Device(drawn([(5,)]))
    device.step(drawn([(5,)], seed=1), lr=torch.tensor(rate))
    assert device.params[0].isnan().all()
