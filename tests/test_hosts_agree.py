"""Every option, dtype and combination on every host, a step at a time, against the float64 reference."""

from types import FunctionType

import pytest

from agree import runs, step_against_reference
from arguments import Case
from hosts import HOSTS
from nadam.core import library, rule
from nadam.kernels.cpu import machine_code
from test_harness import decay_after, eps_inside

HERE = ["numpy", "torch", "torch fallback", "jax kernel", "jax loops", "jax transform"]


@pytest.mark.parametrize(("name", "case"), runs(HERE), ids=str)
def test_a_step_is_that_of_the_reference(name, case):
    if not HOSTS[name]().available():
        pytest.skip("not installed")
    step_against_reference(name, case)


# A third wrong rule is fed to every host there is: test_wrong_versions.py.
WRONG = {
    "eps inside the root": ({"eps": 0.1}, eps_inside),
    "decay after the step": ({"weight_decay": 0.5, "lr": 0.1}, decay_after),
}


FED = [(name, wrong) for name in ("numpy", "torch", "torch fallback", "jax loops") for wrong in WRONG]
FED += [("jax transform", "eps inside the root")]  # it does not decay by the rule


@pytest.mark.parametrize(("name", "wrong"), FED)
def test_a_wrong_rule_is_seen(name, wrong, monkeypatch):
    if not HOSTS[name]().available():
        pytest.skip("not installed")
    settings, function = WRONG[wrong]
    step_against_reference(name, Case(wrong, settings))
    monkeypatch.setattr(rule, "update", FunctionType(function.__code__, vars(rule)))
    forget()
    try:
        with pytest.raises(AssertionError, match="ulps apart"):
            step_against_reference(name, Case(wrong, settings))
    finally:
        monkeypatch.undo()
        forget()


def forget():
    """What was compiled of the rule."""
    machine_code._kernels.clear()
    library.mathematics.cache_clear()
