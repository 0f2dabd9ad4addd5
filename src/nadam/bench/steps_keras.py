"""Time a whole step of nadam.keras.Nadam against keras.optimizers.Nadam, on one of Keras's backends.

On JAX a compiled step with donated buffers, on TensorFlow a `tf.function`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import keras

import nadam.keras
from nadam.bench.cases import CASES, KINDS, Case, random_arrays
from nadam.bench.floor import Floor
from nadam.bench.measure import SAMPLE, Work, in_turns, ratio
from nadam.bench.options import Options
from nadam.bench.records import FLOOR, Timing

STOCK = "Nadam"
ADDING, WINDOW = "adding", 8  # calls that only accumulate, and how many calls there are to an update
SETTINGS: dict[str, dict[str, Any]] = {**KINDS, ADDING: {"gradient_accumulation_steps": WINDOW}}
CALLS = 3  # at least so many calls between two looks at the clock
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


def outputs_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How Keras keeps a kernel: (height, width, in, out), or (in, out)."""
    return (*shape[2:], *shape[1::-1])


class Stepping:
    """An optimizer on variables and gradients of its own, after its first steps."""

    def __init__(self, cls: Callable[..., Any], case: Case, kind: str) -> None:
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


def units(options: Options) -> list[tuple[str, str]]:
    """Cases and kinds."""
    cases = options.chosen(list(dict.fromkeys(name for _, name in WANTED)), ["300 x 1000"])
    return [(name, kind) for name in cases for kind in SETTINGS]


def measure(options: Options, name: str, kind: str) -> Iterator[Timing]:
    """A row for Keras's Nadam; on torch one for the floor's faster form."""
    backend = keras.config.backend()
    rounds = against_stock(name, kind, options.rounds)
    yield row(options, name, kind, STOCK, rounds, WANTED[backend, name][list(SETTINGS).index(kind)])
    if backend == "torch" and kind in KINDS:
        yield row(options, name, kind, FLOOR, against_floor(name, kind, options.rounds), WANTED_OF_FLOOR.get(name))


def row(
    options: Options,
    name: str,
    kind: str,
    against: str,
    rounds: Sequence[Sequence[float]],
    wanted: float | None,
) -> Timing:
    """Medians of samples of both that were taken in turns."""
    ours, theirs = rounds
    return Timing(options.heading, name, kind, against, median(ours), median(theirs), ratio(theirs, ours), wanted)


def against_stock(name: str, kind: str, repeats: int) -> list[Sequence[float]]:
    """In turns, a block of calls each."""
    pair = [Stepping(cls, CASES[name], kind) for cls in (nadam.keras.Nadam, keras.optimizers.Nadam)]
    calls = [max(CALLS, round(SAMPLE / one.block(CALLS))) for one in pair]
    rounds = [[one.block(count) for one, count in zip(pair, calls, strict=True)] for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


def against_floor(name: str, kind: str, repeats: int) -> list[Sequence[float]]:
    """With the faster form of the floor; torch on the CPU."""
    case = CASES[name]
    ours = Stepping(nadam.keras.Nadam, case, kind)
    forms = list(Floor(ours.moved(), kind, "float32").forms.values())
    for form in forms:
        form()
    own, *floors = in_turns([ours.step, *forms], small=case.small, clock=time.perf_counter, repeats=repeats)
    return [own, min(floors, key=median)]
