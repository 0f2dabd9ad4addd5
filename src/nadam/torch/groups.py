"""Parameter groups from a model: no decay where it does harm, and learning rates that fall towards the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from torch import nn

Layers = Callable[[str], int] | Sequence[str | tuple[str, ...]]


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    no_decay: Iterable[str] = (),
    lr: float | None = None,
    layer_decay: float | None = None,
    layers: Layers | None = None,
) -> list[dict[str, Any]]:
    """Put the parameters of a model that are trained into groups, for `NAdam` or any optimizer of PyTorch.

        weight_decay = 0                                 of one dimension or less, biases, and those in ``no_decay``
        lr           = lr * layer_decay**(last - layer)  with ``layer_decay``

    ``layer`` is 0 for what comes before the first block, as embeddings do, i + 1 in block i, and ``last`` for what
    follows, as the head does: the layers of BEiT and timm.

    Args:
        model: Its parameters, in its order, each once: one that is shared, under its first name. Those without
            ``requires_grad`` are left out.
        weight_decay: Of all others, >= 0.
        no_decay: Names of more parameters without decay, or patterns (``"*.pos_embed"``); of a shared one any name.
        lr: Learning rate of the last layer, >= 0; None for the optimizer's, in all groups.
        layer_decay: Ratio of the learning rates of a layer and of the next one, above 0 and at most 1.
        layers: What tells the layer: names of modules, from the input to the output, several of one layer as a
            tuple; or a function from a parameter's name to its layer, from 0. None for the blocks of the one
            `ModuleList` or `Sequential` of the model that has any: modules of one class that have modules themselves.

    Returns:
        Dictionaries with ``params``, ``param_names``, ``weight_decay``, ``name`` (``"decay"``, ``"layer_3_no_decay"``)
        and, if it was given, ``lr``; from the first layer to the last. None is empty.

    Raises:
        ValueError: A number is out of its range, ``layer_decay`` has no ``lr``, a name in ``no_decay`` is of no
            parameter, or the layers cannot be told.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = param_groups(model, 0.05, lr=1e-3, layer_decay=0.5, layers=[("0", "1"), "2"])
        >>> [(group["name"], group["weight_decay"], group["lr"]) for group in groups]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('layer_0_decay', 0.05, 0.0005), ('layer_0_no_decay', 0.0, 0.0005),
         ('layer_1_decay', 0.05, 0.001), ('layer_1_no_decay', 0.0, 0.001)]
        >>> from nadam.torch import NAdam
        >>> optimizer = NAdam(groups, decoupled_weight_decay=True)

    Reference:
        Bao, Dong, Piao, Wei (2022), BEiT: BERT Pre-Training of Image Transformers.
    """
    _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
    if lr is not None:
        _check("lr", lr, lr >= 0, ">= 0")
    if layer_decay is None and layers is not None:
        raise ValueError("layers: of no use without layer_decay")
    layer_of: Callable[[str], int] = lambda name: 0  # noqa: E731
    if layer_decay is not None:
        _check("layer_decay", layer_decay, 0 < layer_decay <= 1, "0 < layer_decay <= 1")
        if lr is None:
            raise ValueError(f"layer_decay={layer_decay!r}: needs lr, which it is a factor of")
        layer_of = _layers(model, layers)

    excluded = _matching(model, no_decay)
    named = list(model.named_parameters())
    number = {name: layer_of(name) for name, _ in named}
    last = max(number.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, param in named:
        if not param.requires_grad:
            continue
        layer = number[name]
        decays = param.ndim > 1 and name.rpartition(".")[2] != "bias" and id(param) not in excluded
        group = groups.setdefault((layer, not decays), {"params": [], "param_names": []})
        if "name" not in group:
            kind = "decay" if decays else "no_decay"
            group["name"] = kind if layer_decay is None else f"layer_{layer}_{kind}"
            group["weight_decay"] = weight_decay if decays else 0.0
            if lr is not None:
                group["lr"] = lr if layer_decay is None else lr * layer_decay ** (last - layer)
        group["params"].append(param)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds or value == inf:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _matching(model: nn.Module, patterns: Iterable[str]) -> set[int]:
    """Ids of the parameters that a pattern is a name of."""
    if isinstance(patterns, str):
        raise ValueError(f"no_decay={patterns!r}: expected a collection of names")
    everywhere = list(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        ids = {id(param) for name, param in everywhere if fnmatchcase(name, pattern)}
        if not ids:
            raise ValueError(f"no_decay: {pattern!r} is the name of no parameter")
        found |= ids
    return found


def _layers(model: nn.Module, layers: Layers | None) -> Callable[[str], int]:
    """A function from the name of a parameter to its layer."""
    if layers is None:
        return _layers_of_blocks(model)
    if callable(layers):
        given = layers

        def checked(name: str) -> int:
            layer = given(name)
            if not isinstance(layer, int) or layer < 0:
                raise ValueError(f"layers: {layer!r} for {name!r}, expected an int >= 0")
            return layer

        return checked
    modules = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in layers]

    def of_module(name: str) -> int:
        for layer, prefixes in enumerate(modules):
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
                return layer
        raise ValueError(f"layers: {name!r} is in none of the modules")

    return of_module


def _layers_of_blocks(model: nn.Module) -> Callable[[str], int]:
    """Layers of a model with one stack of blocks."""
    stacks = list(_stacks("", model))
    if len(stacks) != 1:
        found = "no stack of blocks" if not stacks else f"blocks in each of {', '.join(name for name, _ in stacks)}"
        raise ValueError(f"layer_decay: {found}; say with layers=[...] which module is in which layer")
    blocks = stacks[0][1]
    number: dict[str, int] = {}
    started = False
    for name, _ in model.named_parameters():
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        started = started or bool(inside)
        number[name] = inside[0] + 1 if inside else (len(blocks) + 1 if started else 0)
    return number.__getitem__


def _stacks(name: str, module: nn.Module) -> Iterable[tuple[str, list[str]]]:
    """Each outermost stack of blocks: its name and theirs."""
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        blocks = {child: block for child, block in module.named_children() if next(block.children(), None) is not None}
        if len(blocks) > 1 and len({type(block) for block in blocks.values()}) == 1:
            yield name or "the model", [prefix + child for child in blocks]
            return
    for child, block in module.named_children():
        yield from _stacks(prefix + child, block)
