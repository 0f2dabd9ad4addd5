"""`NAdam` through the GPU kernels beside itself on the CPU: in Triton's interpreter, or on a GPU (test_triton.py)."""

import copy
import io
import sys
import warnings

import pytest
import torch
from edits import EDITS, Pair
from training import DEVICE, apart, seeded

from nadam.torch import NAdam
from nadam.torch.gpu import bucket_cache as gpu_parts

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2, 2)]
OPTIONS = {
    "defaults": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "clipping and averages": {"global_clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 3, "eps": 0.1},
    "clipnorm": {"clipnorm": 0.5, "eps": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "eps": 0.1},
    "skipping": {"skip_nonfinite": True},
    "maximize": {"maximize": True},
    "tracking": {"track_grad_norm": True},
}
UNITS = 8.0  # fused products and sums, and the order of a sum


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """How often the GPU kernels moved something; they take the CPU's tensors here."""
    monkeypatch.setattr(gpu_parts, "DEVICES", {"cuda", DEVICE})
    module, calls = gpu_parts.on_gpu(), []
    real = module.moved
    monkeypatch.setattr(module, "moved", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def normal(seed, shapes):
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


def made(dtype=torch.float32, seed=0):
    numbers = normal(seed, SHAPES)
    params = [torch.nn.Parameter(values.to(DEVICE, dtype)) for values in numbers]
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


def give(params, seed, missing=(), bad=False):
    numbers = normal(seed, [param.shape for param in params])
    for i, (param, values) in enumerate(zip(params, numbers, strict=True)):
        param.grad = None if i in missing else values.to(param.device, param.dtype)
    if bad:
        params[0].grad[0, 0] = torch.nan


def train(optimizer, params, steps, first=1, **given):
    for step in range(first, first + steps):
        give(params, step, **given)
        optimizer.step()


def on_cpu(monkeypatch, action):
    with monkeypatch.context() as patch:
        patch.setattr(gpu_parts, "DEVICES", {"cuda"})
        patch.setattr(sys.modules[__name__], "DEVICE", "cpu")
        return action()


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05, "betas": (0.8, 0.99)}]


def values(optimizer, params):
    """Parameters and state, as float32 numbers."""
    state = optimizer.state_dict()["state"]
    entries = [entry[name] for entry in state.values() for name in sorted(entry)]
    return numbers([*params, *entries])


def numbers(tensors):
    return [tensor.detach().float().cpu() for tensor in tensors]


@pytest.mark.parametrize("name", OPTIONS)
def test_as_on_the_cpu(name, kernels, monkeypatch):
    def run():
        params = made()
        optimizer = NAdam(groups(params), lr=0.02, **OPTIONS[name])
        train(optimizer, params, 3)
        train(optimizer, params, 1, first=4, missing={1})
        train(optimizer, params, 2, first=5)
        return optimizer, params

    ours, params = run()
    assert len(kernels) == 6
    other, others = on_cpu(monkeypatch, run)
    assert len(kernels) == 6
    assert apart(values(ours, params), values(other, others)) <= UNITS
    seen, expected = ours.last_step.read(), other.last_step
    assert (seen.step, seen.skipped_steps, seen.skipped) == (expected.step, expected.skipped_steps, expected.skipped)
    for one, two in ((seen.grad_norm, expected.grad_norm), (seen.clip_factor, expected.clip_factor)):
        assert (one is None) == (two is None)
        assert one is None or abs(one / two - 1) < 1e-6


@pytest.mark.parametrize("name", ["defaults", "accumulation", "clipping and averages", "skipping"])
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy"])
def test_goes_on_from_its_state(name, way, kernels):
    params = made()
    optimizer = NAdam(groups(params), lr=0.02, **OPTIONS[name])
    train(optimizer, params, 3)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    if way == "deepcopy":
        other, others = copy.deepcopy((optimizer, params))
    else:
        state = optimizer.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        other = NAdam(groups(others), lr=0.02, **OPTIONS[name])
        other.load_state_dict(state)
    train(optimizer, params, 3, first=4)
    train(other, others, 3, first=4)
    assert apart(values(optimizer, params), values(other, others)) == 0


def test_goes_on_between_devices(kernels, monkeypatch):
    """State of the GPU kernels on the CPU and back, and in PyTorch's own class."""
    params = made()
    optimizer = NAdam(params, lr=0.02)
    train(optimizer, params, 2)
    if DEVICE == "cpu":
        on_cpu(monkeypatch, lambda: train(optimizer, params, 2, first=3))
    else:
        train(optimizer, params, 2, first=3)
    train(optimizer, params, 2, first=5)
    assert len(kernels) == (4 if DEVICE == "cpu" else 6)
    others = made()
    stock = torch.optim.NAdam(others, lr=0.02)
    train(stock, others, 6)
    assert apart(numbers(params), numbers(others)) <= 60
    again = torch.optim.NAdam(others, lr=0.02)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[others[0]]["step"]) == 6


