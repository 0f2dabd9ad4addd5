"""Bad input and faults: refused by name before anything is traced; within a compiled step never silent."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from nadam import checkpoint
from nadam.jax import Fused, from_optax, fused, nadam, nadamw

MAKERS = {"nadam": nadam, "nadamw": nadamw, "fused": fused}


def tree(value=1.0, dtype="float32", shape=(3, 2)):
    return {"w": jnp.full(shape, value, dtype)}


def calling(optimizer):
    """The function that a step calls, with gradients, state and parameters."""
    return optimizer.step if isinstance(optimizer, Fused) else optimizer.update


def moved(make, params, grads, state=None, **settings):
    """Parameters after one step."""
    optimizer = make(**{"learning_rate": 0.01, **settings})
    state = optimizer.init(params) if state is None else state
    result, state = calling(optimizer)(grads, state, params)
    return (result if make is fused else optax.apply_updates(params, result)), state


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_no_number_or_out_of_its_range(make):
    with pytest.raises(TypeError, match="eps='x': expected a number"):
        make(0.1, eps="x")
    if make is not fused:
        with pytest.raises(ValueError, match=r"^eps_root=-1.0: expected 0 <= eps_root < inf"):
            make(0.1, eps_root=-1.0)


def test_loss_scale():  # row 3
    optimizer = fused(0.1)
    state = optimizer.init(tree())
    for scale in (0.0, -1.0, inf):
        with pytest.raises(ValueError, match=f"loss_scale={scale}: expected 0 < loss_scale < inf"):
            optimizer.step(tree(), state, tree(), loss_scale=scale)
    params, _ = jax.jit(lambda scale: optimizer.step(tree(), state, tree(), loss_scale=scale))(0.0)
    assert np.isnan(params["w"]).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("bad", [-0.1, nan, inf])
def test_a_schedule_that_leaves_the_range(make, bad):  # row 5
    optimizer = make(lambda count: jnp.where(count < 1, 0.1, bad))
    state = optimizer.init(tree())
    _, state = calling(optimizer)(tree(), state, tree())
    with pytest.raises(ValueError, match=r"^learning_rate=.*: expected 0 <= learning_rate < inf"):
        calling(optimizer)(tree(), state, tree())
    result, _ = jax.jit(calling(optimizer))(tree(), state, tree())  # cannot raise, and must not be silent
    assert np.isnan(result["w"]).all()


def test_an_injected_number_out_of_its_range():  # row 5
    optimizer = optax.inject_hyperparams(nadamw)(learning_rate=0.1)
    for name in ("learning_rate", "b1", "b2", "eps", "weight_decay"):
        state = optimizer.init(tree())
        state.hyperparams[name] = jnp.float32(-0.5)
        updates, _ = jax.jit(optimizer.update)(tree(), state, tree())
        assert np.isnan(updates["w"]).all()
        with pytest.raises(ValueError, match=f"{name}=-0.5: expected 0 <= {name}"):
            optimizer.update(tree(), state, tree())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("value", [nan, inf])
def test_gradients_that_are_not_finite(make, value):  # row 7
    params, _ = moved(make, tree(), tree(value))
    assert np.isnan(params["w"]).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [nan, inf, 1e25])
def test_skipping(compiled, value):  # rows 7 and 9
    optimizer = fused(0.1, skip_nonfinite=True, use_ema=True)
    step = jax.jit(optimizer.step) if compiled else optimizer.step
    params, state = step(tree(0.5), optimizer.init(tree()), tree())
    after, new = step(tree(value), state, params)
    for name in ("count", "mu", "nu", "mu_product", "ema"):
        assert all(map(np.array_equal, jax.tree.leaves(getattr(new, name)), jax.tree.leaves(getattr(state, name))))
    assert np.array_equal(after["w"], params["w"])
    assert (int(new.last_step.skipped_steps), bool(new.last_step.skipped)) == (1, True)
    _, new = step(tree(0.5), new, after)
    assert (int(new.last_step.skipped_steps), bool(new.last_step.skipped), int(new.count)) == (1, False, 2)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("value", "expected"), [(1e-5, 0.99), (0.0, 1.0), (300.0, 0.99)])
def test_float16(make, value, expected):  # row 8
    settings = {"momentum_decay": 1.0, **({"weight_decay": 0.0} if make is nadamw else {})}
    params, _ = moved(make, tree(1.0, "float16"), tree(value, "float16"), **settings)
    np.testing.assert_allclose(params["w"], expected, atol=2e-3)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_large_gradients_are_clipped_right(clip):  # row 9
    params, _ = moved(fused, tree(), tree(1e25), **{clip: 1.0})
    expected, _ = moved(fused, tree(), tree(1.0), **{clip: 1.0})
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_empty_trees_and_arrays(make):  # row 12
    for params in ({}, [], (), {"x": None}, {"a": jnp.ones(()), "b": jnp.zeros((0, 3))}):
        result, _ = moved(make, params, params)
        assert jax.tree.structure(result) == jax.tree.structure(params)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("leaf", [
    jnp.ones(2, "int32"), jnp.ones(2, bool), 3, "text", np.ones(2, object), jax.random.key(0)
], ids=lambda leaf: type(leaf).__name__ + str(getattr(leaf, "dtype", "")))  # fmt: skip
def test_parameters_that_are_not_floating_point_numbers(make, leaf):  # row 16
    with pytest.raises(TypeError, match=r"params\['w'\]: .*, expected float16, bfloat16, float32 or float64"):
        make(0.1).init({"w": leaf})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_that_are_not_real_numbers(make):  # rows 16, 17 and 20
    optimizer = make(0.1)
    for dtype in ("int32", "complex64"):
        with pytest.raises(TypeError, match="expected real floating-point numbers"):
            calling(optimizer)(tree(1, dtype), optimizer.init(tree()), tree())
    # Of another width they are right.
    expected, _ = moved(make, tree(), tree(0.5))
    for dtype in ("float16", "bfloat16"):
        found, _ = moved(make, tree(), tree(0.5, dtype))
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arrays_of_another_byte_order_and_masked_ones(make):  # row 19
    optimizer, params = make(0.1), {"w": jnp.ones(3)}
    state, masked = optimizer.init(params), np.ma.masked_array(np.ones(3, np.float32), [0, 1, 0])
    for grad in (np.ones(3, ">f4"), masked):  # within jit only where its program is not compiled yet, and then by JAX
        with pytest.raises((TypeError, ValueError), match=r"abstract array|JAX|masked"):
            calling(optimizer)({"w": grad}, state, params)
    for param, named in ((np.ones(3, ">f4"), ">f4"), (masked, "a masked array")):
        with pytest.raises(TypeError, match=rf"params\['w'\]: {named}, expected float16"):
            optimizer.init({"w": param})


def test_weight_decay_without_parameters():
    with pytest.raises(ValueError, match="params: weight decay needs them"):
        nadamw(0.1).update(tree(), nadamw(0.1).init(tree()))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_gradient_after_the_step(make):  # row 11
    grads = tree(0.5)
    moved(make, tree(), grads)
    assert np.array_equal(grads["w"], tree(0.5)["w"])


def test_state_that_does_not_fit():  # row 23
    good = optax.nadam(0.1).init(tree())
    like = nadam(0.1).init(tree())
    for bad, message in (
        (optax.nadam(0.1).init(tree(shape=(2, 3))), r"state \(mu\)\['w'\]: shape \(2, 3\), expected that of like"),
        (optax.nadam(0.1).init({"v": jnp.ones((3, 2))}), r"state \(mu\): its structure"),
        (optax.sgd(0.1, momentum=0.9).init(tree()), "expected one ScaleByAdamState in it, found 0"),
        ((good[0]._replace(nu=tree(nan)), good[1]), r"state \(nu\): it holds NaN or infinity"),
        ((good[0]._replace(count=jnp.int32(-1)), good[1]), r"state \(count\): -1, expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            from_optax(bad, like)
    for make in MAKERS.values():
        optimizer = make(0.1)
        other = optimizer.init(tree(shape=(2, 3)))
        with pytest.raises(ValueError, match=r"\(mu\)|state.mu"):
            calling(optimizer)(tree(), other, tree())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_of_another_optimizer(make):  # row 23
    optimizer = make(0.1)
    others = [None, {}, (), optax.sgd(0.1).init(tree()), optax.adagrad(0.1).init(tree())]
    others += [other(0.1).init(tree()) for other in MAKERS.values() if other is not make]
    others.append(make(0.1, **({"use_ema": True} if make is fused else {"momentum_decay": 1.0})).init(tree()))
    for state in others:
        with pytest.raises(ValueError, match=r"state(\.\w+)?: "):
            calling(optimizer)(tree(), state, tree())


def test_settings_that_do_not_fit_a_state():  # row 23
    state = fused(0.1).init(tree())
    for settings in ({"use_ema": True}, {"gradient_accumulation_steps": 2}, {"clipnorm": 1.0}):
        with pytest.raises(ValueError, match="of an optimizer with other settings: there is none"):
            fused(0.1, **settings).step(tree(), state, tree())


@pytest.mark.parametrize("make", [nadamw, fused])
def test_a_mask_of_another_structure(make):
    optimizer = make(0.1, weight_decay=0.1, mask={"x": True})
    with pytest.raises(ValueError, match="mask: its structure is not that of the parameters"):
        calling(optimizer)(tree(), optimizer.init(tree()), tree())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_wide_state_beside_narrow_parameters_stays_wide(make):  # row 24
    params, state = moved(make, tree(1.0, "bfloat16"), tree(1.0, "bfloat16"))
    for _ in range(2):
        params, state = moved(make, params, params, state)
        leaves = jax.tree.leaves(state if make is fused else state[0])
        assert {leaf.dtype.name for leaf in leaves} <= {"float32", "int32", "bool"}


def saved(path):
    """A run of five calls, and its file."""
    optimizer = fused(0.01, use_ema=True, gradient_accumulation_steps=2, global_clipnorm=1.0)
    params = tree(1.5, "bfloat16")
    step = jax.jit(optimizer.step)
    carry = params, optimizer.init(params)
    for _ in range(5):
        carry = step(carry[0], carry[1], carry[0])
    checkpoint.save(path, {"leaves": jax.tree.leaves(carry)})
    return step, carry


def test_a_file_of_ours_resumes(tmp_path):  # row 28
    step, carry = saved(tmp_path / "run.nadam")
    leaves = checkpoint.load(tmp_path / "run.nadam")["leaves"]
    other = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    for _ in range(3):
        carry, other = step(carry[0], carry[1], carry[0]), step(other[0], other[1], other[0])
    for one, two in zip(jax.tree.leaves(carry), jax.tree.leaves(other), strict=True):
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)


def test_one_flipped_bit_or_a_cut_is_refused(tmp_path):  # row 29
    path = tmp_path / "run.nadam"
    saved(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 50, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        for wrong in (bytes(damaged), content[:place]):
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match="damaged"):
                checkpoint.load(path)


def test_threads():  # rows 27 and 31
    optimizer = fused(0.01, global_clipnorm=1.0)
    params = {"w": jnp.linspace(-1.0, 1.0, 1 << 19)}
    step = jax.jit(optimizer.step)

    def run(_):
        carry = params, optimizer.init(params)
        for _ in range(3):
            carry = step(carry[0], carry[1], carry[0])
        return np.asarray(carry[0]["w"]).tobytes()

    serial = run(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(run, range(8))) == {serial}


def test_an_interrupt_leaves_what_was_there():  # rows 25 and 32: arrays do not change, so the old ones are whole
    program = """
