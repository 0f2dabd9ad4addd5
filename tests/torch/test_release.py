"""Gradient release: the numbers are those without it, bit for bit, and gradients are gone within the backward pass."""

import sys
import warnings
import weakref

import pytest
import torch
from training import DEVICE, apart, equal

from nadam.torch import NAdam, NAdamW, release
from nadam.torch.bucket_cache import BucketCache

if DEVICE != "cpu":
    pytest.skip("parameters on a GPU are refused", allow_module_level=True)

WIDTH = 16
EACH_MB = 2500 / 2**20  # two layers and a half


class Model(torch.nn.Module):
    """Layers, one of them used twice, and one that not every pass uses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(8)])
        self.seldom = torch.nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def loss(self, i):
        dtype = self.seldom.weight.dtype
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i)).to(dtype)
        for layer in [*self.layers, self.layers[2]]:
            x = torch.tanh(layer(x))
        return ((self.seldom(x) if i % 3 == 0 else x) ** 2).sum()


def given(model, order):
    """A model's parameters as an optimizer may get them."""
    if order != "groups":
        return list(model.parameters())[:: -1 if order == "reversed" else 1]
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}]


def train(model, optimizer, steps, scheduler=None):
    for i in steps:
        model.loss(i).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


SETTINGS = [
    {},
    {"clipnorm": 0.05},
    {"clipvalue": 0.01, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "track_grad_norm": True},
    {"use_ema": True, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "clipnorm": 0.05, "use_ema": True},
    {"exp_avg_dtype": torch.bfloat16},
]


def pair(settings, order="plain", dtype=torch.float32, cls=NAdam, **options):
    """The same run without and with release."""
    runs = []
    for _ in range(2):
        model = Model(dtype)
        runs.append((model, cls(given(model, order), **settings)))
    release(runs[1][1], **{"bucket_mb": EACH_MB, **options})
    return runs


def check_same(one, other):
    (model, optimizer), (released, releasing) = one, other
    assert equal(model.parameters(), released.parameters())
    saved, other_saved = optimizer.state_dict(), releasing.state_dict()
    assert saved["param_groups"] == other_saved["param_groups"]
    assert saved["state"].keys() == other_saved["state"].keys()
    for key, entry in saved["state"].items():
        assert entry.keys() == other_saved["state"][key].keys()
        assert equal(entry.values(), other_saved["state"][key].values())
    last, other_last = optimizer.last_step, releasing.last_step
    assert other_last._replace(grad_norm=None) == last._replace(grad_norm=None)
    assert (last.grad_norm is None) == (other_last.grad_norm is None)
    if last.grad_norm is not None:
        assert other_last.grad_norm == pytest.approx(last.grad_norm, rel=1e-15)


@pytest.mark.parametrize("order", ["plain", "reversed", "groups"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_bits(settings, order):
    one, other = pair({"lr": 0.02, **settings}, order)
    # Rounding depends on the place among the gradients that there are: with these passes all are.
    for i in range(0, 21, 3) if "exp_avg_dtype" in settings else range(7):
        train(*one, [i])
        train(*other, [i])
        check_same(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    settings = {"lr": 0.02, "remainder": dtype == torch.bfloat16}
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 60).to(dtype).view(20, 3)) for _ in range(3)] for _ in range(2)]
    optimizers = [NAdam(each, **settings) for each in params]
    release(optimizers[1], bucket_mb=1e-5)
    for _ in range(4):
        for each, optimizer in zip(params, optimizers, strict=True):
            sum((param * param.conj()).real.sum() * (i + 1) for i, param in enumerate(each)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equal(*params)
    assert not equal(params[0][:1], [torch.linspace(-1, 1, 60).to(dtype).view(20, 3)])


def test_nadamw_and_threads():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            one, other = pair({"lr": 0.02, "clipnorm": 0.1}, cls=NAdamW)
            train(*one, range(4))
            train(*other, range(4))
            check_same(one, other)
        finally:
            torch.set_num_threads(before)
        results.append(list(other[0].parameters()))
    assert equal(*results)


def test_with_a_scheduler():
    one, other = pair({"lr": 0.02}, order="groups")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a scheduler before the first step
        for model, optimizer in (one, other):
            train(model, optimizer, range(6), torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], 20))
    check_same(one, other)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"clipnorm": 0.1}], ids=str)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_goes_on_with_and_without(before, after, settings):
    whole = pair(settings)[0]
    train(*whole, range(9))
    model, optimizer = pair(settings)[before]
    train(model, optimizer, range(5))
    resumed, loaded = pair(settings)[after]
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    train(resumed, loaded, range(5, 9))
    check_same(whole, (resumed, loaded))


