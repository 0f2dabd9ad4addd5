"""Print what a checkpoint holds: step, settings, norms of each state, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from nadam import checkpoint
from nadam.checkpoint import Inspection
from nadam.checkpoint.rotation import numbered
from nadam.cli._tables import show
from nadam.core.portable import SLOTS, PortableState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `nadam inspect`."""
    parser.add_argument("file", metavar="FILE", help="that nadam.checkpoint.save wrote, or a folder that keep= fills")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print it; 1 where the file is not whole."""
    given = Path(args.file)
    files = numbered(given) if given.is_dir() else [given]
    if not files:
        raise ValueError(f"{given}: no checkpoint file in it, as 000001.nadam is one")
    found = checkpoint.inspect(files[0])
    told = summary(found)
    if args.json:
        print(json.dumps(told, indent=1, default=str))
    else:
        for name, value in told.items():
            if name != "tensors":
                print(f"{name:18} {value}")
        rows = told["tensors"]
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            show([{column: row.get(column, "") for column in columns} for row in rows])
    return 0 if found.whole else 1


def summary(found: Inspection) -> dict[str, Any]:
    """What a file holds, as values of JSON; of one that is not whole, what is wrong with it."""
    told: dict[str, Any] = {"file": found.path, "bytes": found.size, "whole": found.whole, "metadata": found.metadata}
    if not found.whole:
        problems = [f"{tensor.name}: {tensor.problem}" for tensor in found.tensors if tensor.problem]
        return {**told, "problem": found.problem or "; ".join(problems), "tensors": []}
    tree = checkpoint.load(found.path)
    if "portable_state" not in tree:
        tensors = [{"name": t.name, "dtype": t.dtype, "shape": str(list(t.shape))} for t in found.tensors]
        return {**told, "tensors": tensors}
    state = PortableState.from_tree(tree)
    told |= {name: getattr(state, name) for name in ("optimizer", "step", "momentum_product", "position")}
    told |= {"skipped_steps": state.skipped_steps, "loss_scale": state.loss_scale}
    for group in state.groups:
        settings = {name: value for name, value in group.items() if name != "params" and value not in (None, False)}
        told[f"{len(group['params'])} parameters"] = settings
    return {**told, "tensors": [_row(name, state) for name in state.names]}


def _row(name: str, state: PortableState) -> dict[str, Any]:
    """A parameter: its shape, its updates, and the norm of each of its states."""
    arrays = state.params[name].wide().arrays() if name in state.params else {}
    if state.values is not None:
        arrays = {"param": state.values[name], **arrays}
    if not arrays:
        return {"name": name, "shape": "never updated"}
    first = next(iter(arrays.values()))
    row = {
        "name": name,
        "shape": str(list(first.shape)),
        "step": state.params[name].step if name in state.params else 0,
    }
    return row | {f"|{slot}|": _norm(arrays[slot]) for slot in ("param", *SLOTS) if slot in arrays}


def _norm(array: Any) -> float:
    return float(f"{np.linalg.norm(array.ravel().astype(np.result_type(array, np.float64))):.4g}")
