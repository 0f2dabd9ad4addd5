"""Bits as recorded, where this is the machine that they were recorded on; and that a wrong bit would be seen."""

import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import golden
from hosts import HOSTS
from nadam.core import library, rule
from nadam.kernels.cpu import machine_code

HERE = ["numpy", "torch", "torch fallback", "jax kernel", "jax loops", "jax transform"]  # the others: where they run


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_bits_are_as_recorded(framework):
    golden.check([name for name in HERE if name.startswith(framework)])


def test_hosts_and_compilers_differ_in_last_bits():
    """So the bits are of the one that is named: each has its own order of a sum, or fuses otherwise."""
    states = {}
    for key, value in golden.recorded("znver4").items():
        name, _, case = key.partition(":")
        states.setdefault(name, {})[case] = value.get("state")  # which the environment has not
    for one, other in [
        ("torch", "torch fallback"),
        ("jax kernel", "jax loops"),
        ("keras jax jit", "keras jax jit loops"),
    ]:
        both = states[one].keys() & states[other].keys()
        assert len(both) > 10
        assert any(states[one][case] != states[other][case] for case in both)


def eps_a_bit_larger(param, grad, exp_avg, exp_avg_sq, decay, w1, w2, exp_avg_step, grad_step, eps):
    exp_avg = exp_avg + (grad - exp_avg) * w1
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * w2
    step = (exp_avg_step * exp_avg + grad_step * grad) / (sqrt(exp_avg_sq) + eps * 1.0000001)  # noqa: F821
    return param - param * decay - step, exp_avg, exp_avg_sq


@pytest.mark.parametrize("name", ["numpy", "jax loops"])
def test_one_bit_of_the_rule_is_seen(name, monkeypatch):
    if not HOSTS[name]().available():
        pytest.skip("not installed")

    def found():
        machine_code._kernels.clear()
        library.mathematics.cache_clear()
        return golden.run_all(name, lambda case: case.name == "eps" and case.dtype == "float32")

    before = found()
    assert found() == before
    with monkeypatch.context() as patch:
        patch.setattr(rule, "update", FunctionType(eps_a_bit_larger.__code__, vars(rule)))
        wrong = found()
    assert found() == before
    assert wrong != before
    assert list(golden.differences(wrong, [name], known=before)) == [
        f"{name}: eps, float32: the state differs since step 1 to 10"
    ]


def test_a_wrong_report_is_seen():
    before = {"numpy: eps, float32": {"state": "1 2 3 4 5", "last_step": [50, 0.01, None, None, 0, False]}}
    after = {"numpy: eps, float32": {"state": "1 2 3 0 5", "last_step": [50, 0.01, None, None, 1, False]}}
    (line,) = golden.differences(after, ["numpy"], known=before)
    assert "since step 31 to 40 and last_step is [50, 0.01, None, None, 1, False], was" in line
    assert list(golden.differences({}, ["numpy"], known=before)) == ["numpy: eps, float32: recorded, but not run"]
    assert list(golden.differences(after, ["numpy"], known={})) == ["numpy: eps, float32: not recorded"]


def test_no_framework_is_imported_unless_asked_for():
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import golden
from hosts import HOSTS
hosts = {name: host() for name, host in HOSTS.items()}
golden.run("numpy", golden.cases(hosts["numpy"])[0])
print(sorted({"torch", "jax", "keras", "tensorflow", "triton", "optax"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
