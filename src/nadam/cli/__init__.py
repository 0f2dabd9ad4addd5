"""The command `nadam`, also `python -m nadam`. A module in this folder is a subcommand of its name.

Such a module has a docstring, whose first line is its help, `add_arguments(parser)` and `run(args) -> exit status`:
0, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives its exit status."""
    parser = argparse.ArgumentParser(prog="nadam", description="Nadam for NumPy, PyTorch, Keras and JAX.")
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")):
        module = import_module(f"{__name__}.{name}")
        text = (module.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=text, description=text)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, parser=subparser)
    args = parser.parse_args(arguments)
    if args.run is not None:
        try:
            return int(args.run(args))
        except (ValueError, TypeError, OSError, ImportError) as error:
            print(f"nadam {args.parser.prog.split()[-1]}: {error}", file=sys.stderr)
            return 1
    info = import_module(f"{__name__}.info")
    return int(info.run(parser.parse_args(["info"]))) or int(info.glance())
