"""Read checkpoints whole and tell which are damaged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nadam import checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `nadam verify`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="checkpoints, or folders of them")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """A line for each; 1 if one is not whole or cannot be read."""
    told: dict[str, str] = {}
    for given in args.files:
        files = sorted(Path(given).glob("*.nadam")) if Path(given).is_dir() else [Path(given)]
        told |= {str(file): _problem(file) for file in files} or {given: "no checkpoint in this folder"}
    if args.json:
        print(
            json.dumps({file: {"whole": not problem, "problem": problem} for file, problem in told.items()}, indent=1)
        )
    else:
        for file, problem in told.items():
            print(f"{file}: {problem or 'whole'}")
    return 1 if any(told.values()) else 0


def _problem(file: Path) -> str:
    """What is wrong with a file; nothing if all of it is as it was written."""
    try:
        found = checkpoint.inspect(file)
    except OSError as error:
        return error.strerror or str(error)
    return found.problem or "; ".join(f"{tensor.name}: {tensor.problem}" for tensor in found.tensors if tensor.problem)
