"""optax's own tests, which come in its wheel, with our transformations in the place of its Nadam."""

import os
import subprocess
import sys
import unittest

import pytest
from optax._src import alias

import nadam.jax

alias_test = pytest.importorskip("optax._src.alias_test")  # which imports scikit-learn

NAMES = ("nadam", "nadamw")


def cases():
    """Tests by name: those that are generated for one of ours."""
    found, suite = [], alias_test.AliasTest  # not a global name here, or pytest would run all of it
    for name in unittest.TestLoader().getTestCaseNames(suite):
        described = str(getattr(suite, name).__doc__) + name
        if any(f"'{ours}'" in described or name.endswith(ours) for ours in NAMES):
            found.append(name)
    return found


@pytest.fixture
def counts(monkeypatch):
    """How often ours was made and asked for updates."""
    found = {"made": 0, "updates": 0}

    def counted(make):
        def factory(*args, **kwargs):
            found["made"] += 1
            optimizer = make(*args, **kwargs)

            def update(*given, **more):
                found["updates"] += 1
                return optimizer.update(*given, **more)

            return optimizer._replace(update=update)

        # inject_hyperparams looks at the signature.
        factory.__wrapped__ = make
        return factory

    for name in NAMES:
        monkeypatch.setattr(alias, name, counted(getattr(nadam.jax, name)))
    return found


def outcome(suite, name):
    result = unittest.TestResult()
    suite(name).run(result)
    assert result.testsRun == 1
    return result


@pytest.mark.parametrize("name", cases())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_alias_suite(name, counts):
    result = outcome(alias_test.AliasTest, name)
    failed = [text for _, text in result.failures + result.errors]
    assert not failed, failed[0]
    assert not result.skipped
    assert counts["made"] > 0
    assert counts["updates"] > 0


def test_the_alias_suite_has_these_tests():
    kinds = {name.rstrip("0123456789") for name in cases()}
    assert len(kinds) >= 5
    assert len(cases()) > 20


PROGRAM = """
import unittest
from optax._src import sharding_test
import nadam.jax, jax
made = {name: getattr(nadam.jax, name)(1.0) for name in ("nadam", "nadamw")}
used = []
suite = sharding_test.ShardingTest
assert tuple(map(int, jax.__version__.split(".")[:3])) >= (0, 7, 2), "too old for its tests"
jax.__version__ = "0.8.1"  # it compares versions as text, to which 0.10 comes before 0.7
names = [n for n in unittest.TestLoader().getTestCaseNames(suite) if n.endswith(("nadam", "nadamw"))]
for name in names:
    function = getattr(suite, name)
    cells = {k: c.cell_contents for k, c in zip(function.__code__.co_freevars, function.__closure__ or ())}
    key = name.rsplit("_", 1)[1]
    def update(*given, key=key, **more):
        used.append(key)
        return made[key].update(*given, **more)
    ours = made[key]._replace(update=update)
    kept = sharding_test.OPTIMIZERS[key]
    params = cells.get("testcase_params")
    assert kept in (params if isinstance(params, tuple) else params.values()), cells
    plain = cells["test_method"]
    result = unittest.TestResult()
    test = suite(name)
    setattr(test, name, lambda: plain(test, ours))
    test.run(result)
    assert not result.failures + result.errors, (result.failures + result.errors)[0][1]
    assert not result.skipped
print(len(names), len(set(used)), jax.device_count())
"""


def test_sharding_suite():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    count, kinds, devices = map(int, done.stdout.split())
    assert (count, kinds, devices) == (6, 2, 8)
