"""param_groups: which parameters decay, at which learning rate, beside timm's; and what it refuses."""

import importlib.util
import re

import pytest
import torch
from torch import nn
from training import timm_optim

from nadam.torch import NAdam, NAdamW, param_groups


class Transformer(nn.Module):
    """Two embeddings, blocks, a norm, and a head; of which the head can be the first embedding."""

    def __init__(self, depth=3, tied=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), depth, enable_nested_tensor=False
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, codes):
        return self.head(self.norm(self.encoder(self.tokens(codes) + self.places)))


def names(groups):
    return {group["name"]: group["param_names"] for group in groups}


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group["param_names"]}


def test_what_has_one_dimension_does_not_decay():
    model = Transformer()
    groups = param_groups(model, 0.1, no_decay=["places"])
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    decay = by_name(groups, "weight_decay")
    params = dict(model.named_parameters())
    assert decay.keys() == params.keys()
    assert all(decay[n] == (0.1 if p.ndim > 1 and n != "places" else 0.0) for n, p in params.items())
    for group in groups:
        assert all(params[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        assert "lr" not in group


def test_a_bias_of_two_dimensions_does_not_decay():
    model = nn.Module()
    model.bias, model.gain = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    assert names(param_groups(model)) == {"decay": ["gain"], "no_decay": ["bias"]}


def test_layers_are_those_of_beit():
    model = Transformer(depth=3)
    groups = param_groups(model, 0.1, lr=0.01, layer_decay=0.5)
    rates = by_name(groups, "lr")
    expected = {"tokens": 4, "places": 4, "encoder.layers.0": 3, "encoder.layers.1": 2, "encoder.layers.2": 1}
    for name, rate in rates.items():
        power = next((n for prefix, n in expected.items() if name.startswith(prefix)), 0)
        assert rate == 0.01 * 0.5**power, name
    assert names(groups)["layer_4_decay"] == ["head.weight"]
    assert names(groups)["layer_4_no_decay"] == ["norm.weight", "norm.bias", "head.bias"]
    numbers = [int(g["name"].split("_")[1]) for g in groups]
    assert numbers == sorted(numbers)


def test_a_norm_at_the_end_of_the_stack_is_of_the_last_layer():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)), nn.LayerNorm(2))
    found = names(param_groups(model, lr=1.0, layer_decay=0.5))
    assert found["layer_1_decay"] == ["0.0.weight"]
    assert found["layer_3_no_decay"] == ["2.weight", "2.bias"]


def test_layers_by_module_and_by_function():
    model = Transformer(depth=2)
    given = [("tokens", "places"), "encoder.layers.0", "encoder.layers.1", ("norm", "head")]
    by_module = param_groups(model, 0.1, lr=0.01, layer_decay=0.5, layers=given)
    assert names(by_module) == names(param_groups(model, 0.1, lr=0.01, layer_decay=0.5))

    def layer(name):
        found = re.match(r"encoder\.layers\.(\d+)", name)
        return int(found[1]) + 1 if found else 0 if name.startswith(("tokens", "places")) else 3

    by_function = param_groups(model, 0.1, lr=0.01, layer_decay=0.5, layers=layer)
    assert names(by_function) == names(by_module)


