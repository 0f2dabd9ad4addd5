"""Steps that are like the one before, done in few foreign calls: bit for bit the same as those that are not."""

from copy import deepcopy

import pytest
import torch
from training import SHAPES, Gradients, equal, parameters

from nadam.kernels.cpu import machine_code, plan, threads
from nadam.torch import NAdam
from nadam.torch.bucket_cache import BucketCache

SETTINGS = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.5, "weight_decay": 0.01, "use_ema": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "eps": 1e-60},
    "limited": {"clipvalue": 0.5, "betas": (0.3, 0.9999), "use_ema": True, "ema_overwrite_frequency": 7},
    "extreme": {"betas": (0.0, 0.0), "momentum_decay": float("inf"), "eps": 0.0, "global_clipnorm": 1e9},
}
ROUNDED = {
    "8 bits": {"state_bits": 8, "remainder": 8, "seed": 7, "weight_decay": 0.1},
    "bfloat16": {"exp_avg_dtype": torch.bfloat16, "seed": 2**32 - 1, "global_clipnorm": 0.5},
}
MIXED = (torch.bfloat16, torch.float32, torch.float64)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, MIXED]


class Watch:
    """How many updates were done at once, by the kernels that make their scalars themselves."""

    def __init__(self, monkeypatch):
        self.count, update = 0, plan.KernelPlan.update_at_once

        def counted(own, *args):
            done = update(own, *args)
            self.count += done
            return done

        monkeypatch.setattr(plan.KernelPlan, "update_at_once", counted)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


class Slow(NAdam):
    """Looks everything up anew at every step, and makes the scalars in Python."""

    def step(self, closure=None):
        with pytest.MonkeyPatch.context() as patch:
            self._buckets.forget()
            patch.setattr(BucketCache, "_fits", lambda *_: False)
            patch.setattr(plan.KernelPlan, "update_at_once", lambda *_: False)
            patch.setattr(plan.KernelPlan, "_can_fuse", lambda _: False)
            return super().step(closure)


class Run:
    """An optimizer with two groups or one, a schedule, and gradients that are the same for all runs."""

    def __init__(self, kind, dtype=torch.float32, groups=1, steps=100, **settings):
        dtypes = [dtype] if isinstance(dtype, torch.dtype) else dtype  # taken in turns
        shapes = [(5000,), *SHAPES] if "state_bits" in settings else SHAPES
        self.params = parameters(shapes=shapes * groups)
        for i, param in enumerate(self.params):
            param.data = param.data.to(dtypes[i % len(dtypes)])
        self.gradients = Gradients(scale=0.3)
        split = [self.params[i::groups] for i in range(groups)]
        self.optimizer = kind([{"params": own, "lr": 0.01 * (i + 1)} for i, own in enumerate(split)], **settings)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self):
        self.gradients.give(self.params)
        self.optimizer.step()
        self.schedule.step()

    def state(self):
        entries = [self.optimizer.state[param] for param in self.params if param in self.optimizer.state]
        return [p.detach() for p in self.params] + [value for entry in entries for value in entry.values()]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64", "bfloat16", "mixed"])
@pytest.mark.parametrize("settings", [*SETTINGS, *ROUNDED])
def test_the_same_bits(watch, settings, dtype, groups):
    fast, slow = (Run(kind, dtype, groups, **(SETTINGS | ROUNDED)[settings]) for kind in (NAdam, Slow))
    for _ in range(100):
        fast.step()
        slow.step()
        assert fast.optimizer.last_step == slow.optimizer.last_step
    assert equal(fast.state(), slow.state())
    assert watch.count == 99 * groups


class Subclass(torch.Tensor):
    pass


def other_state(run):
    entry = run.optimizer.state[run.params[0]]
    entry["exp_avg"] = entry["exp_avg"] * 2


def no_state(run):
    run.optimizer.state.clear()


def loaded(run):
    run.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))


def copied(run):
    run.params, run.optimizer = deepcopy((run.params, run.optimizer))
    run.schedule = torch.optim.lr_scheduler.ConstantLR(run.optimizer)


def new_data(run):
    run.kept = run.params[0].data  # so that its memory is not given out again
    run.params[0].data = run.kept.clone()


def new_group(run):
    run.params = [*run.params, torch.nn.Parameter(torch.ones(3))]
    run.optimizer.add_param_group({"params": run.params[-1:]})


def setting(name, value):
    return lambda run: run.optimizer.param_groups[0].__setitem__(name, value)


