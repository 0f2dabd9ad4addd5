"""What of 8 bits PyTorch's optimizer keeps in files, with bfloat16 parameters and their remainders."""

import copy
import io
import sys
import warnings

import numpy as np
import pytest
import torch

import nadam
from nadam import checkpoint
from nadam.core.compressed import SCALES
from nadam.core.portable import PortableState
from nadam.torch import NAdam

CODES = {"state_bits": 8, "seed": 5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.nadam"


def linear(dtype=torch.bfloat16, size=80):
    torch.manual_seed(0)
    return torch.nn.Linear(size, size).to(dtype)


def stepped(optimizer, model, first=0, count=5):
    generator = torch.Generator().manual_seed(first)
    for _ in range(count):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return optimizer


def trained(dtype=torch.bfloat16, size=80, **settings):
    model = linear(dtype, size)
    return stepped(NAdam(model.parameters(), lr=0.01, **settings), model), model


def wide_of(optimizer, model):
    """The moments' values: those of one run may have two codes, one the double of the other at half the scale."""
    wide = NAdam(model.parameters())
    wide.load_state_dict(optimizer.state_dict())
    return [wide.state[model.weight][name] for name in SCALES]


def same(one, other):
    """Whether the models and their optimizers' states are equal, bit for bit."""
    for a, b in zip(one[1].parameters(), other[1].parameters(), strict=True):
        mine, theirs = one[0].state[a], other[0].state[b]
        if not torch.equal(a, b) or set(mine) != set(theirs):
            return False
        if not all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return True


def test_a_file_of_8_bits_everywhere_takes_5_bytes_a_parameter(path, monkeypatch):
    optimizer, model = trained(size=512, remainder=8, **CODES)
    checkpoint.save(path, optimizer, model)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    count = sum(param.numel() for param in model.parameters())
    assert 5.0 * count < path.stat().st_size <= 5.2 * count + header
    kinds = {tensor.name: tensor.dtype for tensor in checkpoint.inspect(path).tensors}
    assert (kinds["values/weight"], kinds["params/weight/remainder"]) == ("BF16", "I8")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # as where it is not installed
    other = linear(size=512)
    made = checkpoint.load(path, NAdam(other.parameters(), lr=0.01, remainder=8, **CODES), other)
    assert same((optimizer, model), made)


def test_values_that_are_not_those_of_the_remainder_are_saved_whole(path):
    optimizer, model = trained(remainder=8)
    checkpoint.save(path, optimizer, model)
    state = PortableState.from_tree(checkpoint.load(path))
    state.values["weight"] = state.values["weight"] + np.float32(1e-3)
    checkpoint.save(path, state.to_tree())
    again = PortableState.from_tree(checkpoint.load(path))
    assert np.array_equal(again.values["weight"], state.values["weight"])
    assert checkpoint.load(path)["values"]["weight"].dtype == np.float32


def test_codes_go_to_numpy_and_back_as_they_are(path):
    optimizer, model = trained(torch.float32, **CODES)
    checkpoint.save(path, optimizer, model)
    weights = {name: np.zeros(param.shape, np.float32) for name, param in model.named_parameters()}
    settings = {"epsilon": 1e-8, "momentum_decay": 0.004}
    there, _ = checkpoint.load(path, nadam.Nadam(0.01, **settings, **CODES), weights)
    checkpoint.save(path, there, weights)
    other = linear(torch.float32)
    back = checkpoint.load(path, NAdam(other.parameters(), **CODES), other)
    assert same((optimizer, model), back)
    grads = {name: np.ones(array.shape, np.float32) for name, array in weights.items()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    there.apply(grads)
    optimizer.step()
    assert all(np.array_equal(weights[name], param.detach().numpy()) for name, param in model.named_parameters())


def channels_last(settings):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(16, 40, 3).to(memory_format=torch.channels_last)
    return NAdam(model.parameters(), lr=0.01, **settings), model


@pytest.mark.parametrize("way", ["file", "state_dict", "torch.save", "file of a state_dict"])
def test_codes_of_another_order_of_memory_go_on_bit_for_bit(path, way):
    optimizer, model = channels_last(CODES)
    stepped(optimizer, model)
    other, twin = channels_last(CODES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "file":
            checkpoint.save(path, optimizer, model)
            assert checkpoint.load(path)["params"]["weight"]["exp_avg"].dtype == np.float32
            checkpoint.load(path, other, twin)
        else:
            state = copy.deepcopy(optimizer.state_dict())
            if way == "torch.save":
                buffer = io.BytesIO()
                torch.save(state, buffer)
                buffer.seek(0)
                state = torch.load(buffer)
            elif way != "state_dict":
                checkpoint.save(path, {"optimizer": state})
                state = checkpoint.load(path)["optimizer"]
            twin.load_state_dict(model.state_dict())
            other.load_state_dict(state)
    assert all(map(torch.equal, wide_of(optimizer, model), wide_of(other, twin)))
    assert other.state[twin.weight]["exp_avg"].dtype == torch.int8
    stepped(optimizer, model, 1)
    stepped(other, twin, 1)
    assert same((optimizer, model), (other, twin))


def test_codes_loaded_into_another_order_of_memory_keep_their_values():
    plain = torch.nn.Conv2d(16, 40, 3)
    optimizer = stepped(NAdam(plain.parameters(), **CODES), plain)
    other, model = channels_last({})
    other.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, wide_of(other, model), wide_of(optimizer, plain)))


@pytest.mark.parametrize(("name", "value"), [("exp_avg_scale", 255), ("exp_avg_sq_scale", 240)])
def test_a_scale_that_is_not_finite_is_refused(name, value):
    optimizer, _ = trained(torch.float32, **CODES)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][name][3] = value
    with pytest.raises(ValueError, match=rf"state\[0\]\['{name}'\]: {value}, expected at most"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("cls", [torch.optim.NAdam, torch.optim.AdamW])
def test_stock_optimizers_get_wide_moments_and_give_them(path, cls):
    optimizer, model = trained(torch.float32, **CODES)
    checkpoint.save(path, optimizer, model)
    other = linear(torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "settings differ")
        stock, _ = checkpoint.load(path, cls(other.parameters()), other)
    entry = stock.state[other.weight]
    assert not set(SCALES.values()) & set(entry)
    assert all(map(torch.equal, [entry[name] for name in SCALES], wide_of(optimizer, model)))
    checkpoint.save(path, stock, other)
    with warnings.catch_warnings():  # these values are codes' already
        warnings.filterwarnings("ignore", "settings differ")
        back, _ = checkpoint.load(path, NAdam(other.parameters(), **CODES), other)
    assert all(map(torch.equal, wide_of(back, other), wide_of(optimizer, model)))


@pytest.mark.parametrize(
    ("there", "here", "warned"),
    [(16, 8, "8 bits"), (16, False, "none"), (8, False, "none"), (8, 16, None), (False, 8, None), (8, 8, None)],
)
def test_a_remainder_is_cut_with_a_warning(path, there, here, warned):
    optimizer, model = trained(remainder=there)
    checkpoint.save(path, optimizer, model)
    values = PortableState.from_tree(checkpoint.load(path)).values
    other = linear()
    made = NAdam(other.parameters(), lr=0.01, remainder=here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.load(path, made, other)
    found = [str(each.message) for each in caught]
    assert len(found) == (warned is not None), found
    assert warned is None or f"remainder: ['weight', 'bias']: {warned} kept here" in found[0]
    exact = torch.from_numpy(values["weight"])
    rest = made.state[other.weight].get("remainder")
    bits = other.weight.detach().view(torch.int16).int() << 16
    if rest is not None:
        bits = bits + (rest.int() << 16 - 8 * rest.itemsize)
    off = (bits - exact.view(torch.int32)).abs().max()
    assert off <= {8: 128, 16: 0}.get(here, 1 << 15)
    assert (off == 0) == (warned is None)
    if here:
        assert rest.dtype == {8: torch.int8, 16: torch.int16}[here]


def test_a_damaged_remainder_is_refused(path):
    optimizer, model = trained(remainder=8)
    checkpoint.save(path, optimizer, model)
    tree = checkpoint.load(path)
    tree["params"]["weight"]["remainder"] = tree["params"]["weight"]["remainder"].view(np.uint8)
    with pytest.raises(ValueError, match=r"weight.remainder: uint8, expected an array of int16 or int8"):
        PortableState.from_tree(tree)


def test_settings_of_state_are_recorded(path):
    optimizer, model = trained(remainder=8, **CODES)
    checkpoint.save(path, optimizer, model)
    assert {"state_bits": 8, "seed": 5, "remainder": 8}.items() <= checkpoint.load(path)["groups"][0].items()
