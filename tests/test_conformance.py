"""nadam.conformance: its trajectories are the formula's, it knows the four members, and wrong rules are red."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from nadam.conformance import LIMIT, MEMBERS, exact, identify, load
from nadam.conformance.__main__ import main

CASES = load()["cases"]
# The table of docs/semantics.md: one parameter from 1, gradients 0.1 + 0.3 sin t, after 1, 10 and 1,000 steps.
CHECK_VALUES = {
    "keras": (0.998937212, 0.995857077, 0.576186592),
    "torch": (0.998943549, 0.995777853, 0.576271844),
    "optax": (0.998526316, 0.993478193, 0.572792249),
    "adam": (0.998100001, 0.992333526, 0.571510364),
}
PSI = {"keras": 1.0, "torch": 0.004, "optax": math.inf, "adam": math.inf}


def plain(
    lr, beta1, beta2, eps, weight_decay=0.0, coupled_weight_decay=0.0, *, member, dtype=np.float64, wrong=None, psi=None
):
    """Nadam in NumPy, or something else that is near it."""
    m = v = t = 0
    product = 1.0
    psi = PSI[member] if psi is None else psi

    def momentum(t):
        return beta1 * (1 - 0.5 * 0.96 ** (t * psi))

    def step(param, grad):
        nonlocal m, v, t, product
        t += 1
        param, grad = param.astype(dtype), grad.astype(dtype)
        product *= momentum(t)
        if wrong == "single product":
            product = float(np.float32(product))
        if wrong == "decay after":
            grad = grad + dtype(weight_decay) * param
        elif wrong != "no decay":
            grad = grad + dtype(coupled_weight_decay) * param
            param = param - dtype(lr * weight_decay) * param
        m = m + (grad - m) * dtype(1 - beta1)
        v = v + (grad * grad - v) * dtype(1 - beta2)
        now, following = momentum(t), momentum(t + 1)
        ahead = 1 - product if member == "adam" else 1 - product * following
        if wrong == "beta2 twice":  # of the paper's Algorithm 2
            grad_part, v_hat = 1 - now, dtype(beta2) * v / dtype(1 - beta2**t)
        else:
            grad_part, v_hat = 1 - now, v / dtype(1 - beta2**t)
        m_hat = dtype(following / ahead) * m + dtype(grad_part / (1 - product)) * grad
        if wrong == "eps inside":
            return param - dtype(lr) * m_hat / np.sqrt(v_hat + dtype(eps) ** 2)
        return param - dtype(lr) * m_hat / (np.sqrt(v_hat) + dtype(eps))

    return step


def test_the_file_is_what_its_script_writes():
    written = files("nadam.conformance").joinpath("trajectories.json").read_text("utf-8")
    assert written == exact.text()
    assert len(written) < 200_000
    assert json.loads(written)["cases"] == CASES  # every float comes back as it was


@pytest.mark.parametrize("member", MEMBERS)
def test_the_script_gives_the_published_check_values(member):
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7}
    rows = exact.trajectory(member, [1.0], [[0.1 + 0.3 * math.sin(t)] for t in range(1, 1001)], **settings)
    assert [round(rows[t - 1][0], 9) for t in (1, 10, 1000)] == list(CHECK_VALUES[member])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_members_are_far_apart_in_every_case(case):
    assert np.abs(load()["param"]).max() <= 1  # so that an ulp of 1 is the largest
    for one, other in combinations(MEMBERS, 2):
        apart = np.abs(np.array(case[one]) - np.array(case[other]))
        assert apart.max() > 100 * LIMIT * 2.0**-23


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("member", MEMBERS)
def test_each_member_is_known(member, dtype):
    found = identify(partial(plain, member=member, dtype=dtype))
    assert (found.member, found.dtype, found.precision) == (member, dtype.__name__, dtype.__name__)
    assert not found.departures
    assert set(found.ulps) == {case["name"] for case in CASES}
    assert max(found.ulps.values()) < 20
    assert str(found).startswith(f"{MEMBERS[member]}, within ")


def test_single_precision_on_the_way_is_told():
    found = identify(partial(plain, member="torch", wrong="single product"))
    assert (found.member, found.dtype, found.precision) == ("torch", "float64", "float32")
    assert not found.departures
    assert str(found).endswith("of float32 (its parameters are float64)")


@pytest.mark.parametrize(
    ("wrong", "cases"),
    [
        ("eps inside", {"eps"}),
        ("no decay", {"weight_decay", "coupled_weight_decay"}),
        ("decay after", {"weight_decay", "coupled_weight_decay"}),
        ("beta2 twice", {case["name"] for case in CASES}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_wrong_rule_is_red(member, dtype, wrong, cases):
    found = identify(partial(plain, member=member, dtype=dtype, wrong=wrong))
    assert set(found.departures) == cases
    if len(cases) < len(CASES):
        assert found.member == member


def test_another_schedule_is_none_of_the_four():
    found = identify(partial(plain, member="torch", psi=0.01))
    assert set(found.departures) == {case["name"] for case in CASES}
    assert found.departures["plain"].step == 1
    assert str(found).startswith("none of the four; departs from torch's at\n  case plain: step 1, param[0]: 0.99")


def late(lr, beta1, beta2, eps):
    """optax's until step 17."""
    right, count = plain(lr, beta1, beta2, eps, member="optax"), 0

    def step(param, grad):
        nonlocal count
        count += 1
        return right(param, grad) + np.array([0, 0, 1e-3]) * (count == 17)

    return step


