"""Clipping, averages, accumulation, skipping, precision: what torch.optim.NAdam has not, against recipes around it."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from training import DEVICE, Gradients, apart, equal, parameters, train

from nadam.torch import NAdam, buckets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hosts import HOSTS
from reference import Reference

STOCK = torch.optim.NAdam
UNITS = 60.0  # as in test_torch_drop_in.py


def by_arrays():
    """Leaves the step to PyTorch's operations, as on a device without a kernel."""
    return HOSTS["torch fallback"]().surroundings()


@pytest.fixture(params=["kernel", "arrays"])
def way(request):
    """The kernel, and what other devices have instead."""
    with by_arrays() if request.param == "arrays" else nullcontext():
        yield request.param


def clip_each(params, norm):
    for param in params:
        clip_grad_norm_([param], norm)


@pytest.mark.parametrize(("setting", "clip"), [
    ({"global_clipnorm": 0.5}, lambda params: clip_grad_norm_(params, 0.5)),
    ({"clipnorm": 0.5}, lambda params: clip_each(params, 0.5)),
    ({"clipvalue": 0.3}, lambda params: clip_grad_value_(params, 0.3)),
], ids=["global_clipnorm", "clipnorm", "clipvalue"])  # fmt: skip
def test_clipping(setting, clip, way):
    params, others = parameters(), parameters()
    # An epsilon that matters: without one, a step hardly depends on the size of the gradients.
    options = {"eps": 0.1, "weight_decay": 0.1}
    half = len(params) // 2
    ours = NAdam([{"params": params[:half]}, {"params": params[half:], "lr": 0.01}], **options, **setting)
    stock = STOCK([{"params": others[:half]}, {"params": others[half:], "lr": 0.01}], **options)
    gradients, twin = Gradients(), Gradients()
    for _ in range(30):
        train(ours, params, 1, gradients)
        twin.give(others)
        clip(others)
        stock.step()
    assert apart(params, others) < UNITS


def test_the_report():
    params = parameters()
    optimizer = NAdam(params, lr=0.25, global_clipnorm=0.5)
    assert optimizer.last_step == (0, 0.25, None, None, 0, False, None)
    train(optimizer, params, 3)
    norm = float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params])))
    report = optimizer.last_step
    assert (report.step, report.learning_rate, report.skipped_steps, report.skipped) == (3, 0.25, 0, False)
    np.testing.assert_allclose([report.grad_norm, report.clip_factor], [norm, 0.5 / norm], rtol=1e-6)


def test_gradients_are_left_as_found(way):
    params = parameters()
    optimizer = NAdam(params, global_clipnorm=0.1, weight_decay=0.1, maximize=True)
    Gradients().give(params)
    kept = [(param.grad, param.grad.clone()) for param in params]
    optimizer.step()
    assert all(p.grad is grad and torch.equal(grad, copy) for p, (grad, copy) in zip(params, kept, strict=True))


@pytest.mark.parametrize("frequency", [None, 3])
def test_moving_average(frequency, way):
    params, others = parameters(), parameters()
    optimizer = NAdam(params, lr=0.05, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=frequency)
    stock = STOCK(others, lr=0.05)
    gradients, twin, averages = Gradients(), Gradients(), None
    for step in range(1, 11):
        train(optimizer, params, 1, gradients)
        train(stock, others, 1, twin)
        now = [param.detach().clone() for param in others]
        averages = now if averages is None else [0.8 * a + 0.2 * p for a, p in zip(averages, now, strict=True)]
        if frequency and step % frequency == 0:
            for param, average in zip(others, averages, strict=True):
                param.data.copy_(average)
    assert apart(params, others) < UNITS
    before = [param.detach().clone() for param in params]
    with optimizer.swap_ema():
        assert apart(params, averages) < UNITS
        assert frequency or not equal(params, before)
    assert equal(params, before)
    optimizer.finalize()
    assert apart(params, averages) < UNITS


def test_averages_before_the_first_step_and_without_use_ema():
    params = parameters()
    NAdam(params, use_ema=True).finalize()
    assert equal(params, parameters())
    with pytest.raises(RuntimeError, match="use_ema=False"):
        NAdam(params).finalize()
    with pytest.raises(RuntimeError, match="use_ema=False"), NAdam(params).swap_ema():
        pass


def test_accumulation(way):
    params, others = parameters(), parameters()
    optimizer, stock = NAdam(params, eps=0.1, gradient_accumulation_steps=4), STOCK(others, eps=0.1)
    gradients, twin = Gradients(), Gradients()
    for _ in range(5):
        train(optimizer, params, 4, gradients)
        sums = [torch.zeros_like(p) for p in others]
        for _ in range(4):
            twin.give(others)
            sums = [total + p.grad for total, p in zip(sums, others, strict=True)]
        for param, total in zip(others, sums, strict=True):
            param.grad = total / 4
        stock.step()
    assert apart(params, others) < UNITS
    assert optimizer.state[params[0]]["step"] == 5