@pytest.mark.parametrize("count", [2, 40])
def test_few_gradients_are_alive(count):
    """They and not only ``.grad``: nothing else holds them."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(count)])
    optimizer = NAdam(model.parameters(), lr=1e-3)
    alive, peak = weakref.WeakSet(), 0

    def look(param):
        nonlocal peak
        alive.add(param.grad.untyped_storage())
        peak = max(peak, sum(storage.nbytes() for storage in alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    total = sum(param.nbytes for param in model.parameters())
    with release(optimizer, bucket_mb=total / 16 / 2**20):
        for _ in range(3):
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
            assert not alive
    assert (peak <= 0.15 * total) == (count == 40), peak / total
    peak = 0
    model(torch.randn(2, 64)).sum().backward()
    assert peak == total


def test_plans_are_kept(monkeypatch):
    """A step makes none anew, and small tensors share one."""
    formed = []
    form = BucketCache._form
    monkeypatch.setattr(BucketCache, "_form", lambda *given: (formed.append(len(given)), form(*given)))
    model, optimizer = pair({})[1]
    train(model, optimizer, [1])
    assert 3 <= len(formed) <= 5
    train(model, optimizer, [2, 4, 5])
    assert 3 <= len(formed) <= 5
    formed.clear()
    other = pair({}, bucket_mb=None)[1]
    train(*other, [1, 2])
    assert len(formed) == 1


def test_global_clipnorm_by_the_norm_before():
    limit, settings = 0.5, {"lr": 0.02}
    model, optimizer = pair({**settings, "global_clipnorm": limit}, dtype=torch.float64, global_clipnorm_lag=1)[1]
    plain = Model(torch.float64)
    reference = NAdam(plain.parameters(), **settings)
    before = 0.0
    for i in range(1, 8):
        train(model, optimizer, [i])
        plain.loss(i).backward()
        grads = [param.grad for param in plain.parameters() if param.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads])))
        factor = min(1.0, limit / before) if before else 1.0
        for grad in grads:
            grad.mul_(factor)
        reference.step()
        reference.zero_grad()
        assert optimizer.last_step.clip_factor == pytest.approx(factor, rel=1e-12)
        assert optimizer.last_step.grad_norm == pytest.approx(norm, rel=1e-12)
        before = norm
    assert factor < 0.9
    assert apart(model.parameters(), plain.parameters()) < 1e5  # eps of float64: 2e-11; the factors' last places add up
    # and a checkpoint knows the norm
    resumed, loaded = pair({**settings, "global_clipnorm": limit}, dtype=torch.float64, global_clipnorm_lag=1)[1]
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for run in ((model, optimizer), (resumed, loaded)):
        train(*run, [8, 9])
    check_same((model, optimizer), (resumed, loaded))


def test_what_arrives_otherwise_moves_at_the_step():
    """A closure; a gradient set by hand; parameters that were added, frozen and thawed, exchanged."""
    one, other = pair({"lr": 0.02})
    late = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for (model, optimizer), param in zip((one, other), late, strict=True):

        def closure(model=model, optimizer=optimizer, param=param):
            optimizer.zero_grad()
            loss = model.loss(0) + param.sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
        optimizer.add_param_group({"params": [param], "lr": 0.5})
        param.grad = torch.ones(3)
        optimizer.step(closure)
        assert float(param.detach()[0]) < 0.9
        model.layers[0].weight.requires_grad_(False)
        optimizer.step(closure)
        model.layers[0].weight.requires_grad_(True)
        model.layers[1].bias = torch.nn.Parameter(torch.zeros(WIDTH))
        optimizer.param_groups[0]["params"][3] = model.layers[1].bias
        optimizer.step(closure)
        optimizer.zero_grad()
        train(model, optimizer, range(3))
    assert equal([late[0]], [late[1]])
    assert equal(one[0].parameters(), other[0].parameters())


def test_hooks_follow_the_groups():
    model, optimizer = pair({})[1]
    gone, new = model.layers[7].weight, model.layers[1].weight
    optimizer.param_groups[0]["params"] = [param for param in model.parameters() if param is not gone]
    new.requires_grad_(False)
    train(model, optimizer, [1])
    new.requires_grad_(True)
    train(model, optimizer, [2])  # its hook is made in this pass
    before, versions = gone.detach().clone(), [param._version for param in model.layers.parameters()]
    model.loss(4).backward()
    assert new.grad is None
    assert gone.grad is not None
    assert torch.equal(gone, before)
    for param, version in zip(model.layers.parameters(), versions, strict=True):  # autograd knows who has changed
        assert (param._version > version) == (param.grad is None)


def test_a_second_gradient_before_the_step_is_refused():
    one, other = pair({"lr": 0.02})
    model, optimizer = other
    model.loss(1).backward()
    moved = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"params\[1[0-9]\]: a second gradient before step\(\)"):
        model.loss(1).backward()
    assert equal(moved, model.parameters())
    for method in (optimizer.state_dict, optimizer._released.remove):
        with pytest.raises(RuntimeError, match="between a backward pass and step"):
            method()
    optimizer.step()
    train(*one, [1])
    # The layer that met the second pass has the sum, as whatever adds up in `.grad` has.
    assert sum(equal([p], [q]) for p, q in zip(one[0].parameters(), model.parameters(), strict=True)) >= 14


def test_a_backward_pass_that_fails_midway():
    model, optimizer = pair({"lr": 0.02})[1]
    train(model, optimizer, [1])
    saved, weights = optimizer.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    saved = {**saved, "state": {key: {n: v.clone() for n, v in e.items()} for key, e in saved["state"].items()}}

    def fail(_):
        raise ValueError("midway")

    handle = model.layers[3].weight.register_hook(fail)
    with pytest.raises(ValueError, match="midway"):
        model.loss(2).backward()
    handle.remove()
    steps = [int(optimizer.state[param]["step"]) for param in model.layers.parameters()]
    assert steps[0] == 1
    assert steps[-1] == 2
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    train(model, optimizer, [2, 3])
    whole = pair({"lr": 0.02})[0]
    train(*whole, [1, 2, 3])
    check_same(whole, (model, optimizer))
    # or ended, with what has come
    handle = model.layers[3].weight.register_hook(fail)
    with pytest.raises(ValueError, match="midway"):
        model.loss(2).backward()
    handle.remove()
    optimizer.step()
    train(model, optimizer, [4])
    assert {int(optimizer.state[param]["step"]) for param in model.layers.parameters()} == {4, 5}


def test_after_an_interrupt_the_end_of_the_step_moves_nothing_twice(monkeypatch):
    model, optimizer = pair({"lr": 0.02})[1]
    train(model, optimizer, [0, 3])
    module = sys.modules["nadam.torch.gradient_release"]
    step = module.step

    def interrupted(*args, **options):
        step(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.loss(6).backward()
    monkeypatch.undo()
    optimizer.step()
    steps = [int(optimizer.state[param]["step"]) for param in model.parameters()]
    assert set(steps) == {2, 3}
    train(model, optimizer, [9])
    assert [int(optimizer.state[param]["step"]) for param in model.parameters()] == [step + 1 for step in steps]


def test_settings_are_checked_before_anything_moves():
    model, optimizer = pair({}, order="groups")[1]
    train(model, optimizer, [1])
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups[0]["lr"] = -1.0  # biases come first
    with pytest.raises(ValueError, match=r"learning rate: -1\.0"):
        model.loss(1).backward()
    assert equal(before, model.parameters())
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    train(model, optimizer, [2])
    assert not equal(before, model.parameters())


def test_within_swap_ema():
    model, optimizer = pair({"use_ema": True})[1]
    train(model, optimizer, [1])
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="within swap_ema"):
        model.loss(1).backward()


def test_it_ends():
    one, other = pair({"lr": 0.02, "gradient_accumulation_steps": 2})
    train(*one, range(6))
    train(*other, range(3))
    other[1]._released.remove()
    other[0].loss(3).backward()
    assert all(param.grad is not None for param in other[0].parameters())
    other[1].step()
    other[1].zero_grad()
    with pytest.raises(KeyError), release(other[1], bucket_mb=EACH_MB):
        raise KeyError
    with release(other[1], bucket_mb=EACH_MB) as handle:
        train(*other, [4, 5])
    handle.remove()
    assert other[1]._released is None
    check_same(one, other)


def test_grad_scaler_is_refused_before_anything_moves():
    model, _ = pair({})[1]
    scaler = torch.amp.GradScaler("cpu")
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="GradScaler is at work"):
        scaler.scale(model.loss(1)).backward()
    assert equal(model.parameters(), before)


def test_grad_scaler_is_refused_where_it_comes_later():
    model, optimizer = pair({})[1]
    train(model, optimizer, [1])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.loss(1)).backward()
    with pytest.raises(RuntimeError, match="a step of GradScaler"):
        scaler.step(optimizer)


@pytest.mark.parametrize("order", ["plain", "reversed"])
def test_moments_of_8_bits_are_rounded_as_without(order):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(80, 80, dtype=torch.bfloat16) for _ in range(4)))
        runs.append((model, NAdam(given(model, order), lr=0.01, remainder=8, state_bits=8, seed=4)))
    release(runs[1][1], bucket_mb=0.02)
    for model, optimizer in runs:
        for i in range(4):
            batch = torch.randn(8, 80, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)
            model(batch).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    check_same(*runs)


def test_ddp_is_refused():
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    model, _ = pair({})[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model.forward = lambda i: Model.loss(model, i)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(ValueError, match="DistributedDataParallel has the parameters"):
            wrapped(1).backward()
        assert equal(before, model.parameters())
        with pytest.raises(ValueError, match="DistributedDataParallel has the parameters"):
            release(NAdam(model.parameters()))
        release(NAdam(Model().parameters()))
    finally:
        dist.destroy_process_group()


def test_what_is_refused():
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match=r"Adam, expected a nadam\.torch\.NAdam"):
        release(torch.optim.Adam(params))
    for settings, given, message in [
        ({"skip_nonfinite": True}, {}, "skip_nonfinite=True: expected False"),
        ({"differentiable": True}, {}, "differentiable=True: expected False"),
        ({}, {"bucket_mb": 0}, "bucket_mb=0: expected 0 < bucket_mb < inf"),
        ({}, {"bucket_mb": float("nan")}, "bucket_mb=nan: expected"),
        ({}, {"bucket_mb": "1"}, "bucket_mb='1': expected"),
        ({"global_clipnorm": 1.0}, {}, "global_clipnorm_lag=None: expected 1 with global_clipnorm"),
        ({"global_clipnorm": 1.0}, {"global_clipnorm_lag": 2}, "global_clipnorm_lag=2: expected 1"),
        ({}, {"global_clipnorm_lag": 1}, "global_clipnorm_lag=1: expected None without it"),
    ]:
        optimizer = NAdam(params, **settings)
        with pytest.raises(ValueError, match=message):
            release(optimizer, **given)
        assert optimizer._released is None
    with pytest.raises(ValueError, match=r"params\[0\] is on meta: expected parameters on the CPU"):
        release(NAdam([torch.nn.Parameter(torch.ones(3, device="meta"))]))
    memory = torch.zeros(4)
    shared = NAdam([torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[1:])])
    with pytest.raises(ValueError, match="share memory"):
        release(shared)
    release(optimizer := NAdam(params))
    with pytest.raises(RuntimeError, match="has one already"):
        release(optimizer)
