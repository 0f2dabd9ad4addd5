"""`python -m nadam.conformance my_module:make`: says which Nadam it is; exit status 1 for none, 2 for wrong input."""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from nadam.conformance import identify


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m nadam.conformance", description="Which Nadam is it?")
    parser.add_argument("make", metavar="module:name", help="the function make(lr, beta1, beta2, eps) -> step")
    module, _, name = parser.parse_args(arguments).make.partition(":")

    def wrong(message: str) -> NoReturn:
        parser.exit(2, f"{parser.prog}: {message}\n")

    if not (module and name):
        wrong(f"{module or name}: expected module:name, such as my_module:make")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does while it is imported
        wrong(f"cannot import {module}: {type(error).__name__}: {error}")
    if not hasattr(found, name):
        wrong(f"module {module} has no {name}")
    try:
        result = identify(getattr(found, name))
    except (TypeError, ValueError, RuntimeError) as error:
        wrong(str(error))
    print(result)
    return 1 if result.departures else 0


if __name__ == "__main__":
    sys.exit(main())
