"""Runs that begin in one process and go on in another, of the same host or of another one.

    python tests/moves.py begin FOLDER HOST...   # N steps of every case, a file, N more: what the others are to reach
    python tests/moves.py go-on FOLDER HOST...   # the files of all hosts there, N steps; prints how far off it is

Of the same host all bits are to be equal. Others round differently, so there it is a distance in ulps.
"""

import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np

from arguments import DEFAULTS, OPTIONS, Case, cases, has, problem
from cases import apart
from hosts import HOSTS
from hosts.base import Host

N = 5  # with 3 calls accumulated, in the middle of a window; after an overwrite, and a call that was skipped
SHAPES = [(7, 5), (), (257,), (0, 3)]
LARGE = [*SHAPES, (70, 60)]  # whose moments are kept in 8 bits where that is asked for
MOVING = ["numpy", "torch", "jax kernel", "keras torch", "keras jax", "keras tensorflow"]


class Common(Host):
    """What all hosts have: gradients for all parameters, which are dense."""

    missing, dense, shapes = False, True, SHAPES


class Compressed(Common):
    """What those have that keep moments in 8 bits."""

    shapes = LARGE


MOVED = [Case(name, chosen) for name, chosen in OPTIONS.items()]
MOVED += [Case("defaults", {}, dtype) for dtype in ("float64", "bfloat16", "float16")]
CODES = {"state_bits": 8, "seed": 7}
MOVED += [Case("state_bits", CODES, dtype) for dtype in ("float32", "float16")]
MOVED += [Case("state_bits and more", {**CODES, "gradient_accumulation_steps": 3, "use_ema": True})]
MOVED += [Case("state_bits and remainder", {**CODES, "remainder": 8}, "bfloat16")]
MOVED += [Case("remainder of 8", {"remainder": 8}, "bfloat16")]


def takes(name, case):
    host = HOSTS[name]()
    return has(host, case.settings) and case.dtype in host.dtypes


def chosen(name):
    """The cases of a host: those that others have as well, and its own."""
    shared = [case for case in MOVED if takes(name, case)]
    return shared + [case for case in cases(HOSTS[name]()) if case not in shared]


def begin(folder, name):
    """Save every case of a host after N steps, and its state after 2 N."""
    for case in chosen(name):
        host, all_grads = built(name, case)
        for step, grads in enumerate(all_grads):
            if step == N:
                host.save(file_of(folder, name, case))
            host.step(grads)
        np.savez(file_of(folder, name, case).with_suffix(".npz"), **flat(host.state()))


def go_on(folder, name):
    """How far off a host is that takes up the runs of all, in ulps; of its own, which arrays have other bits."""
    found = {}
    for case in chosen(name):
        host, all_grads = built(name, case)
        for other in MOVING if case in MOVED else [name]:
            if takes(other, case):
                compare = resumed if other == name else moved
                found[f"{other} -> {name}, {case}"] = compare(host, all_grads[N:], file_of(folder, other, case))
    return found


def flat(state):
    """Arrays by name and number, as NumPy can save them."""
    found = {f"{key} {i}": value for key, values in state.items() for i, value in enumerate(values)}
    return {key: value.view("u2") if value.dtype.name == "bfloat16" else value for key, value in found.items()}


def tried(function):
    """What a function gives, or the error that it raises."""

    def attempt(*args):
        try:
            return function(*args)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return attempt


def built(name, case):
    """A host before its first step, and its gradients."""
    host = HOSTS[name]()
    shared = Compressed() if "state_bits" in case.settings else Common()
    host.shapes = shared.shapes
    params, all_grads = problem(case, shared if case in MOVED else host, 2 * N)
    host.build(params, DEFAULTS | case.settings)
    return host, all_grads


@tried
def resumed(host, all_grads, file):
    """Which arrays have other bits than in a run that was not interrupted."""
    host.load(file)
    for grads in all_grads:
        host.step(grads)
    expected, found = np.load(file.with_suffix(".npz")), flat(host.state())
    assert set(expected) == set(found)
    return [key for key in expected if expected[key].tobytes() != found[key].tobytes()]


@tried
def moved(host, all_grads, file):
    """How many ulps parameters are off at most from those that the other host has; of numbers of 1/16 at least."""
    host.load(file)
    for grads in all_grads:
        host.step(grads)
    expected, far = np.load(file.with_suffix(".npz")), 0.0
    for i, param in enumerate(host.state()["params"]):
        other = expected[f"params {i}"]
        far = max(far, apart(param, other.view(param.dtype), 2.0**-4, param.dtype))
    return far


def file_of(folder, name, case):
    return Path(folder) / re.sub(r"\W+", "_", f"{name} {case}")


def main():
    what, folder, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="settings differ|use_ema")
    if what == "begin":
        for name in names:
            begin(folder, name)
        return
    print(json.dumps({key: value for name in names for key, value in go_on(folder, name).items()}))


if __name__ == "__main__":
    main()