def test_a_late_departure_is_told_by_its_step():
    found = identify(late)
    assert found.member == "optax"
    # Without arguments for it there are no cases with weight decay.
    assert {case: found.departures[case][:2] for case in found.ulps} == dict.fromkeys(
        ["plain", "betas", "eps"], (17, 2)
    )


def sgd(lr, beta1, beta2, eps):
    return lambda param, grad: param - lr * grad


def returns(value):
    """Make an implementation whose steps return this function of the parameter."""
    return lambda lr, beta1, beta2, eps: lambda param, grad: value(param)


optax_plain = partial(plain, member="optax")
gives_nan, gives_two = returns(lambda param: param * np.nan), returns(lambda param: param[:2])
gives_half, gives_nothing = returns(lambda param: param.astype(np.float16)), returns(lambda param: None)
raises = returns(lambda param: 1 / 0)
number = 3


def without_eps(lr, beta1, beta2): ...


def no_step(lr, beta1, beta2, eps): ...


def no_make(lr, beta1, beta2, eps):
    raise KeyError("lr")


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("optax_plain", 0, "optax's, within "),
        ("late", 1, "none of the four; departs from optax's at\n  case plain: step 17, param[2]: 0.4665"),
        ("sgd", 1, "none of the four; departs from "),
        ("gives_nan", 2, "case plain, step 1 returned [nan, nan, nan]: expected finite numbers"),
        ("gives_two", 2, "case plain, step 1 returned float64 of shape (2,): expected the new parameter, float64 or"),
        ("gives_half", 2, "case plain, step 1 returned float16 of shape (3,): expected"),
        ("gives_nothing", 2, "case plain, step 1 returned object of shape (): expected"),
        ("raises", 2, "case plain, step 1 raised ZeroDivisionError: division by zero"),
        ("no_make", 2, "case plain: make raised KeyError: 'lr'"),
        ("no_step", 2, "case plain: make returned None: expected a function of parameter and gradient"),
        ("without_eps", 2, "make has no argument eps: expected make(lr, beta1, beta2, eps)"),
        ("number", 2, "3 is no function with a signature: expected make(lr, beta1, beta2, eps)"),
        ("missing", 2, "module test_conformance has no missing"),
    ],
)
def test_the_command_line_says_it_in_a_line(name, status, said, capsys):
    module = __name__.rpartition(".")[2]
    assert run(f"{module}:{name}") == status
    out, err = capsys.readouterr()
    assert (out if status < 2 else err).startswith(said if status < 2 else f"python -m nadam.conformance: {said}")
    assert not (err if status < 2 else out)


def run(argument):
    try:
        return main([argument])
    except SystemExit as error:
        return error.code


def test_the_command_line_as_a_user_calls_it(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_framework\n")
    for argument, said in {
        "broken:make": "cannot import broken: ModuleNotFoundError: No module named 'no_such_framework'",
        "no_such_module:make": "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
        "broken": "broken: expected module:name, such as my_module:make",
    }.items():
        command = [sys.executable, "-m", "nadam.conformance", argument]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"python -m nadam.conformance: {said}\n")


def test_the_python_in_its_page_runs(capsys):
    page = (Path(__file__).parent.parent / "docs" / "conformance.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "conformance.md", "exec"), {"__name__": "documentation"})
    (said,) = re.findall(r"print\(.*\)  # (.*)", block)
    assert capsys.readouterr().out == f"{said}\n"
