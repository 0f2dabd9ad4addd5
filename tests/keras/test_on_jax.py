"""What only the JAX backend does: the CPU's kernels inside compiled steps."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import nadam.keras
from faults.bad_input import GRADS, built, same

if keras.backend.backend() != "jax":
    pytest.skip("the JAX backend", allow_module_level=True)

import jax


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, ["one_pass"]),
        ({"global_clipnorm": 1.0, "use_ema": True}, ["one_pass", "measure"]),
        ({"skip_nonfinite": True, "gradient_accumulation_steps": 2}, ["one_pass", "measure"]),
    ],
    ids=str,
)
def test_a_compiled_step_calls_the_kernels_and_copies_nothing(settings, kernels):
    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in [(300, 500), (500,)]]
    optimizer = nadam.keras.Nadam(**settings)
    optimizer.build(variables)
    state = [[v.value for v in variables], [v.value for v in optimizer.variables]]
    step = jax.jit(lambda values, own, grads: optimizer.stateless_apply(own, grads, values), donate_argnums=(0, 1))
    lowered = step.lower(*state, [v.value * 2 for v in variables])
    assert all(f"nadam-{kernel}" in lowered.as_text() for kernel in kernels)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 150_000 * 4 / 8


def test_the_loop_in_the_documentation_works_in_place():
    page = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
    (block,) = [each for each in re.findall(r"```python[^\n]*\n(.*?)```", page, re.DOTALL) if "donate_argnums" in each]
    names = {"__name__": "documentation"}
    exec(compile(block, "keras.md", "exec"), names)
    state, inputs = names["state"], names["inputs"]
    assert int(names["optimizer"].iterations) == 3
    compiled = names["train_step"].lower(state, inputs, inputs[:, :1]).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(value.nbytes for each in state for value in each)


def test_an_interrupt_between_the_variables_leaves_a_step_that_is_whole(monkeypatch):
    host, twin = built("keras jax", use_ema=True), built("keras jax", use_ema=True)
    assign, interrupted = keras.Variable.assign, 0
    for moment in range(20):
        calls = []

        def at_one(variable, value, calls=calls, moment=moment):
            calls.append(variable)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt
            return assign(variable, value)

        twin.step(GRADS)
        monkeypatch.setattr(keras.Variable, "assign", at_one)
        try:
            host.step(GRADS)
        except KeyboardInterrupt:
            interrupted += 1
        monkeypatch.undo()
        assert same(host.state(), twin.state())
    assert interrupted == 10  # two variables with three tensors of state each, and two counters