def test_accumulation_resumes_in_the_middle_of_a_window():
    params, gradients = parameters(), Gradients()
    optimizer = NAdam(params, gradient_accumulation_steps=3)
    train(optimizer, params, 4, gradients)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = NAdam(others, gradient_accumulation_steps=3)
    other.load_state_dict(optimizer.state_dict())
    state = gradients.generator.get_state()
    train(optimizer, params, 4, gradients)
    gradients.generator.set_state(state)
    train(other, others, 4, gradients)
    assert equal(params, others)
    assert "accumulation_position" not in optimizer.param_groups[0]


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_gradient_that_is_missing_at_the_end_of_a_window_counts_as_zero(way, steps):
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = NAdam([one, other], lr=0.1, eps=0.1, gradient_accumulation_steps=steps)
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    other.grad = None
    for _ in range(steps - 1):
        optimizer.step()
    reference = Reference([np.ones(2)] * 2, 0.1, epsilon=0.1, momentum_decay=0.004)
    reference.step([np.ones(2), np.full(2, 1 / steps)])
    np.testing.assert_allclose(one.detach().cpu(), reference.p[0], rtol=1e-6)
    np.testing.assert_allclose(other.detach().cpu(), reference.p[1], rtol=1e-6)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_gradient_of_zeros_counts_as_seen(way, resumed):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    settings = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True, "gradient_accumulation_steps": 2}
    optimizer = NAdam(params, **settings)
    params[0].grad, params[1].grad = torch.ones(2), torch.zeros(2)
    optimizer.step()
    if resumed:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = NAdam(params, **settings)
        optimizer.load_state_dict(saved)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1].cpu(), torch.full((2,), 0.95))  # it decays, as with a gradient of zeros in each call
    assert torch.equal(params[2].cpu(), torch.ones(2))
    assert float(optimizer.state[params[1]]["step"]) == 1.0
    for _ in range(2):
        optimizer.step()
    assert torch.equal(params[1].cpu(), torch.full((2,), 0.95))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_skip_nonfinite(value, way):
    params, gradients = parameters(), Gradients()
    optimizer = NAdam([{"params": params[:2]}, {"params": params[2:]}], skip_nonfinite=True)
    train(optimizer, params, 2, gradients)
    before = [param.detach().clone() for param in params]
    state = {i: {k: v.clone() for k, v in entry.items()} for i, entry in optimizer.state_dict()["state"].items()}
    gradients.give(params)
    params[4].grad[1, 2, 0] = value
    optimizer.step()
    assert equal(params, before)
    assert optimizer.last_step.skipped
    assert optimizer.last_step.skipped_steps == 1
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state[i][name]) for name in entry)
    train(optimizer, params, 1, gradients)
    assert (optimizer.last_step.step, optimizer.last_step.skipped) == (3, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_moments_in_float32(dtype, way):
    params = parameters(dtype)
    reference = Reference([p.detach().double().cpu().numpy() for p in params], 0.01, epsilon=1e-8, momentum_decay=0.004)
    optimizer, gradients = NAdam(params, lr=0.01), Gradients()
    for step in range(1, 11):
        train(optimizer, params, 1, gradients)
        reference.step([p.grad.double().cpu().numpy() for p in params])
        for param, exact in zip(params, reference.p, strict=True):
            unit = torch.finfo(dtype).eps * np.maximum(np.abs(exact), 1.0)
            assert (np.abs(param.detach().double().cpu().numpy() - exact) <= unit * (0.5 + step / 2)).all()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    other = NAdam(parameters(dtype))
    other.load_state_dict(optimizer.state_dict())
    assert other.state[other.param_groups[0]["params"][0]]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"use_ema": True, "ema_overwrite_frequency": 7}], ids=str
)
def test_a_remainder_makes_a_bfloat16_parameter_move_as_float32(options, way):
    halves = parameters(torch.bfloat16)
    wholes = [torch.nn.Parameter(param.detach().float()) for param in halves]
    one, other = NAdam(halves, lr=1e-4, remainder=True, **options), NAdam(wholes, lr=1e-4, **options)
    gradients, twin = Gradients(), Gradients()
    for _ in range(200):
        gradients.give(halves)
        twin.give(wholes)
        for half, whole in zip(halves, wholes, strict=True):
            whole.grad = half.grad.float()
        one.step()
        other.step()
    for half, whole in zip(halves, wholes, strict=True):
        rest = one.state[half]["remainder"]
        assert rest.dtype == torch.int16
        joined = (half.detach().view(torch.int16).int() << 16) + rest.int()
        assert torch.equal(joined.view(torch.float32), whole)
        assert ((half.detach().float() - whole).abs() <= 2.0**-8 * whole.abs()).all()
    before = [half.detach().clone() for half in halves]
    if "use_ema" in options:
        with one.swap_ema():
            pass
        assert equal(halves, before)


