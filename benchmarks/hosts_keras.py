"""Time a whole step of nadam.keras.Nadam against keras.optimizers.Nadam, and `fit()` with each, on Keras's backends.

    python -m benchmarks.hosts_keras
    python -m benchmarks.hosts_keras --backend torch jax --case "161 tensors" --quick

Each backend runs in a process of its own, which prints a line of JSON for each row of the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

from benchmarks.cases import CASES, KINDS, Case, random_arrays
from benchmarks.floor import Floor
from benchmarks.measure import SAMPLE, Work, in_turns, ratio
from benchmarks.report import Table, duration, progress

STOCK, FLOOR = "keras", "floor"  # what ours is compared with
ADDING, WINDOW = "adding", 8  # calls that only accumulate, and how many calls there are to an update
SETTINGS: dict[str, dict[str, Any]] = {**KINDS, ADDING: {"gradient_accumulation_steps": WINDOW}}
CALLS = 3  # at least so many calls between two looks at the clock
FIT = "fit"
# How many times as fast as Keras's own: plain, full, adding.
WANTED = {
    ("torch", "161 tensors"): (12.0, 10.0, 5.0),
    ("torch", "300 x 1000"): (40.0, 80.0, 5.0),
    ("jax", "161 tensors"): (4.0, 3.0, 5.0),
    ("jax", "300 x 1000"): (1.2, 1.7, 5.0),
    ("tensorflow", "161 tensors"): (4.0, 4.0, 1.0),
    ("tensorflow", "300 x 1000"): (3.0, 3.0, 1.0),
}
WANTED_OF_FLOOR = {"161 tensors": 0.90}
WANTED_OF_FIT = 1.0
BACKENDS, STEP_CASES = (tuple(dict.fromkeys(names)) for names in zip(*WANTED, strict=True))


class Row(NamedTuple):
    """Seconds of ours and of what it is compared with, and the median over the rounds of theirs over ours."""

    case: str
    kind: str
    against: str
    ours: float
    theirs: float
    ratio: float


def row(case: str, kind: str, against: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    return Row(case, kind, against, median(ours), median(theirs), ratio(theirs, ours))


# In the process of one backend. Keras is imported inside of functions, since the first import decides on the backend.


def outputs_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How Keras keeps a kernel: (height, width, in, out), or (in, out)."""
    return (*shape[2:], *shape[1::-1])


class Stepping:
    """An optimizer on variables and gradients of its own, after its first steps."""

    def __init__(self, cls: Callable[..., Any], case: Case, kind: str) -> None:
        import keras

        shapes = tuple(map(outputs_last, case.shapes))
        self.variables = [keras.Variable(param) for param in random_arrays(shapes, "float32", 0)]
        self.grads = [keras.ops.convert_to_tensor(grad) for grad in random_arrays(shapes, "float32", 1)]
        self.optimizer = cls(**SETTINGS[kind])
        self.optimizer.build(self.variables)
        makers = {"torch": self._eager, "jax": self._jitted, "tensorflow": self._graph}
        self.step = makers[keras.config.backend()]()
        self.adding = kind == ADDING
        for _ in range(WINDOW if self.adding else 2):
            self.step()

    def _eager(self) -> Work:
        import torch

        @torch.no_grad()
        def step() -> None:
            self.optimizer.apply(self.grads, self.variables)

        return step

    def _jitted(self) -> Work:
        import jax

        optimizer, grads = self.optimizer, self.grads
        state = [[v.value for v in self.variables], [v.value for v in optimizer.variables]]
        jitted = jax.jit(
            lambda values, own, grads: optimizer.stateless_apply(own, grads, values), donate_argnums=(0, 1)
        )

        def step() -> None:
            state[:] = jitted(*state, grads)
            jax.block_until_ready(state)

        return step

    def _graph(self) -> Work:
        import tensorflow as tf

        graph: Work = tf.function(lambda: self.optimizer.apply(self.grads, self.variables))
        return graph

    def block(self, calls: int) -> float:
        """Seconds of one call out of at least so many; calls that update in between adding ones are not counted."""
        spent, done = 0.0, 0
        while done < calls:
            together = WINDOW - 1 if self.adding else calls
            start = time.perf_counter()
            for _ in range(together):
                self.step()
            spent += time.perf_counter() - start
            done += together
            if self.adding:
                self.step()
        return spent / done

    def moved(self) -> list[list[Any]]:
        """The torch backend's memory that a step goes through, as `Floor` takes it."""
        optimizer = self.optimizer
        state = [optimizer._momentums, optimizer._velocities]
        if optimizer.use_ema:
            state.append(optimizer._model_variables_moving_average)
        params, *state = ([v.value.detach().numpy() for v in variables] for variables in (self.variables, *state))
        return [params, [grad.numpy() for grad in self.grads], *state]