import jax, json, signal, sys, time
from jax import numpy as jnp
from nadam.jax import fused
optimizer = fused(0.01)
params = {"w": jnp.ones(1 << 22)}
state = optimizer.init(params)
step = jax.jit(optimizer.step)
done, kept = 0, (params, state)
step(params, state, params)
try:
    print("ready", flush=True)
    while True:
        kept = jax.block_until_ready(step(params, *kept[::-1]))
except KeyboardInterrupt:
    asked = time.monotonic()
params, state = kept
print(json.dumps([int(state.count), bool(jnp.isfinite(params["w"]).all())]))
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    count, finite = json.loads(out)
    assert count >= 0
    assert finite


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("name", "meant"), [
    ("betas", "b1, b2"), ("beta_1", "b1"), ("lr", "learning_rate"), ("epsilon", "eps"), ("psi", "momentum_decay"),
    ("bias_corection", "bias_correction"),
])  # fmt: skip
def test_an_unknown_argument_names_the_one_that_is_meant(make, name, meant):
    message = rf"^{make.__name__}\(\) got an unexpected keyword argument '{name}': did you mean {meant}\?$"
    with pytest.raises(TypeError, match=message):
        make(0.1, **{name: 1})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("value", [True, np.True_, jnp.array(True)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["learning_rate", "b1", "eps", "momentum_decay", "weight_decay"])
def test_a_bool_for_a_number(make, name, value):
    if make is nadam and name == "weight_decay":
        return
    with pytest.raises(TypeError, match=f"^{name}=.*True.*: expected a number"):
        make(**{"learning_rate": 0.1, name: value})


class Model:
    """What Flax and Equinox have: it is called with inputs."""

    def __call__(self, inputs):
        return inputs


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("params", [Model(), {"layer": {"activation": jax.nn.relu}}], ids=["model", "function within"])
def test_a_model_for_its_parameters(make, params):
    with pytest.raises(
        TypeError, match=r"^params.*; of a model give its arrays: model.init\(\.\.\.\) of Flax, nnx.state"
    ):
        make(0.1).init(params)
