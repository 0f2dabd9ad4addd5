"""Convert an optimizer's state between nadam's file, PyTorch's, Keras's and optax's."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nadam import checkpoint
from nadam.checkpoint.atomic import replacing
from nadam.core.portable import PortableState

KINDS = ("nadam", "torch", "keras", "optax")
# Where a training loop's checkpoint has the optimizer's state.
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `nadam convert`."""
    what = "nadam's file, a .pt file with an optimizer's state_dict, or a .keras file"
    parser.add_argument("source", metavar="IN", help=what)
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to",
        choices=KINDS,
        required=True,
        help="nadam: what nadam.checkpoint.load takes; torch: a state_dict of NAdam, for torch.load; keras: --like "
        "with this state, a .keras file; optax: count, mu/NAME and nu/NAME of a ScaleByAdamState, for numpy.load",
    )
    parser.add_argument("--like", metavar="MODEL", help="a compiled .keras file, whose optimizer is to have the state")
    parser.add_argument(
        "--optimizer", default="NAdam", help="of a .pt file: NAdam, Adam, AdamW or NAdamW (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Do it, and say what is in the new file."""
    if (args.to == "keras") != (args.like is not None):
        args.parser.error("--like: expected with --to keras, and only there")
    state = read(Path(args.source), args.optimizer)
    {"nadam": _to_nadam, "torch": _to_torch, "keras": _to_keras, "optax": _to_optax}[args.to](state, args)
    print(f"{args.target}: {len(state.names)} parameters, step {state.step}, of {state.optimizer}")
    return 0


def read(path: Path, kind: str = "NAdam") -> PortableState:
    """The state in a file of any of these kinds.

    Raises:
        ValueError: It is none of them, or holds no state of Nadam or Adam.
    """
    if path.suffix == ".keras":
        import keras

        from nadam.keras import portable

        model = _compiled(keras, path)
        return portable.export(model.optimizer, model)
    if zipfile.is_zipfile(path) or path.suffix in (".pt", ".pth"):
        return _read_torch(path, kind)
    return PortableState.from_tree(checkpoint.load(path))


def _read_torch(path: Path, kind: str) -> PortableState:
    import torch

    from nadam.torch import portable

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file of another kind, or one that would run code
        raise ValueError(f"{path}: torch.load cannot read it: {str(error).splitlines()[0]}") from error
    for key in OPTIMIZER_KEYS:
        if isinstance(found, Mapping) and "param_groups" not in found and key in found:
            found = found[key]
    if not isinstance(found, Mapping) or not {"state", "param_groups"} <= set(found):
        raise ValueError(f"{path}: expected an optimizer's state_dict, or one under {' or '.join(OPTIMIZER_KEYS)}")
    if kind not in portable.KNOWN:
        raise ValueError(f"--optimizer={kind}: expected one of {', '.join(portable.KNOWN)}")
    state: PortableState = portable.from_state_dict(found, kind)
    return state


def _to_nadam(state: PortableState, args: argparse.Namespace) -> None:
    checkpoint.save(args.target, state.to_tree())


def _to_torch(state: PortableState, args: argparse.Namespace) -> None:
    import torch

    from nadam.torch import portable

    with replacing(args.target) as file:
        torch.save(portable.to_state_dict(state), file)


def _to_keras(state: PortableState, args: argparse.Namespace) -> None:
    import keras

    from nadam.keras import portable

    model = _compiled(keras, Path(args.like))
    portable.restore(model.optimizer, state, model if state.values is not None else None)
    model.save(args.target)


def _compiled(keras: Any, path: Path) -> Any:
    import nadam.keras  # noqa: F401  # which Keras looks for by name

    try:
        model = keras.models.load_model(path)
    except Exception as error:
        raise ValueError(f"{path}: Keras cannot read it: {str(error).splitlines()[0]}") from error
    if getattr(model, "optimizer", None) is None:
        raise ValueError(f"{path}: expected a model that is compiled, with its optimizer")
    return model


def _to_optax(state: PortableState, args: argparse.Namespace) -> None:
    arrays: dict[str, Any] = {"count": np.int32(min(state.step, 2**31 - 1))}
    for name in state.names:
        if name not in state.params:
            raise ValueError(f"{name}: it was never updated, so there are no moments of it")
        wide = state.params[name].wide()
        arrays |= {f"mu/{name}": wide.exp_avg, f"nu/{name}": wide.exp_avg_sq}
    with replacing(args.target) as file:
        np.savez(file, **arrays)
