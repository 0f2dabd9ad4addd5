"""Several devices, and two processes, give what one device gives, with state that lies where its parameters do."""

import jax
import numpy as np
import pytest
import sharded_run
from jax_training import assert_close, finish, free_address, read, start
from sharded_run import BETWEEN, OPTIMIZERS, SPECS, STEPS, WAYS, draw, train

# Sums over devices add up in another order, which a mean of inputs and a norm see by a few ulps. Parameters are near 1,
# moments below it.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
CASES = [(way, name) for way, names in WAYS.items() for name in names]
PAIRS = [(between, name) for between, (_, names) in BETWEEN.items() for name in names]


@pytest.fixture(scope="module")
def alone():
    """Parameters, state and the rest on one device."""
    return {name: train(name) for name in OPTIMIZERS}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    finish(start(8, "ways", folder))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes with two devices each."""
    folder, address = tmp_path_factory.mktemp("pair"), free_address()
    finish(*[start(2, "process", folder, rank, address) for rank in range(2)])
    return folder


def compare(found, expected):
    params, state, seen = found
    if any(leaf.dtype == "int8" for leaf in state):  # of which such an ulp may change a code, and what follows from it
        for one, other in zip(params + state, jax.tree.leaves(expected[:2]), strict=True):
            assert np.isclose(np.float64(one), np.float64(other), **TOLERANCE).mean() > 0.999
    else:
        assert_close(params, expected[0], **TOLERANCE)
        assert_close(state, expected[1], **TOLERANCE)
    np.testing.assert_allclose(seen["norms"], expected[2]["norms"], rtol=1e-6)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_the_numbers_are_those_of_one_device(alone, ways, way, name):
    compare(read(ways / f"{way} {name}.npz"), alone[name])


@pytest.mark.parametrize(("way", "name"), CASES)
def test_state_lies_where_its_parameters_do_and_stays_there(ways, way, name):
    params, state, seen = read(ways / f"{way} {name}.npz")
    split = np.array([leaf.shape in SPECS for leaf in (*params, *state)])
    assert split.sum() >= 3 * len(params)
    assert seen["placed before"][split].all()
    assert seen["placed after"].all()


@pytest.mark.parametrize(("way", "name"), CASES)
def test_later_calls_are_the_same_program(ways, way, name):
    compiled = read(ways / f"{way} {name}.npz")[2]["compiled"]
    # On an explicit mesh JAX spells specs out: what began as P("x") comes back as P("x", None).
    assert compiled <= (2 if way == "explicit" else 1)


@pytest.mark.parametrize(("between", "name"), PAIRS)
def test_two_processes_equal_one(alone, pair, between, name):
    first, second = (read(pair / f"{between} {name} {rank}.npz") for rank in range(2))
    assert first[2]["placed after"].all()
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        np.testing.assert_array_equal(one, other)
    compare(first, alone[name])


def test_the_norm_is_that_of_all_gradients(alone):
    """Or several devices could agree with one on a wrong number."""
    params, batches = draw("fused")
    grads = [params[key].astype("float64") - batches[0][key].mean(axis=0, dtype="float64") for key in params]
    expected = np.sqrt(sum((grad**2).sum() for grad in grads))
    assert alone["fused"][2]["norms"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["chain", "fused", "accumulated"])
def test_clipping_shows(alone, monkeypatch, name):
    """Or the comparisons above would not notice a wrong norm."""
    monkeypatch.setattr(sharded_run, "CLIP", 0.55)
    others, _, _ = train(name)
    apart = [np.abs(one - other).max() for one, other in zip(alone[name][0].values(), others.values(), strict=True)]
    assert min(apart) > 100 * TOLERANCE["atol"]


def test_the_runs_skip_and_accumulate(alone):
    last = alone["skip"][1].last_step
    assert (last.step, last.skipped_steps) == (STEPS - 1, 1)
    assert alone["accumulated"][1].last_step.step == STEPS // 2
