"""Steps on PyTorch's own threads: which they are, the same bits as on any, interrupts, forks, the choice under load."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nadam.kernels.cpu import threads
from nadam.torch import NAdam

SETTINGS = [{}, {"global_clipnorm": 1.0, "use_ema": True, "skip_nonfinite": True}]
HAS_REGIONS = sys.platform == "linux"
needs_regions = pytest.mark.skipif(not HAS_REGIONS, reason="no OpenMP of GNU's interface")


def params(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(257, 1000, generator=generator)) for _ in range(count)]


def train(settings, steps=5):
    """Parameters and state after some steps."""
    trained = params()
    optimizer = NAdam(trained, lr=0.01, **settings)
    for step in range(steps):
        for i, param in enumerate(trained):
            param.grad = torch.full_like(param, 0.1 * step - i)
        optimizer.step()
    kept = ("exp_avg", "exp_avg_sq")
    tensors = [t for p in trained for t in (p.detach(), *map(optimizer.state[p].get, kept))]
    return [tensor.clone() for tensor in tensors]


@pytest.fixture
def regions(monkeypatch):
    """How many threads each parallel region had; PyTorch's threads are always chosen."""
    seen, region = [], threads.parallel()

    def counted(entry, data, count, flags):
        seen.append(count)
        region(entry, data, count, flags)

    monkeypatch.setattr(threads, "parallel", lambda: counted)
    monkeypatch.setattr(threads, "TRIALS", -1)
    monkeypatch.setattr(threads, "AGAIN", 1 << 30)
    return seen


@needs_regions
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bits_are_those_of_any_threads(settings, regions, monkeypatch):
    found = {}
    before = torch.get_num_threads()
    try:
        for count in (2, 5, 16):
            torch.set_num_threads(count)
            regions.clear()
            found[count] = train(settings)
            assert regions
            assert set(regions) == {count}
        monkeypatch.setattr(threads, "parallel", lambda: None)
        found["pool"] = train(settings)
        torch.set_num_threads(1)
        found["alone"] = train(settings)
    finally:
        torch.set_num_threads(before)
    for other in found.values():
        assert all(map(torch.equal, other, found["alone"]))


@needs_regions
def test_they_are_those_that_pytorch_is_linked_with():
    def runtimes():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}

    before = runtimes()
    assert threads.parallel() is not None
    train({})
    assert runtimes() == before


@needs_regions
def test_an_interrupt_comes_between_two_regions(regions, monkeypatch):
    monkeypatch.setattr(threads, "REGION_SLICE", 1)
    trained = params()
    optimizer = NAdam(trained, lr=0.01)
    for param in trained:
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    inner = threads.parallel()

    def interrupting(*args):
        inner(*args)
        if len(regions) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threads, "parallel", lambda: interrupting)
    regions.clear()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert len(regions) == 3
    steps = [float(optimizer.state[param]["step"]) for param in trained]
    assert steps[0] == 4.0
    assert steps[-1] == 3.0
    monkeypatch.setattr(threads, "parallel", lambda: None)
    optimizer.step()
    assert float(optimizer.state[trained[0]]["step"]) == 5.0


def test_a_child_of_a_fork_does_without_them():
    program = """
import os, torch
from nadam.kernels.cpu import threads
from nadam.torch import NAdam
param = torch.nn.Parameter(torch.ones(1 << 20))
optimizer = NAdam([param])
param.grad = torch.ones_like(param)
for _ in range(4):
    optimizer.step()
child = os.fork()
if not child:
    assert threads.parallel() is None
    for _ in range(4):
        optimizer.step()
    os._exit(0 if float(optimizer.state[param]["step"]) == 8 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slow", [0, 1])
def test_the_faster_threads_are_chosen_and_the_others_tried_again(slow, monkeypatch):
    now, used = [0.0], []

    def took(way):
        def share(*args):
            used.append(way)
            now[0] += 10.0 if way == slow else 1.0

        return share

    monkeypatch.setattr(threads, "perf_counter", lambda: now[0])
    monkeypatch.setattr(threads, "parallel", lambda: object())
    monkeypatch.setattr(threads, "share_region", took(0))
    monkeypatch.setattr(threads, "share_out", took(1))
    sharing = threads.Sharing(1 << 21, 64, lambda: 2)
    for _ in range(3 * threads.AGAIN):
        sharing.run(None, 0, None)
    later = used[threads.TRIALS + 1 :]
    assert 1 <= later.count(slow) <= 3
    slow = 1 - slow  # another program has ended, or begun
    used.clear()
    for _ in range(3 * threads.AGAIN):
        sharing.run(None, 0, None)
    assert used[-threads.AGAIN + 2 :].count(slow) <= 1


@needs_regions
def test_each_pass_tries_both_for_itself(monkeypatch):
    used = {}

    def watched(way, share, place):
        def run(*args):
            used.setdefault(args[place], []).append(way)
            share(*args)

        return run

    monkeypatch.setattr(threads, "share_region", watched("PyTorch's", threads.share_region, 1))
    monkeypatch.setattr(threads, "share_out", watched("ours", threads.share_out, 0))
    train({"global_clipnorm": 1.0}, steps=threads.TRIALS)
    assert len(used) == 2  # the gradients are measured, then the parameters updated
    assert all(set(ways) == {"PyTorch's", "ours"} for ways in used.values())