def classes() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import keras

    import nadam.keras

    return nadam.keras.Nadam, keras.optimizers.Nadam


def against_stock(name: str, kind: str, repeats: int) -> Row:
    """In turns, a block of calls each."""
    pair = [Stepping(cls, CASES[name], kind) for cls in classes()]
    calls = [max(CALLS, round(SAMPLE / one.block(CALLS))) for one in pair]
    rounds = [[one.block(count) for one, count in zip(pair, calls, strict=True)] for _ in range(repeats)]
    return row(name, kind, STOCK, *zip(*rounds, strict=True))


def against_floor(name: str, kind: str, repeats: int) -> Row:
    """With the faster form of the floor; torch on the CPU."""
    case = CASES[name]
    ours = Stepping(classes()[0], case, kind)
    forms = list(Floor(ours.moved(), kind, "float32").forms.values())
    for form in forms:
        form()
    own, *floors = in_turns([ours.step, *forms], small=case.small, clock=time.perf_counter, repeats=repeats)
    return row(name, kind, FLOOR, own, min(floors, key=median))


def rows(backend: str, cases: Sequence[str], repeats: int) -> Iterator[Row]:
    for name in cases:
        progress(f"{backend}: {name}")
        if name == FIT:
            from benchmarks import keras_fit

            yield row(FIT, "example", STOCK, *keras_fit.in_turns(classes(), repeats))
            continue
        for kind in SETTINGS:
            yield against_stock(name, kind, repeats)
            gc.collect()
            if backend == "torch" and kind in KINDS:
                yield against_floor(name, kind, repeats)
                gc.collect()


# In the first process.


def measured(backend: str, args: argparse.Namespace) -> Iterator[Row]:
    command = [sys.executable, "-m", "benchmarks.hosts_keras", "--rows", "--backend", backend]
    command += ["--case", *args.case, "--repeats", str(args.repeats)]
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "KERAS_BACKEND": backend}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield Row(**json.loads(line))
    if child.returncode:
        raise SystemExit(f"{backend}: ended with status {child.returncode}")


def wanted(backend: str, seen: Row) -> float | None:
    if seen.case == FIT:
        return WANTED_OF_FIT
    if seen.against == FLOOR:
        return WANTED_OF_FLOOR.get(seen.case)
    return WANTED[backend, seen.case][list(SETTINGS).index(seen.kind)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts_keras", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="only these (default: all that are installed)")
    parser.add_argument("--case", nargs="+", choices=(*STEP_CASES, FIT), default=[*STEP_CASES, FIT], help="only these")
    parser.add_argument("--repeats", type=int, help="samples per figure (default: 15; --quick: 5)")
    parser.add_argument("--quick", action="store_true", help="a first look")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.backend = args.backend or [backend for backend in BACKENDS if find_spec(backend) is not None]
    args.repeats = args.repeats or (5 if args.quick else 15)
    if args.repeats < 1:
        parser.error("--repeats: expected a number of at least 1")
    return args


def main() -> None:
    args = arguments()
    if args.rows:
        stdout = sys.stdout
        with redirect_stdout(sys.stderr):  # what others print is no row
            for seen in rows(*args.backend, args.case, args.repeats):
                print(json.dumps(seen._asdict()), file=stdout, flush=True)
        return
    columns = [("backend", -10), ("case", -11), ("kind", -7), ("against", -7), ("ours", 8), ("theirs", 8)]
    table = Table([*columns, ("ratio", 6), ("wanted", 6), ("reached", 7)])
    for backend in args.backend:
        for seen in measured(backend, args):
            bound = wanted(backend, seen)
            cells = [backend, seen.case, seen.kind, seen.against, duration(seen.ours), duration(seen.theirs)]
            verdict = ["-", "-"] if bound is None else [f"{bound:.2f}", "yes" if seen.ratio >= bound else "no"]
            table.row([*cells, f"{seen.ratio:.2f}", *verdict])


if __name__ == "__main__":
    main()