CHANGES = {
    "state": other_state,
    "no state": no_state,
    "loaded": loaded,
    "copied": copied,
    "data": new_data,
    "new group": new_group,
    "fewer parameters": lambda run: run.optimizer.param_groups[0]["params"].pop(),
    "betas": setting("betas", (0.8, 0.99)),
    "decay": setting("weight_decay", 0.5),
    "decoupled": setting("decoupled_weight_decay", True),
    "maximize": setting("maximize", True),
    "lr": lambda run: setting("lr", torch.tensor(0.5))(run),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", ["plain", "clipped"])
def test_a_change_is_seen(settings, change):
    runs = [Run(kind, **SETTINGS[settings]) for kind in (NAdam, Slow)]
    for run in runs:
        for moment in range(9):
            if moment == 5:
                CHANGES[change](run)
            run.step()
    assert equal(*(run.state() for run in runs))


GRADIENTS = {
    "missing": lambda grad: None,
    "subclass": lambda grad: grad.as_subclass(Subclass),
    "strides": lambda grad: grad.t().contiguous().t(),
    "negative": lambda grad: torch.complex(grad, grad).conj().imag,
    "its own, in place": lambda grad: grad.mul_(2),
}


@pytest.mark.parametrize("other", GRADIENTS)
def test_another_gradient_is_seen(other):
    runs = [Run(kind, **SETTINGS["clipped"]) for kind in (NAdam, Slow)]
    for run in runs:
        for moment in range(9):
            run.gradients.give(run.params)
            if moment == 5:
                given = GRADIENTS[other](run.params[0].grad)
                run.params[0].grad = given
            run.optimizer.step()
    assert equal(*(run.state() for run in runs))


def snapshot(run):
    return [value.clone() for value in run.state()], run.optimizer.last_step


def assert_unchanged(run, before):
    assert equal(run.state(), before[0])
    assert run.optimizer.last_step == before[1]


def test_a_sparse_gradient_is_refused():
    run = Run(NAdam)
    for _ in range(3):
        run.step()
    before = snapshot(run)
    run.params[1].grad = run.params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run.optimizer.step()
    assert_unchanged(run, before)


def test_a_scalar_that_no_float32_holds():
    runs = [Run(kind) for kind in (NAdam, Slow)]
    for run in runs:
        for _ in range(3):
            run.step()
        setting("lr", 1e60)(run)
        run.step()
        assert not run.params[0].isfinite().any()
    torch.testing.assert_close(*(run.state() for run in runs), rtol=0, atol=0, equal_nan=True)


def test_norms_whose_squares_overflow():
    runs = [Run(kind, torch.float64, global_clipnorm=1.0) for kind in (NAdam, Slow)]
    for run in runs:
        run.gradients.scale = 1e200
        for _ in range(4):
            run.step()
        assert 1e200 < run.optimizer.last_step.grad_norm < 1e202
    assert equal(*(run.state() for run in runs))
    assert runs[0].optimizer.last_step == runs[1].optimizer.last_step


@pytest.mark.parametrize("slices", range(4))
def test_an_interrupt_between_slices(monkeypatch, slices):
    shapes, steps = [(20,)] * 7, 3
    params, gradients = parameters(shapes=shapes), Gradients()
    optimizer = NAdam(params)
    monkeypatch.setattr(threads, "SLICE", 2)
    for _ in range(steps):
        gradients.give(params)
        optimizer.step()
    at_once = optimizer._buckets.buckets[0].plan._fused[0]
    name, left = ("_pass", slices - 1) if slices else ("_update_kernel", 0)
    kernel = getattr(at_once, name)

    def interrupted(block, budget):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        kernel(block, budget)

    before, versions = [p.detach().clone() for p in params], [p._version for p in params]
    setattr(at_once, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert moved == [i < 2 * slices for i in range(len(shapes))]
    counted = steps + (slices > 0)
    assert [float(optimizer.state[param]["step"]) for param in params] == [steps + one for one in moved]
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    setattr(at_once, name, kernel)
    optimizer.step()
    assert optimizer.last_step.step == counted + 1
    assert [float(optimizer.state[param]["step"]) for param in params] == [steps + 1 + one for one in moved]


@pytest.mark.parametrize("done", range(3))
def test_an_interrupt_between_groups_of_formats(monkeypatch, done):
    run = Run(NAdam, MIXED)
    for _ in range(3):
        run.step()
    fused = run.optimizer._buckets.buckets[0].plan._fused
    assert len(fused) == len(MIXED)

    def interrupted():
        raise KeyboardInterrupt

    def counted(i):
        return float(run.optimizer.state[run.params[i]]["step"])

    with monkeypatch.context() as patch:
        patch.setattr(fused[done], "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.step()
    moved = [int(i) for each in fused[:done] for i in each._group.members]
    sized = [i for i, param in enumerate(run.params) if param.numel()]  # of the others nothing can move
    assert [counted(i) for i in sized] == [3 + (i in moved) for i in sized]
    run.optimizer.step()
    assert [counted(i) for i in sized] == [4 + (i in moved) for i in sized]


def test_gradients_that_never_lie_the_same_way_twice(watch):
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = NAdam([param])
    for i in range(6):
        param.grad = torch.ones(4, 4) if i % 2 else torch.ones(4, 8)[:, ::2]
        optimizer.step()
    assert watch.count == 0
    assert optimizer.last_step.step == 6


def test_too_few_functions_of_the_c_library(watch, monkeypatch):
    monkeypatch.setattr(machine_code, "mathematical_functions", dict)
    run = Run(NAdam)
    for _ in range(4):
        run.step()
    assert run.optimizer.last_step.step == 4
    assert watch.count == 0
