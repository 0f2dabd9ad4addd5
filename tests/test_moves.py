"""State from every host to every other and back into its own, in new processes: moves.py."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hosts import HOSTS
from moves import MOVED, MOVING, takes

AVAILABLE = [name for name in MOVING if HOSTS[name]().available()]
ULPS = 4.0  # of N steps, each rounded once in either host


def run(what, folder, name):
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, Path(__file__).with_name("moves.py"), what, folder, name]
    environment = {**os.environ, **quiet, **HOSTS[name]().environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """How far off each run is that goes on in another process."""
    folder = tmp_path_factory.mktemp("moves")
    slowest_first = AVAILABLE[::-1]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: run("begin", folder, name), slowest_first))
        outputs = list(pool.map(lambda name: run("go-on", folder, name), slowest_first))
    return {key: value for output in outputs for key, value in json.loads(output.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(found, name):
    mine = {key: wrong for key, wrong in found.items() if key.startswith(f"{name} -> {name},")}
    assert len(mine) >= 30
    assert {key: wrong for key, wrong in mine.items() if wrong} == {}


@pytest.mark.parametrize("target", AVAILABLE)
@pytest.mark.parametrize("source", AVAILABLE)
def test_a_run_goes_on_in_another_host(found, source, target):
    if source == target:
        pytest.skip("is compared bit for bit")
    cases = [case for case in MOVED if takes(source, case) and takes(target, case)]
    assert len(cases) >= 20
    far = {str(case): found[f"{source} -> {target}, {case}"] for case in cases}
    assert {case: off for case, off in far.items() if isinstance(off, str) or off > ULPS} == {}


def test_a_wrong_momentum_product_would_be_seen(tmp_path, monkeypatch):
    import moves
    from nadam.core.portable import PortableState

    (case,) = [case for case in MOVED if case.name == "defaults" and case.dtype == "float32"]
    monkeypatch.setattr(moves, "MOVED", [case])
    monkeypatch.setattr(moves, "cases", lambda host: [])
    monkeypatch.setattr(moves, "MOVING", ["numpy"])
    moves.begin(tmp_path, "numpy")
    assert moves.go_on(tmp_path, "numpy") == {f"numpy -> numpy, {case}": []}
    right = PortableState.product
    monkeypatch.setattr(PortableState, "product", lambda self, *given: right(self, *given) * 0.99)
    (wrong,) = moves.go_on(tmp_path, "numpy").values()
    assert "params 0" in wrong
    monkeypatch.setattr(moves, "resumed", moves.moved)
    (far,) = moves.go_on(tmp_path, "numpy").values()
    assert far > 10 * ULPS
