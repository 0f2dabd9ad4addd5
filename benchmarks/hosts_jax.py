"""Time a compiled step of nadam.jax against optax's Nadam, Keras's on JAX and the dispatch of its arrays.

    python -m benchmarks.hosts_jax
    python -m benchmarks.hosts_jax --case "300 x 1000" --quick

All are compiled steps with everything donated, in turns. "clipped" is global-norm clipping and decoupled decay, in
optax a chain. "passed" is a compiled function that only hands the same arrays through, which is what JAX itself takes.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import optax

import nadam.jax
from benchmarks.cases import CASES, Case, random_arrays
from benchmarks.hosts_keras import Stepping
from benchmarks.measure import Work, in_turns, ratio
from benchmarks.report import Table, duration, progress

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"global_clipnorm": 1.0, "weight_decay": 1e-4}, {"weight_decay": 1e-4}),
}
# What the fused step is to reach: times as fast as optax's; and as Keras's, plain.
WANTED = {
    ("161 tensors", "plain", "optax"): 1.7,
    ("161 tensors", "clipped", "optax"): 2.2,
    ("161 tensors", "plain", "Keras"): 4.0,
    ("300 x 1000", "plain", "optax"): 1.1,
    ("300 x 1000", "clipped", "optax"): 1.2,
    ("300 x 1000", "plain", "Keras"): 1.3,
    ("300 x 1000", "plain", "passed"): 1 / 1.15,
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
    return lambda params, state, grads: optimizer.step(grads, state, params)


def two_phases(optimizer: Any) -> Callable[..., Any]:
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
        "ours": running(case, fused.init, whole(fused)),
        **{
            label: running(case, t.init, two_phases(t))
            for label, t in zip(("nadam", "optax"), transformations, strict=True)
        },
        "passed": running(case, fused.init, lambda params, state, grads: (params, state)),
    }
    if not decay:
        import keras

        made["Keras"] = Stepping(partial(keras.optimizers.Nadam, learning_rate=1e-3), case, kind).step
    return made


def measured(name: str, kind: str, repeats: int) -> dict[str, Sequence[float]]:
    named = works(name, kind)
    found = in_turns(list(named.values()), small=CASES[name].small, clock=time.perf_counter, repeats=repeats)
    return dict(zip(named, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts_jax", description=__doc__.splitlines()[0])
    cases = list(dict.fromkeys(name for name, *_ in WANTED))
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, help="only these")
    parser.add_argument("--repeats", type=int, help="samples per figure (default: 15; --quick: 5)")
    parser.add_argument("--quick", action="store_true", help="a first look")
    args = parser.parse_args()
    repeats = args.repeats or (5 if args.quick else 15)
    columns = [("case", -11), ("kind", -7), ("step", -5), ("against", -7), ("ours", 8), ("theirs", 8), ("ratio", 6)]
    table = Table([*columns, ("wanted", 6), ("reached", 7)])
    for name in args.case:
        for kind in KINDS:
            progress(f"{name}, {kind}")
            samples = measured(name, kind, repeats)
            pairs = [("ours", other) for other in samples if other not in ("ours", "nadam")] + [("nadam", "optax")]
            for own, against in pairs:
                seen, bound = ratio(samples[against], samples[own]), WANTED.get((name, kind, against))
                label = "fused" if own == "ours" else own
                cells = [name, kind, label, against, *(duration(median(samples[who])) for who in (own, against))]
                missing = bound is None or own != "ours"
                verdict = ["-", "-"] if missing else [f"{bound:.2f}", "yes" if seen >= bound else "no"]
                table.row([*cells, f"{seen:.2f}", *verdict])
            gc.collect()


if __name__ == "__main__":
    main()