def test_skips_and_counts(kernels):
    params = made()
    optimizer = NAdam(params, lr=0.02, skip_nonfinite=True, gradient_accumulation_steps=2)
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, first=2, bad=True)
    assert optimizer.last_step.skipped
    assert all(map(torch.equal, before, params))
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["accumulation_position"], group["skipped_steps"]) == (1, 1)
    train(optimizer, params, 1, first=3)
    assert not torch.equal(before[0], params[0])
    assert (optimizer.last_step.step, optimizer.last_step.skipped_steps) == (1, 1)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_as_grad_scaler_calls_it(found, kernels, monkeypatch):
    def run(scale):
        params = made()
        optimizer = NAdam(params, lr=0.02, global_clipnorm=0.5)
        give(params, 1)
        if scale is not None:
            for param in params:
                param.grad *= scale
            tensors = (torch.tensor(number, device=DEVICE) for number in (scale, found))
            optimizer.grad_scale, optimizer.found_inf = tensors
        optimizer.step()
        return optimizer, params

    optimizer, params = run(1024.0)
    expected = made() if found else on_cpu(monkeypatch, lambda: run(None)[1])
    assert apart(numbers(params), numbers(expected)) <= UNITS
    assert optimizer.last_step.skipped == bool(found)


def test_averages(kernels):
    params = made(torch.bfloat16)
    optimizer = NAdam(params, lr=0.1, use_ema=True, ema_momentum=0.5, remainder=True)
    train(optimizer, params, 3)
    inside = [optimizer.state[param]["ema"].to(param.dtype) for param in params]
    before = [param.detach().clone() for param in params]
    with optimizer.swap_ema():
        assert all(map(torch.equal, params, inside))
    assert all(map(torch.equal, params, before))


def test_faults(kernels):
    params = made()
    optimizer = NAdam(params, lr=0.02)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    before = values(optimizer, params)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        train(optimizer, params, 1)
    assert apart(values(optimizer, params), before) == 0
    optimizer.param_groups[0]["lr"] = 0.02
    params[0].grad, kept = params[0].detach(), params[0].grad
    with pytest.raises(ValueError, match=r"grads\[0\]: it shares memory with a variable"):
        optimizer.step()
    params[0].grad = kept
    params[1].data, kept = params[0].data.view(-1)[:5], params[1].data
    with pytest.raises(ValueError, match=r"params\[[01]\] and params\[[01]\]: the variables share memory"):
        optimizer.step()
    params[1].data = kept
    params[0].grad = torch.zeros(3, 4, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="NAdam does not support sparse gradients"):
        optimizer.step()
    assert apart(values(optimizer, params), before) == 0


def test_a_refused_call_in_a_window_loses_nothing(kernels, monkeypatch):
    def run(refused):
        params = made()
        optimizer = NAdam(params, lr=0.02, gradient_accumulation_steps=3)
        train(optimizer, params, 4)
        if refused:
            params[1].data, kept = params[0].data.view(-1)[:5], params[1].data
            with pytest.raises(ValueError, match="share memory"):
                train(optimizer, params, 1)
            params[1].data = kept
        train(optimizer, params, 2, first=5)
        return values(optimizer, params)

    assert apart(run(True), run(False)) == 0


def test_what_the_kernels_cannot_take_is_done_otherwise(kernels):
    params = made()
    params[0].data = torch.randn(3, 8, device=DEVICE)[:, ::2]
    optimizer = NAdam(params, lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a GPU then has no kernel
        train(optimizer, params, 2)
    assert not kernels
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_parameters_that_come_later(kernels, monkeypatch):
    def run():
        params = made()
        optimizer = NAdam(params[:2], lr=0.02)
        train(optimizer, params, 2)
        optimizer.add_param_group({"params": params[2:], "lr": 0.1})
        train(optimizer, params, 2, first=3)
        params[0].data = params[0].data.clone()
        train(optimizer, params, 1, first=5)
        optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()
        train(optimizer, params, 1, first=6)
        return values(optimizer, params)

    assert apart(run(), on_cpu(monkeypatch, run)) <= UNITS


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_steps_is_as_in_pytorch(kernels, edit):
    pair = Pair(shapes=[(3, 4), (5,), (2, 3, 2)])
    for moment in range(5):
        if moment in (2, 4):
            pair.edit(EDITS[edit])
        pair.step()
    assert kernels
