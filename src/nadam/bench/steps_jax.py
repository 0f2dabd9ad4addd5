"""Time a compiled step of nadam.jax against optax's Nadam, Keras's on JAX and the dispatch of its arrays.

All are compiled steps with everything donated, in turns. "clipped" is global-norm clipping and decoupled decay, in
optax a chain. "passed through" is a compiled function that only hands the same arrays through, which is what JAX itself
takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import jax
import optax

import nadam.jax
from nadam.bench.cases import CASES, Case, random_arrays
from nadam.bench.measure import Work, in_turns, ratio
from nadam.bench.options import Options
from nadam.bench.records import OURS, Timing

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"global_clipnorm": 1.0, "weight_decay": 1e-4}, {"weight_decay": 1e-4}),
}
# Times as fast as optax's.
WANTED = {
    ("161 tensors", "plain", "optax"): 1.7,
    ("161 tensors", "clipped", "optax"): 2.2,
    ("300 x 1000", "plain", "optax"): 1.1,
    ("300 x 1000", "clipped", "optax"): 1.2,
    ("300 x 1000", "plain", "passed through"): 1 / 1.15,
    ("32M", "plain", "optax"): 1.2,
    ("32M", "clipped", "optax"): 2.0,
}


def running(case: Case, init: Callable[[Any], Any], update: Callable[..., Any]) -> Work:
    """A compiled step, called once more with what it gave each time."""
    params, grads = ([jax.numpy.array(a) for a in random_arrays(case.shapes, "float32", seed)] for seed in (0, 1))
    compiled = jax.jit(update, donate_argnums=(0, 1))
    carry = params, jax.jit(init)(params)

    def step() -> None:
        nonlocal carry
        carry = compiled(*carry, grads)
        jax.block_until_ready(carry)

    step()
    step()
    return step


def whole(optimizer: nadam.jax.Fused) -> Callable[..., Any]:
    """As a function of (params, state, grads)."""
    return lambda params, state, grads: optimizer.step(grads, state, params)


def two_phases(optimizer: Any) -> Callable[..., Any]:
    """Optax's update and its application, as a function of (params, state, grads)."""

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


def works(name: str, kind: str) -> dict[str, Work]:
    """What is timed in turns; "ours" is `fused`, "nadam" our transformation within optax."""
    case, (settings, decay) = CASES[name], KINDS[kind]
    fused = nadam.jax.fused(1e-3, **settings)
    ours, theirs = (nadam.jax.nadamw, optax.nadamw) if decay else (nadam.jax.nadam, optax.nadam)
    chain = [optax.clip_by_global_norm(1.0)] if decay else []
    transformations = [optax.chain(*chain, make(1e-3, **decay)) for make in (ours, theirs)]
    made: dict[str, Work] = {
        OURS: running(case, fused.init, whole(fused)),
        **{
            label: running(case, t.init, two_phases(t))
            for label, t in zip(("nadam within optax", "optax"), transformations, strict=True)
        },
        "passed through": running(case, fused.init, lambda params, state, grads: (params, state)),
    }
    return made


def units(options: Options) -> list[tuple[str, str]]:
    """Cases and kinds."""
    cases = options.chosen(list(dict.fromkeys(name for name, *_ in WANTED)), ["300 x 1000"])
    return [(name, kind) for name in cases for kind in KINDS]


def measure(options: Options, name: str, kind: str) -> Iterator[Timing]:
    """A row for each of what is not `fused`."""
    named = works(name, kind)
    found = in_turns(
        list(named.values()),
        small=CASES[name].small,
        clock=time.perf_counter,
        repeats=options.rounds,
        budget=options.budget,
    )
    samples = dict(zip(named, found, strict=True))
    own = samples.pop(OURS)
    for against, times in samples.items():
        medians, bound = (median(own), median(times)), WANTED.get((name, kind, against))
        yield Timing(options.heading, name, kind, against, *medians, ratio(times, own), bound)
