"""What only a GPU can show: graphs, no synchronization, streams, GradScaler; see test_triton.py."""

import copy

import pytest
import torch
from training import apart
from triton_host import SHAPES, UNITS, give, normal, numbers, values

from nadam.torch import NAdam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
OPTIONS = {
    "plain": {},
    "everything": {
        "global_clipnorm": 0.5,
        "use_ema": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "skip_nonfinite": True,
        "gradient_accumulation_steps": 2,
    },
}


def made(dtype=torch.float32):
    return [torch.nn.Parameter(values.to("cuda", dtype)) for values in normal(0, SHAPES)]


def prepared(**options):
    """An optimizer after its first steps, whose gradients keep their memory."""
    params = made()
    optimizer = NAdam(params, **{"lr": 0.02, **options})
    give(params, 1)
    for _ in range(2):
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_graphs_equal_steps(name):
    rate = torch.tensor(0.02, device="cuda")
    optimizer, params = prepared(capturable=True, **{**OPTIONS[name], "lr": rate})
    other, others = copy.deepcopy((optimizer, params))
    for param, twin in zip(params, others, strict=True):
        twin.grad = param.grad.clone()
    other.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (0.02, 0.05, 0.01):
        rate.fill_(value)
        other.param_groups[0]["lr"].fill_(value)
        graph.replay()
        other.step()
    assert apart(values(optimizer, params), values(other, others)) == 0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_synchronization(name, scaled):
    optimizer, params = prepared(**OPTIONS[name])
    if scaled:
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
    fresh = [torch.ones_like(param) for param in params]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
        for param, grad in zip(params, fresh, strict=True):
            param.grad = grad
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.last_step.step > 0


def test_on_a_stream_of_its_own():
    optimizer, params = prepared()
    other, others = prepared()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    other.step()
    assert apart(numbers(params), numbers(others)) == 0


def test_with_grad_scaler():
    params, scaler = made(torch.float32), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    optimizer = NAdam(params, lr=0.02, global_clipnorm=0.5)
    before = numbers(params)
    for bad in (False, True, False):
        give(params, 1, bad=bad)
        for param in params:
            param.grad.mul_(scaler.get_scale())
        scaler.scale(torch.zeros((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.last_step.step, optimizer.last_step.skipped_steps) == (2, 1)
    assert apart(numbers(params), before) > UNITS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_parameters_on_two_devices():
    params = made()
    for param in params[::2]:
        param.data = param.data.to("cuda:1")
    others = made()
    pair = [NAdam(each, lr=0.02, global_clipnorm=0.5) for each in (params, others)]
    for seed in range(1, 4):
        for optimizer, each in zip(pair, (params, others), strict=True):
            give(each, seed)
            optimizer.step()
    assert apart(numbers(params), numbers(others)) <= UNITS


def test_a_compiled_training_step():
    layer = torch.nn.Linear(8, 8, device="cuda")
    optimizer = NAdam(layer.parameters(), lr=0.02)

    @torch.compile
    def step(inputs):
        optimizer.zero_grad()
        loss = layer(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    losses = [float(step(torch.ones(4, 8, device="cuda"))) for _ in range(5)]
    assert losses[-1] < losses[0]
