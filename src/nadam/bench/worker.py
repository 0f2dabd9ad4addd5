"""The measurements of one host, in a process of its own: `python -m nadam.bench.worker '{"host": "torch", ...}'`.

It imports what it measures, writes a line of JSON with the number of units and waits for a line; then it writes a line
before each unit and for each row. What others print goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from nadam.bench.options import Options

# Of each part, the host's modules; a host that a part has not does without.
_KERAS = ("keras-torch", "keras-jax", "keras-tensorflow")
MODULES: dict[str, dict[str, str]] = {
    "loops": {
        "numpy": "loops_numpy",
        "torch": "loops_torch",
        "jax": "loops_jax",
        **dict.fromkeys(_KERAS, "loops_keras"),
    },
    "gpu": {"torch": "gpu"},
    "growth": {"numpy": "growth", "torch": "growth"},
    "kept": dict.fromkeys(("numpy", "torch", "jax", *_KERAS), "kept"),
    "steps": {
        "numpy": "steps_numpy",
        "torch": "steps_torch",
        "jax": "steps_jax",
        **dict.fromkeys(_KERAS, "steps_keras"),
    },
    "watching": {"numpy": "watching", "torch": "watching"},
    "targets": {"numpy": "targets"},
}


class Part(NamedTuple):
    """A kind of measurements of a host."""

    name: str
    units: list[tuple[Any, ...]]
    measure: Callable[..., Iterator[Any]]


def parts(options: Options) -> Iterator[Part]:
    """The parts that a host has, imported."""
    for name in options.parts:
        found = MODULES[name].get(options.host)
        if found is None:
            continue
        module = import_module(f"nadam.bench.{found}")
        if name == "loops":
            loops = import_module("nadam.bench.loops")
            yield Part(name, loops.units(module, options), partial(loops.measure, module, options))
        else:
            yield Part(name, module.units(options), partial(module.measure, options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the argument says."""
    (given,) = sys.argv[1:] if arguments is None else arguments
    options = Options(**json.loads(given))
    if options.host in _KERAS:
        backend = options.host.partition("-")[2]
        os.environ["KERAS_BACKEND"] = backend
        # Keras imports whatever else is installed as well, for seconds: here only its backend is.
        sys.modules.update(dict.fromkeys({"torch", "jax", "tensorflow", "sklearn"} - {backend}))  # type: ignore[arg-type]
    out = sys.stdout

    def send(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    with redirect_stdout(sys.stderr):
        found = list(parts(options))
        send(units=sum(len(part.units) for part in found))
        sys.stdin.readline()
        for part in found:
            for unit in part.units:
                send(unit=", ".join(map(str, unit)), part=part.name)
                for row in part.measure(*unit):
                    send(row=asdict(row), part=part.name)
                gc.collect()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # frameworks take seconds to end
