"""Whose memory a step touches, and what a parameter's own counters tell of it."""

import copy
import subprocess
import sys

import pytest
import torch
from training import DEVICE, Gradients, apart, drawn, equal, parameters, seeded, train

from nadam.kernels.cpu import threads
from nadam.torch import NAdam

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def snapshot(optimizer):
    state = {i: {k: v.clone() for k, v in e.items()} for i, e in optimizer.state_dict()["state"].items()}
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]], state


@pytest.mark.parametrize("steps", [0, 3])
def test_groups_that_share_memory_are_refused(steps):
    whole = torch.ones(4)
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = NAdam([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    train(optimizer, params, steps)
    params[0].data, params[1].data = whole[:3], whole[1:]
    before = snapshot(optimizer)
    for _ in range(2):
        Gradients().give(params)
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] and param_groups\[1\].*share memory"):
            optimizer.step()
    assert torch.equal(whole.cpu(), torch.ones(4))
    assert all(
        equal(before[1][i].values(), entry.values()) for i, entry in snapshot(optimizer)[1].items() if i in before[1]
    )


@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_that_is_a_parameter_of_another_group_is_refused(steps):
    params = parameters(shapes=[(3, 4), (3, 4)])
    optimizer = NAdam([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, steps)
    Gradients().give(params)
    params[0].grad = params[1].detach()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shares memory with a variable"):
        optimizer.step()
    after = snapshot(optimizer)
    assert equal(before[0], after[0])
    assert all(equal(before[1][i].values(), after[1][i].values()) for i in before[1])


def test_parameters_may_be_interleaved():
    whole = drawn(seeded(0), (6, 4), torch.float64)
    ours, theirs = (
        [torch.nn.Parameter(w[:, :2]), torch.nn.Parameter(w[:, 2:])] for w in (whole.clone(), whole.clone())
    )
    optimizer, other = NAdam(ours), torch.optim.NAdam(theirs)
    for chosen, one in ((ours, optimizer), (theirs, other)):
        train(one, chosen, 5)
    assert apart(ours, theirs) < 1e8  # of float64: PyTorch's momentum product is float32
    assert ours[0].untyped_storage().data_ptr() == ours[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shape", [(3, 4), (1,), ()])
def test_a_contiguous_view_that_stands_for_its_negative(shape, steps):
    runs = []
    for negative in (False, True):
        params = parameters(shapes=[shape])
        optimizer, gradients = NAdam(params), Gradients()
        train(optimizer, params, steps, gradients)
        gradients.give(params)
        if negative:
            params[0].grad = torch._neg_view(-params[0].grad)
            assert params[0].grad.is_neg()
        optimizer.step()
        runs.append(params)
    assert equal(*runs)


class Interrupted:
    """Passes that are interrupted after so many slices of one chunk."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(threads, "SLICE", 1)
        monkeypatch.setattr(threads, "parallel", lambda: None)
        monkeypatch.setattr(threads, "share_out", self.share_out)
        self.left = None

    def share_out(self, kernel, block, control, chunks, helpers):
        control[0] = control[1] = 0
        while control[0] < chunks:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            kernel(block, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's passes")
@pytest.mark.parametrize("steps", [None, 2])
def test_each_parameter_tells_whether_it_has_moved(monkeypatch, steps):
    interrupted = Interrupted(monkeypatch)
    shapes = [(5,), (70_000,), (3, 4), (0,)]
    params = [torch.nn.Parameter(p.detach().to(dtype)) for dtype in DTYPES for p in parameters(shapes=shapes)]
    optimizer, gradients = NAdam(params, lr=0.5, gradient_accumulation_steps=steps), Gradients()
    train(optimizer, params, 3, gradients)  # with two steps an update, the next call is one
    saved, found = copy.deepcopy((params, optimizer)), set()
    for slices in range(30):
        params, optimizer = copy.deepcopy(saved)
        before = [p.detach().clone() for p in params]
        counts = [float(optimizer.state[p]["step"]) for p in params]
        gradients.give(params)
        interrupted.left = slices
        try:
            optimizer.step()
        except KeyboardInterrupt:
            found.add(slices)
        moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel()]
        told = [float(optimizer.state[p]["step"]) - n for p, n in zip(params, counts, strict=True) if p.numel()]
        assert moved == [bool(each) for each in told]
        interrupted.left = None
        again = [float(optimizer.state[p]["step"]) for p in params]
        for _ in range(steps or 1):
            gradients.give(params)
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [n + 1 for n in again]
    assert found == set(range(5 * len(DTYPES)))


# What a process has resident after a first step of 20 parameters of 4 MB less what it had before, per element.
RESIDENT = """
import torch
from nadam.torch import NAdam

def resident():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def stepped(count, size):
    params = [torch.nn.Parameter(torch.ones(size, 1024)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    before, optimizer = resident(), NAdam(params)
    optimizer.step()
    return (resident() - before) / (count * size * 1024)

stepped(1, 8)
print(stepped(20, 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_making_moments_leaves_no_holes_in_memory():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 9  # 8 bytes of moments; with a hole of each tensor's size beside it, 16
