"""Several devices give the numbers of one: keras.distribution on JAX, tf.distribute on TensorFlow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from distributed_run import BATCH, CASES, DEVICES, EPOCHS, SETTINGS, STEPS, draw
from test_fit import gradients

from reference import Reference

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.skipif(BACKEND not in CASES, reason=f"Keras does not distribute on {BACKEND}")
RUN = Path(__file__).with_name("distributed_run.py")
CASE = pytest.mark.parametrize(
    "case", [f"{where} {name}" for where, names in CASES.get(BACKEND, {}).items() for name in names]
)
HANGS = 300  # seconds, many times what it takes


@pytest.fixture(scope="module")
def results():
    """What each case gave; after one that hangs or fails, the rest is missing."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, str(RUN)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            errors += "\nIt hung."
    return {**dict(json.loads(line) for line in output.splitlines()), "errors": errors[-3000:]}


def found(results, case):
    assert case in results, results["errors"]
    return results[case]


@CASE
def test_the_numbers_are_those_of_one_device(results, case):
    name = case.split()[-1]
    weights, x, y = draw(name)
    rate = {"learning_rate": lambda calls: 0.02 / (calls + 1)} if name == "callable" else {}
    reference = Reference(weights, **SETTINGS[name], **rate)
    for at in EPOCHS * list(range(0, len(x), BATCH)):
        rows = slice(at, at + BATCH)
        reference.step(gradients(reference.p, x[rows].astype("float64"), y[rows].astype("float64")))
    expected = reference.ema if SETTINGS[name].get("use_ema") else reference.p
    for ours, theirs in zip(found(results, case)["weights"], expected, strict=True):
        # A gradient is a sum of float32 products that partly cancel; a step divides its size out and leaves that error.
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-5 * 0.02 * STEPS)


@CASE
def test_all_devices_count_as_one(results, case):
    name, result = case.split()[-1], found(results, case)
    calls, skipped = EPOCHS * STEPS, EPOCHS if name == "skip" else 0
    assert result["skipped"] == skipped
    assert result["updates"] == (calls - skipped) // SETTINGS[name].get("gradient_accumulation_steps", 1)
    assert result["calls"] == (calls if name == "callable" else 0)


@CASE
def test_the_state_lies_where_its_variables_do(results, case):
    result = found(results, case)
    assert result["alike"]  # sharded alike on JAX, copies with the same bits on TensorFlow
    if BACKEND == "jax":
        kind, count, _ = case.split()
        assert result["used"] == [int(count)] * 2
        assert result["split"] == [kind == "model"] * 2
