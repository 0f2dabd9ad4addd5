"""What JAX and optax do around an optimizer: transformations, programs that stay the same, wrappers, state."""

import warnings
from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax import numpy as jnp

from nadam.jax import NadamState, from_optax, fused, nadam, nadamw, to_optax
from nadam.jax.fused_step import WORTH_A_WARNING, warn_of_order

# optax takes 1 - b2**step from b2 as float32 has it: 1.3e-5 too little, relatively, at the first steps.
AS_OPTAX = {"rtol": 1e-4, "atol": 1e-5}
MAKERS = {"optax's": partial(nadam, 0.1), "torch's": partial(nadam, 0.1, momentum_decay=0.004)}
SETTINGS = {
    "plain": {},
    "everything": {
        "weight_decay": 0.1,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "skip_nonfinite": True,
    },
}


def params(dtype="float32"):
    return {"a": jnp.linspace(-1.0, 2.0, 6, dtype=dtype).reshape(2, 3), "b": jnp.asarray(0.5, dtype)}


def loss(tree):
    return sum(jnp.sum((leaf - 3.0) ** 2) for leaf in jax.tree.leaves(tree))


def close(one, other, rtol=1e-5, atol=1e-7):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def two_phases(optimizer):
    def step(tree, state, *given):
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    return optimizer.init, step


def whole(**settings):
    optimizer = fused(0.1, **settings)
    return optimizer.init, lambda tree, state, **given: optimizer.step(jax.grad(loss)(tree), state, tree, **given)


STEPS = {
    **{name: lambda make=make: two_phases(make()) for name, make in MAKERS.items()},
    **{f"fused, {name}": lambda settings=settings: whole(**settings) for name, settings in SETTINGS.items()},
}


@pytest.fixture(params=STEPS)
def pair(request):
    return STEPS[request.param]()


def looped(step, tree, state, count=4):
    for _ in range(count):
        tree, state = step(tree, state)
    return tree, state


def test_compiled_once(pair):
    init, step = pair
    traces = []

    def counted(tree, state):
        traces.append(1)
        return step(tree, state)

    compiled = jax.jit(counted)
    carry = looped(compiled, params(), jax.jit(init)(params()))
    assert len(traces) == 1
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(carry)]
    assert types == [jax.typeof(leaf) for leaf in jax.tree.leaves((params(), init(params())))]
    close(carry, looped(step, params(), init(params())))


def test_in_a_scan(pair):
    init, step = pair
    begin = params(), init(params())
    carry, _ = jax.jit(lambda carry: lax.scan(lambda c, _: (step(*c), None), carry, length=4))(begin)
    close(carry, looped(step, *begin))


def test_an_ensemble(pair):
    init, step = pair
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1.0, -leaf]), params())
    carry = many, jax.vmap(init)(many)
    for _ in range(4):
        carry = jax.jit(jax.vmap(step))(*carry)
    for i in range(3):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], carry), looped(step, single, init(single)))


def test_an_ensemble_of_learning_rates():
    def after(rate):
        init, step = two_phases(nadam(rate))
        return looped(step, params(), init(params()))[0]

    found = jax.jit(jax.vmap(after))(jnp.array([0.1, 0.2, -0.1]))
    close(jax.tree.map(lambda leaf: leaf[1], found), after(0.2))
    assert all(np.isnan(leaf[2]).all() for leaf in jax.tree.leaves(found))  # a rate out of its range is not silent


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_gradient_through_fused(settings):
    init, step = whole(**settings)

    def after(rate):
        tree, state = params(), init(params())
        for _ in range(4):
            tree, state = step(tree, state, learning_rate=rate)
        return loss(tree)

    difference = (after(0.1 + 1e-3) - after(0.1 - 1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(after)(0.1), difference, rtol=2e-2)
    np.testing.assert_allclose(jax.jit(jax.grad(after))(0.1), difference, rtol=2e-2)
    np.testing.assert_allclose(jax.jvp(after, (0.1,), (1.0,))[1], difference, rtol=2e-2)


@pytest.mark.parametrize("eps_root", [0.0, 1e-6])
def test_a_gradient_through_updates(eps_root):
    def after(rate, start):
        init, step = two_phases(nadamw(rate, eps_root=eps_root, momentum_decay=1.0))
        return loss(looped(step, start, init(start))[0])

    by_rate, by_start = jax.jit(jax.grad(after, argnums=(0, 1)))(0.1, params())
    np.testing.assert_allclose(by_rate, (after(0.101, params()) - after(0.099, params())) / 2e-3, rtol=2e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_start))


def test_strict_promotion_and_no_nan_on_the_way(pair):
    init, step = pair
    expected = looped(step, params(), init(params()))
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        for compiled in (step, jax.jit(step)):
            close(looped(compiled, params(), init(params())), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "float32"])
def test_dtypes(dtype, mu_dtype):
    optimizer = nadam(0.1, mu_dtype=mu_dtype)
    state = optimizer.init(params(dtype))
    for _ in range(2):
        updates, state = optimizer.update(params(dtype), state, params(dtype))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {dtype}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].mu)} == {mu_dtype or "float32"}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].nu)} == {"float32"}


def test_weak_types_are_kept():
    tree = {"a": jnp.asarray(1.0), "b": 2.0}
    optimizer = nadam(0.1)
    assert jax.typeof(tree["a"]).weak_type
    begin = optimizer.init(tree)
    updates, state = optimizer.update(tree, begin, tree)
    assert jax.tree.map(jax.typeof, (updates, state)) == jax.tree.map(jax.typeof, (tree, begin))
    whole = fused(0.1)
    begin = whole.init(tree)
    new, state = whole.step(tree, begin, tree)
    assert jax.tree.map(jax.typeof, (new, state)) == jax.tree.map(jax.typeof, (tree, begin))