def test_a_shared_weight_is_in_one_group_and_excluded_by_any_name():
    model = Transformer(tied=True)
    groups = param_groups(model, 0.1, lr=0.01, layer_decay=0.5)
    params = [p for g in groups for p in g["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))
    assert "tokens.weight" in names(groups)["layer_0_decay"]
    groups = param_groups(model, 0.1, no_decay=["head.w*"])
    assert "tokens.weight" in names(groups)["no_decay"]


def test_frozen_parameters_are_left_out_and_move_no_layer():
    model = Transformer()
    model.encoder.layers[0].requires_grad_(False)
    model.head.requires_grad_(False)
    groups = param_groups(model, 0.1, lr=0.01, layer_decay=0.5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert by_name(groups, "lr").keys() == trained
    assert by_name(groups, "lr")["tokens.weight"] == 0.01 * 0.5**4
    model.requires_grad_(False)
    assert param_groups(model) == []


@pytest.mark.parametrize("cls", [NAdam, NAdamW, torch.optim.NAdam, torch.optim.AdamW])
def test_optimizers_take_them(cls):
    torch.manual_seed(0)
    model = Transformer()
    optimizer = cls(param_groups(model, 0.1, lr=0.01, layer_decay=0.75), lr=1.0)
    codes = torch.randint(11, (4, 5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(codes).flatten(0, 1), codes.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
    saved = optimizer.state_dict()
    assert [g["name"] for g in saved["param_groups"]] == [g["name"] for g in optimizer.param_groups]
    other = cls(param_groups(model, 0.1, lr=0.02, layer_decay=0.5), lr=1.0)
    other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def timm_groups():
    """timm's own functions; its models, of which they ask one, need torchvision."""
    timm_optim()
    return importlib.import_module("timm.optim._param_groups")


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_beside_timm_s_weight_decay(weight_decay):
    model = Transformer(tied=True)
    model.norm.requires_grad_(False)
    theirs = timm_groups().param_groups_weight_decay(model, weight_decay, no_weight_decay_list=("places",))
    ours = param_groups(model, weight_decay, no_decay=["places"])
    decay = {id(p): g["weight_decay"] for g in theirs for p in g["params"]}
    assert decay == {id(p): g["weight_decay"] for g in ours for p in g["params"]}


def test_beside_timm_s_layer_decay(monkeypatch):
    model, module = Transformer(), timm_groups()
    model.tokens.requires_grad_(False)
    # timm asks the model which parameter is in which layer. Where its models can be imported, its own matching; else
    # the layers that it would find.
    numbers = {"tokens": 0, "places": 0, "norm": 4, "head": 4}

    def layer(name):
        found = re.match(r"encoder\.layers\.(\d+)", name)
        return int(found[1]) + 1 if found else numbers[name.split(".")[0]]

    model.group_matcher = lambda coarse: layer
    if module.group_parameters is None:
        monkeypatch.setattr(
            module,
            "group_parameters",
            lambda model, matcher, reverse: {n: matcher(n) for n, _ in model.named_parameters()},
        )
    theirs = module.param_groups_layer_decay(model, 0.05, no_weight_decay_list=("places",), layer_decay=0.7)
    ours = param_groups(model, 0.05, no_decay=["places"], lr=0.01, layer_decay=0.7)
    expected = {id(p): (g["weight_decay"], 0.01 * g["lr_scale"]) for g in theirs for p in g["params"]}
    assert expected == {id(p): (g["weight_decay"], g["lr"]) for g in ours for p in g["params"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan: expected >= 0"),
        ({"lr": -1.0}, "lr=-1.0: expected >= 0"),
        ({"lr": 0.1, "layer_decay": 0.0}, "layer_decay=0.0: expected 0 < layer_decay <= 1"),
        ({"lr": 0.1, "layer_decay": 1.5}, "layer_decay=1.5: expected 0 < layer_decay <= 1"),
        ({"layer_decay": 0.5}, "layer_decay=0.5: needs lr"),
        ({"layers": ["head"]}, "layers: of no use without layer_decay"),
        ({"no_decay": ["pos_embed"]}, "no_decay: 'pos_embed' is the name of no parameter"),
        ({"no_decay": "places"}, "no_decay='places': expected a collection"),
        ({"lr": 0.1, "layer_decay": 0.5, "layers": ["encoder", "head"]}, "layers: 'places' is in none of the modules"),
        ({"lr": 0.1, "layer_decay": 0.5, "layers": lambda name: -1}, "layers: -1 for 'places', expected an int >= 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(Transformer(), **arguments)


def test_blocks_that_cannot_be_told_are_asked_for():
    with pytest.raises(ValueError, match=re.escape("no stack of blocks; say with layers=[...]")):
        param_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), lr=0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match=re.escape("blocks in each of encoder.layers, decoder.layers; say with")):
        param_groups(nn.Transformer(8, 2, 2, 2, 16, batch_first=True), lr=0.1, layer_decay=0.5)
