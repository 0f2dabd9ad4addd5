"""State on the CPU of parameters elsewhere. The CPU stands in for the device: its parameters are copied as a GPU's."""

import copy

import pytest
import torch
from training import DEVICE, Gradients, equal, parameters, train

from nadam.torch import NAdam, NAdamW, buckets, offload

if DEVICE != "cpu":
    pytest.skip("the CPU stands in for the device", allow_module_level=True)

SHAPES = [(70, 90), (5,), (), (0, 2), (4096,)]
SETTINGS = [
    {},
    {"global_clipnorm": 0.5, "weight_decay": 0.1, "use_ema": True, "track_grad_norm": True},
    {"clipnorm": 0.5, "gradient_accumulation_steps": 3},
    {"clipvalue": 0.5, "skip_nonfinite": True, "maximize": True},
    {"state_bits": 8},
    {"exp_avg_dtype": torch.bfloat16},
]


@pytest.fixture(autouse=True)
def everything_is_away(monkeypatch):
    monkeypatch.setattr(offload, "is_away", lambda param: True)


def pair(dtype=torch.float32, shapes=SHAPES, cls=NAdam, **settings):
    """The same parameters with an optimizer whose state is theirs, and with one whose state is on the CPU."""
    both = [parameters(dtype, shapes=shapes) for _ in range(2)]
    return [
        (cls(params, state_device=where, **settings), params) for where, params in zip((None, "cpu"), both, strict=True)
    ]


def check_same(one, other):
    assert equal(one[1], other[1])
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert one[0].state[mine].keys() == other[0].state[theirs].keys()
        for name, value in one[0].state[mine].items():
            assert torch.equal(value, other[0].state[theirs][name]), name
    assert one[0].last_step == other[0].last_step


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_are_those_of_state_beside_the_parameters(dtype, settings):
    one, other = pair(dtype, lr=0.01, **settings)
    for optimizer, params in (one, other):
        train(optimizer, params, 7)
    check_same(one, other)
    host = other[0]._offload._copies[id(other[1][0])].host
    assert host.data_ptr() != other[1][0].data_ptr()  # it has gone by the copy


@pytest.mark.parametrize("remainder", [8, 16])
def test_remainders_are_with_the_state(remainder):
    one, other = pair(torch.bfloat16, remainder=remainder, use_ema=True)
    for optimizer, params in (one, other):
        train(optimizer, params, 3)
        with optimizer.swap_ema():
            pass
        train(optimizer, params, 2)
    check_same(one, other)


def test_what_happens_to_parameters_and_gradients_between_steps():
    one, other = pair(use_ema=True)
    for optimizer, params in (one, other):
        gradients = Gradients()
        train(optimizer, params, 2, gradients)
        params[0].data.mul_(2.0)  # what PyTorch does not count
        params[1].detach().add_(1.0)
        train(optimizer, params, 1, gradients)
        gradients.give(params)
        params[1].grad = None
        optimizer.step()
        params[0].data = params[0].detach().clone()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})
        params.append(optimizer.param_groups[1]["params"][0])
        train(optimizer, params, 2, gradients)
        optimizer.state[params[0]]["exp_avg"] = torch.ones(SHAPES[0])
        del optimizer.state[params[4]]
        train(optimizer, params, 2, gradients)
    check_same(one, other)


@pytest.mark.parametrize("change", [
    lambda value: value.to(torch.bfloat16), lambda value: value.double(), lambda value: value.t().contiguous().t(),
], ids=["bfloat16", "float64", "order"])  # fmt: skip
def test_a_parameter_that_becomes_another_tensor_has_another_copy(change):
    """As by ``model.to(...)`` after steps, which exchanges what is in a parameter and keeps the object."""
    one, other = pair(shapes=[(70, 90), (5, 6)])
    for optimizer, params in (one, other):
        train(optimizer, params, 2)
        params[0].data = change(params[0].detach())
        params[0].grad = None
        train(optimizer, params, 3)
    check_same(one, other)


@pytest.mark.parametrize("cls", [NAdam, NAdamW])
def test_a_checkpoint_goes_on_in_either(cls):
    one, other = pair(cls=cls, lr=0.01)
    gradients, twin = Gradients(), Gradients()
    train(*one, 3, gradients)
    train(*other, 3, twin)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in (one[0], other[0])]
    for optimizer, state in zip((one[0], other[0]), reversed(saved), strict=True):
        optimizer.load_state_dict(state)
    train(*one, 3, gradients)
    train(*other, 3, twin)
    check_same(one, other)


def test_schedulers_and_closures():
    one, other = pair()
    for optimizer, params in (one, other):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for i in range(5):

            def closure(params=params, optimizer=optimizer, i=i):
                optimizer.zero_grad()
                loss = sum((param * (i + 1)).sin().sum() for param in params)
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()
    check_same(one, other)


def test_state_that_was_loaded_is_placed_on_the_cpu(monkeypatch):
    """A checkpoint is never on the device as a whole, which may have no room for it."""
    seen = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: seen.append(k.get("device")) or real(*a, **k))
    (one, params), (other, _) = pair()
    train(one, params, 1)
    seen.clear()
    other.load_state_dict(one.state_dict())
    assert "cpu" in seen


@pytest.mark.parametrize("value", ["cuda", 0, torch.device("cpu"), True])
def test_other_devices_are_refused(value):
    with pytest.raises(ValueError, match=r"state_device=.*: expected 'cpu' or None"):
        NAdam([torch.nn.Parameter(torch.ones(2))], state_device=value)


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="differentiable=True"):
        NAdam([torch.nn.Parameter(torch.ones(2))], state_device="cpu", differentiable=True)
    options = buckets.StateOptions(False, None, 0, None, "cpu")
    assert options.needs_kernel == "state_device='cpu'"
