"""On every host and compiler the comparison with the reference sees each wrong version of the package: wrong.py."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hosts import HOSTS
from wrong import EXEMPT, GROUPS, RIGHT, VERSIONS, cases_of

NAMES = [name for names in GROUPS.values() for name in names]


@cache
def found(group):
    """What a process of these hosts finds, version by version."""
    names = [name for name in GROUPS[group] if HOSTS[name]().available()]
    needed = {key: value for name in names for key, value in HOSTS[name]().environment.items()}
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with TemporaryDirectory() as folder:
        command = [sys.executable, Path(__file__).with_name("wrong.py"), folder, *names]
        environment = {**inherited, **quiet, **needed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of_host(name, version):
    if not HOSTS[name]().available():
        pytest.skip("not installed")
    (group,) = (group for group, names in GROUPS.items() if name in names)
    return found(group)[version][name]


@pytest.mark.parametrize("name", NAMES)
def test_the_right_version_passes(name):
    results = of_host(name, RIGHT)
    assert results.keys() == {str(case) for version in VERSIONS for case in cases_of(name, version)}
    assert not {case: message for case, message in results.items() if message is not None}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_version_is_seen(name, version):
    results = of_host(name, version)
    if (name, version) in EXEMPT:
        assert not any(results.values())
    else:
        assert results
        assert all(message and "ulps apart" in message for message in results.values()), results