WRAPPERS = {
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(learning_rate=0.1),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(0.1), optax.scale(0.5)),
    "multi_transform": lambda make: optax.multi_transform({"x": make(0.1), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    "masked": lambda make: optax.masked(make(0.1), {"a": True, "b": False}),
    "MultiSteps": lambda make: optax.MultiSteps(make(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.1), 3),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_the_wrappers_of_optax(name):
    results = []
    for make in (nadam, optax.nadam):
        init, step = two_phases(WRAPPERS[name](make))
        results.append(looped(jax.jit(step), params(), init(params()), 6))
    close(*results, **AS_OPTAX)


def test_an_injected_momentum_decay():
    make = optax.inject_hyperparams(nadam)
    init, step = two_phases(make(learning_rate=0.1, momentum_decay=0.004))
    plain = two_phases(nadam(0.1, momentum_decay=0.004))
    close(looped(jax.jit(step), params(), init(params()))[0], looped(plain[1], params(), plain[0](params()))[0])


def test_the_state_as_a_tree():
    state = nadam(0.1).init(params())
    assert int(optax.tree_utils.tree_get(state, "count")) == 0
    state = optax.tree_utils.tree_set(state, count=jnp.int32(7))
    assert int(optax.tree_utils.tree_get(state, "count")) == 7
    state = optax.tree_utils.tree_set(fused(0.1).init(params()), count=jnp.int32(7))
    assert int(state.count) == 7


@pytest.mark.parametrize("decay", [None, 0.004])
@pytest.mark.parametrize("make", [nadamw, fused])
def test_to_optax_and_back_in_the_middle_of_a_run(make, decay):
    settings = {"momentum_decay": decay, "weight_decay": 0.1}
    if make is fused:
        init, step = whole(**settings)
    else:
        init, step = two_phases(nadamw(0.1, **settings))
    expected = looped(step, params(), init(params()), 6)
    tree, state = looped(step, params(), init(params()), 3)
    theirs = to_optax(state, tree)
    if make is nadamw:
        assert jax.tree.structure(theirs) == jax.tree.structure(optax.nadamw(0.1).init(tree))
    back = from_optax(theirs, init(tree), momentum_decay=decay)
    if make is fused:  # which knows more of the last step than optax keeps
        back = back._replace(last_step=state.last_step)
    close(looped(step, tree, back, 3), expected)


def test_goes_on_from_optax_and_optax_goes_on_from_it():
    runs = {}
    for first in (nadam, optax.nadam):
        for second in (nadam, optax.nadam):
            init, step = two_phases(first(0.1))
            carry = looped(step, params(), init(params()), 5)
            runs[first, second] = looped(two_phases(second(0.1))[1], *carry, 5)
    for carry in runs.values():
        close(carry, runs[optax.nadam, optax.nadam], **AS_OPTAX)


def test_state_of_half_precision_is_widened():
    tree = params("bfloat16")
    stock = optax.nadam(0.1)
    _, theirs = stock.update(tree, stock.init(tree), tree)
    ours = from_optax(theirs, nadam(0.1).init(tree))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours[0].mu)} == {"float32"}
    assert jax.tree.map(jax.typeof, to_optax(ours, tree)) == jax.tree.map(jax.typeof, theirs)


def test_accumulation_goes_on_from_optax():
    like = fused(0.1, gradient_accumulation_steps=3).init(params())
    stock = optax.nadam(0.1)
    _, theirs = stock.update(params(), stock.init(params()), params())
    state = from_optax(theirs, like, gradient_accumulation_steps=3)
    assert (int(state.count), int(state.last_step.step)) == (3, 1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=None: expected that of"):
        from_optax(theirs, like)


def test_the_state_with_a_finite_momentum_decay():
    state = nadam(0.1, momentum_decay=1.0).init(params())
    assert isinstance(state[0], NadamState)
    assert float(state[0].mu_product) == 1.0
    _, state = nadam(0.1, momentum_decay=1.0).update(params(), state, params())
    assert float(state[0].mu_product) == pytest.approx(0.9 * (1 - 0.5 * 0.96))


DIRECTLY, IN_A_FUNCTION = "compiled itself", "called by what is compiled"


@pytest.mark.parametrize("elements", [WORTH_A_WARNING, WORTH_A_WARNING - 1])
@pytest.mark.parametrize("way", [DIRECTLY, IN_A_FUNCTION])
def test_a_warning_where_the_state_of_a_large_tree_is_copied(way, elements):
    optimizer = fused(0.1)
    tree = {"a": jax.ShapeDtypeStruct((elements - 3,), "float32"), "b": jax.ShapeDtypeStruct((3,), "float32")}
    state = jax.eval_shape(optimizer.init, tree)
    warn_of_order.cache_clear()  # it comes once in a process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == DIRECTLY:
            jax.jit(optimizer.step, donate_argnums=(1, 2)).lower(tree, state, tree)
        else:
            step = jax.jit(lambda params, state, grads: optimizer.step(grads, state, params), donate_argnums=(0, 1))
            step.lower(tree, state, tree)
    told = [warning for warning in caught if "XLA copies the state" in str(warning.message)]
    assert len(told) == (way == DIRECTLY and elements == WORTH_A_WARNING)