def test_a_remainder_is_saved():
    halves, gradients = parameters(torch.bfloat16), Gradients()
    optimizer = NAdam(halves, lr=1e-4, remainder=True)
    train(optimizer, halves, 5, gradients)
    others = [torch.nn.Parameter(half.detach().clone()) for half in halves]
    other = NAdam(others, remainder=True)
    other.load_state_dict(optimizer.state_dict())
    state = gradients.generator.get_state()
    train(optimizer, halves, 20, gradients)
    gradients.generator.set_state(state)
    train(other, others, 20, gradients)
    assert equal(halves, others)
    assert torch.equal(optimizer.state[halves[0]]["remainder"], other.state[others[0]]["remainder"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, -0.0, 1.00390625])
def test_a_remainder_of_special_values(value, way):
    half, whole = (torch.nn.Parameter(torch.full((3,), value).to(d)) for d in (torch.bfloat16, torch.float32))
    whole.data.copy_(half.detach())
    optimizers = [NAdam([param], lr=2.0, remainder=remainder) for param, remainder in ((half, True), (whole, False))]
    for _ in range(2):
        for param, optimizer in zip((half, whole), optimizers, strict=True):
            param.grad = torch.ones(3, dtype=param.dtype)
            optimizer.step()
    state = optimizers[0].state[half]
    joined = ((half.detach().view(torch.int16).int() << 16) + state["remainder"].int()).view(torch.float32)
    torch.testing.assert_close(joined, whole.detach(), rtol=0, atol=0, equal_nan=True)


def test_a_device_without_a_kernel_warns_once(monkeypatch):
    params = parameters()
    optimizer = NAdam(params)
    with by_arrays():
        monkeypatch.setattr(buckets, "_warned", {"another"})
        with pytest.warns(UserWarning, match=f"no kernel for '{DEVICE}'"):
            train(optimizer, params, 1)
        train(optimizer, params, 3)
        monkeypatch.undo()


def test_an_expanded_parameter_is_refused_before_anything_changes(way):
    param = torch.nn.Parameter(torch.ones(1).expand(3))
    optimizer = NAdam([param])
    for _ in range(2):
        param.grad = torch.ones(3)
        with pytest.raises(ValueError, match=r"params\[0\].* share memory"):
            optimizer.step()
    assert float(optimizer.state[param]["step"]) == 0
    assert not optimizer.state[param]["exp_avg"].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="there both are held against the reference: test_hosts_agree.py")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clipnorm": 0.5, "use_ema": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float16])
def test_arrays_and_kernel_agree(dtype, options):
    results = []
    for way in (nullcontext, by_arrays):
        params = parameters(dtype)
        with way():
            train(NAdam(params, lr=0.01, **options), params, 20)
        results.append([param.detach().to(torch.complex64 if dtype.is_complex else torch.float64) for param in params])
    units = {torch.float64: 1e-14, torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=units, atol=units)


def test_a_first_moment_in_bfloat16_follows_the_float32_one(way):
    """Rounded to nearest it would stand still far from the mean of the gradients, 1 + 2**-7 of a unit at a time."""
    params = [torch.nn.Parameter(torch.zeros(64, 64))]
    optimizer = NAdam(params, betas=(0.999, 0.999), exp_avg_dtype=torch.bfloat16, seed=3)
    for _ in range(3000):
        params[0].grad = torch.ones(64, 64)
        optimizer.step()
    moment = optimizer.state[params[0]]["exp_avg"]
    assert moment.dtype == torch.bfloat16
    mean, expected = float(moment.double().mean()), 1 - 0.999**3000
    assert abs(mean / expected - 1) < 2e-3
    assert moment.unique().numel() > 3  # its elements went their own ways


def test_rounding_by_chance_is_seeded_and_resumed():
    def run(seed, resumed):
        params, gradients = parameters(torch.bfloat16, shapes=[(5, 70), (3, 4, 2), ()]), Gradients()
        params[0] = torch.nn.Parameter(params[0].detach().t())
        options = {"exp_avg_dtype": torch.bfloat16, "seed": seed, "lr": 0.01}
        optimizer = NAdam(params, **options)
        train(optimizer, params, 10, gradients)
        if resumed:
            state = optimizer.state_dict()
            optimizer = NAdam(params, **options)
            optimizer.load_state_dict(state)
        train(optimizer, params, 10, gradients)
        return [optimizer.state[param]["exp_avg"] for param in params]

    first = run(seed=0, resumed=False)
    assert equal(first, run(seed=0, resumed=True))
    assert not equal(first, run(seed=1, resumed=False))
    with by_arrays():
        found = run(seed=0, resumed=False)
    for one, other in zip(first, found, strict=True):
        # The same chance; but where the numbers differ in their last place, it may fall otherwise.
        assert (one == other).float().mean() > 0.98


@pytest.mark.parametrize(("argument", "value"), [("exp_avg_dtype", torch.float16), ("seed", -1), ("seed", True)])
def test_arguments_of_rounding_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"{argument}="):
        NAdam(parameters(), **{argument: value})
