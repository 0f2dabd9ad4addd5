"""Every bit of every host's state along seeded runs, as digests beside which later versions are compared.

    python tests/golden.py            # compare, with the file of golden/ for this processor
    python tests/golden.py --record   # write it anew

The digests hold on one kind of processor and with one set of libraries, which the file names; elsewhere nothing is
compared. A change that is meant to change bits records them anew, and the difference of the file shows which.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

from arguments import DEFAULTS, cases, problem
from hosts import HOSTS

FOLDER = Path(__file__).with_name("golden")
PACKAGES = ["numpy", "ml_dtypes", "numba", "llvmlite", "torch", "jax", "jaxlib", "optax", "keras", "triton"]
PACKAGES += ["tensorflow", "tensorflow_cpu"]
LOOKS = 5  # at the state, in a run
NEW = "not recorded"


def environment():
    """All that bits depend on besides this project's sources."""
    import llvmlite.binding as llvm

    features = sorted(name for name, there in llvm.get_host_cpu_features().items() if there)
    found = {"processor": llvm.get_host_cpu_name(), "features": " ".join(features)}
    found |= {"system": f"{platform.system()} {' '.join(platform.libc_ver())}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def run(name, case):
    """Digests of the state at some steps of a run, and what the host reports of its last step."""
    host = HOSTS[name]()
    params, all_grads = problem(case, host)
    host.build(params, DEFAULTS | case.settings)
    found, every = [], host.steps // LOOKS
    for step, grads in enumerate(all_grads, 1):
        host.step(grads)
        if step % every == 0:
            found.append(digest(host.state()))
    return {"state": " ".join(found), "last_step": host.report()}


def digest(state):
    """Of names, dtypes, shapes and every bit of a state."""
    made = hashlib.sha256()
    for name, arrays in sorted(state.items()):
        for array in arrays:
            made.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return made.hexdigest()[:16]


def run_all(name, only=lambda case: True):
    """The runs of a host, in this process."""
    return {f"{name}: {case}": run(name, case) for case in cases(HOSTS[name]()) if only(case)}


def available():
    return [name for name, host in HOSTS.items() if host().available()]


def run_apart(names):
    """All runs of some hosts, in processes that begin with the environment that each needs, one for each processor."""
    groups = {}
    for name in names:
        groups.setdefault(tuple(sorted(HOSTS[name]().environment.items())), []).append(name)
    # The longest first.
    order = sorted(groups.items(), key=lambda group: "tensorflow" not in str(group[0]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda group: _run_process(dict(group[0]), group[1]), order))
    return {key: value for each in found for key, value in each.items()}


def _run_process(settings, names):
    command = [sys.executable, __file__, "--print", *(f"--host={name}" for name in names)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore", "JAX_PLATFORMS": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env={**inherited, **quiet, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{', '.join(names)}: exit code {done.returncode}")
    return json.loads(done.stdout)


def recorded(processor=None):
    file = FOLDER / f"{processor or environment()['processor']}.json"
    return json.loads(file.read_text()) if file.exists() else {"environment": None}


def elsewhere():
    """Why what is recorded does not hold here; None where it does."""
    known, here = recorded()["environment"] or {}, environment()
    other = [f"{name} {known.get(name)!r}, here {value!r}" for name, value in here.items() if known.get(name) != value]
    return "recorded with " + "; ".join(other) if other else None


def check(names):
    """For a test: that the bits of these hosts are as recorded; skips it where nothing can be said.

    A run that is new on another processor may not be recorded on this one yet.

    Raises:
        AssertionError: They are not.
    """
    import pytest

    reason = elsewhere()
    if reason or not set(names) <= set(available()):
        pytest.skip(reason or "not installed")
    assert not [line for line in differences(run_apart(names), names) if not line.endswith(NEW)]


def differences(found, names, known=None):
    """What differs from what is recorded, a line for each run; of these hosts."""
    known = recorded() if known is None else known
    known = {key: value for key, value in known.items() if key.partition(":")[0] in names}
    for key in sorted(known.keys() | found.keys()):
        if key not in known or key not in found:
            yield f"{key}: {NEW if key in found else 'recorded, but not run'}"
        elif known[key] != found[key]:
            yield f"{key}: " + " and ".join(_differences(key, known[key], found[key]))


def _differences(key, before, now):
    digests = zip_longest(before["state"].split(), now["state"].split())
    looks = [look for look, (one, other) in enumerate(digests, 1) if one != other]
    if looks:
        every = HOSTS[key.partition(":")[0]]().steps // LOOKS
        yield f"the state differs since step {(looks[0] - 1) * every + 1} to {looks[0] * every}"
    if before["last_step"] != now["last_step"]:
        yield f"last_step is {now['last_step']}, was {before['last_step']}"


def write(found):
    lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
    FOLDER.joinpath(f"{environment()['processor']}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the file")
    parser.add_argument("--host", action="append", choices=HOSTS, help="only this one; may be given again")
    parser.add_argument("--print", action="store_true", help="run these hosts here and print the digests")
    given = parser.parse_args()
    names, began = given.host or available(), time.perf_counter()
    if given.print:
        print(json.dumps({key: value for name in names for key, value in run_all(name).items()}))
        return 0
    reason = elsewhere()
    if reason and not given.record:
        print(f"Nothing to compare: {reason}")
        return 0
    found = run_apart(names)
    print(f"{len(found)} runs of {len(names)} hosts in {time.perf_counter() - began:.0f} s")
    if given.record:
        others = {} if reason else {k: v for k, v in recorded().items() if k.partition(":")[0] not in names}
        write({**others, **found, "environment": environment()})
        return 0
    lines = list(differences(found, names))
    print(*lines or ["All bits are as recorded."], sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
