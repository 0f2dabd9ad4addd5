"""The rows of the table in SEMANTICS.md that are about the numbers of one optimizer, each as Keras documents it."""

import json

import keras
import numpy as np
import pytest
from test_numbers import BACKEND, FIRST_COMPILED, ROUTES, numpy, tensors, variables_of

from cases import DTYPES, apart, draw_grads, draw_params, same_bits
from nadam.keras import Nadam
from reference import Reference

every_route = pytest.mark.parametrize("route", ROUTES)
two_routes = pytest.mark.parametrize("route", ["apply", FIRST_COMPILED])


def draw(count, dtype="float32", shapes=((3, 4), (5,))):
    rng = np.random.default_rng(1)
    params = draw_params(rng, shapes, DTYPES[dtype])
    return params, [draw_grads(rng, params) for _ in range(count)]


def beside(route, settings, params, **exact):
    """An optimizer, its variables, the reference (with ``exact`` settings), and a step of both, which are compared."""
    optimizer, variables = Nadam(**settings), variables_of(params)
    reference, step = Reference(params, **{**settings, **exact}), ROUTES[route](optimizer, variables)

    def both(grads):
        step(grads)
        reference.step(grads)
        assert_follows(variables, reference)

    return optimizer, variables, reference, both


def assert_follows(variables, reference):
    """A unit for each step, and 2 for its terms, of numbers as large as a parameter has been."""
    for variable, exact in zip(variables, reference.p, strict=True):
        scale = np.maximum(np.abs(exact), 2.0)
        assert apart(*numpy([variable]), exact, scale, DTYPES[variable.dtype]) <= 2.0 + reference.i


def all_same(ours, theirs):
    return all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@keras.saving.register_keras_serializable("tests")
def constant():
    return 0.7


@every_route
def test_row_1_callable_betas_are_called_at_every_step(route):
    params, all_grads = draw(6)
    first, second = [0.9, 0.5, 0.8, 0.2, 0.95, 0.6], [0.9, 0.99, 0.5, 0.999, 0.7, 0.8]
    left = iter(first), iter(second)
    settings = {"learning_rate": 0.0625, "beta_1": lambda: next(left[0]), "beta_2": lambda: next(left[1])}
    *_, step = beside(route, settings, params, beta_1=first.__getitem__, beta_2=second.__getitem__)
    for grads in all_grads:
        step(grads)
    assert [next(rest, None) for rest in left] == [None, None]


@pytest.mark.parametrize("kind", ["callable", "tensor", "variable"])
def test_rows_1_and_2_computed_numbers_are_saved_loaded_and_train(kind):
    number = {"callable": constant, "tensor": keras.ops.convert_to_tensor(0.7), "variable": keras.Variable(0.7)}[kind]
    optimizer = Nadam(number, beta_1=number, beta_2=number)
    exact = 0.7 if kind == "callable" else float(np.float32(0.7))
    configs = [json.loads(json.dumps(x)) for x in (optimizer.get_config(), keras.optimizers.serialize(optimizer))]
    params, all_grads = draw(3, shapes=((5,),))
    for each in (optimizer, Nadam.from_config(configs[0]), keras.optimizers.deserialize(configs[1])):
        variables, reference = variables_of(params), Reference(params, exact, exact, exact)
        for grads in all_grads:
            reference.step(grads)
            each.apply(tensors(grads), variables)
        assert_follows(variables, reference)


@every_route
def test_row_2_a_learning_rate_callable_is_called_at_every_step(route):
    params, all_grads = draw(8)
    rates, calls = [0.5, 0.03125, 0.25, 0.0, 0.125, 0.0625, 0.015625, 1.0], []

    def rate():
        calls.append(len(calls))
        return rates[calls[-1]]

    *_, step = beside(route, {"learning_rate": rate}, params, learning_rate=rates.__getitem__)
    for grads in all_grads:
        step(grads)
    assert calls == list(range(8))


SCALARS = {"int": lambda: 1, "np.float32": lambda: np.float32(0.5), "np.int64": lambda: np.int64(1)}
SCALARS |= {"0-d array": lambda: np.array(0.5), "variable": lambda: keras.Variable(0.5)}
SCALARS |= {"tensor": lambda: keras.ops.convert_to_tensor(0.5)}


@pytest.mark.parametrize("kind", SCALARS)
def test_row_3_a_learning_rate_is_any_real_scalar(kind):
    given, exact = SCALARS[kind](), 1.0 if "int" in kind else 0.5
    params, (grads,) = draw(1, shapes=((5,),))
    optimizer, *_, step = beside("apply", {"learning_rate": given}, params, learning_rate=exact)
    step(grads)
    optimizer.learning_rate = 0.25
    optimizer.learning_rate = given
    assert numpy([optimizer.learning_rate]) == [exact]


@two_routes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_5_and_6_half_precision_is_computed_in_float32(route, dtype):
    params, all_grads = draw(20, dtype)
    optimizer, variables, reference, step = beside(route, {"learning_rate": 0.0625, "weight_decay": 0.125}, params)
    for grads in all_grads:
        step([(g * 2.0**-13).astype(g.dtype) for g in grads])  # float16 would lose their squares
        reference.p = [p.astype(DTYPES[dtype]).astype(np.float64) for p in reference.p]
    assert [v.dtype for v in variables] == [dtype] * 2
    for variable, exact in zip(variables, reference.p, strict=True):
        # The float32 value may lie on the other side of a tie, once or twice in 20 steps.
        assert apart(*numpy([variable]), exact, exact, DTYPES[dtype]) <= 2.0
    state = [*optimizer._momentums, *optimizer._velocities, optimizer._momentum_product]
    assert {v.dtype for v in state} == {"float32"}


@two_routes
def test_row_7_with_accumulation_the_average_moves_once_per_update(route):
    params, all_grads = draw(9)
    settings = {"gradient_accumulation_steps": 3, "use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2}
    optimizer, variables, reference, step = beside(route, settings, params)
    optimizer.build(variables)
    averages = optimizer._model_variables_moving_average
    for i, grads in enumerate(all_grads):
        before = numpy([*variables, *averages])
        step(grads)
        assert all_same(before, numpy([*variables, *averages])) == ((i + 1) % 3 != 0)
        for ours, exact in zip(numpy(averages), reference.ema, strict=True):
            np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6)
        # Equal at the start, after the first update, and after the second, which overwrites.
        assert all_same(numpy(averages), numpy(variables)) == (i < 8)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@every_route
def test_row_9_a_missing_gradient_counts_as_zero_in_its_window(route):
    params, all_grads = draw(12)
    settings = {"learning_rate": 0.0625, "weight_decay": 0.25, "gradient_accumulation_steps": 3, "epsilon": 0.1}
    _, variables, _, step = beside(route, settings, params)
    history = []
    for i, grads in enumerate(all_grads):
        # The first of a window, the middle one, the last, and then the whole window, in which nothing of it may move.
        step([None if i in (0, 4, 8, 9, 10, 11) else grads[0], grads[1]])
        history.append(numpy(variables))
    assert [same_bits(a, b) for a, b in zip(history[8], history[11], strict=True)] == [True, False]


@pytest.mark.skipif(BACKEND != "torch", reason="compiled programs know of a gradient by its accumulator alone")
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_gradient_of_zeros_counts_as_seen():
    params, _ = draw(1)
    settings = {"learning_rate": 0.0625, "weight_decay": 0.25, "gradient_accumulation_steps": 2}
    _, variables, _, step = beside("apply", settings, params)
    before = numpy(variables)
    one = np.ones_like(params[1])
    step([np.zeros_like(params[0]), one])
    step([None, one])  # the decay of 1/64 all the same
    np.testing.assert_allclose(numpy(variables)[0], before[0] * (1 - 0.25 * 0.0625), rtol=1e-6)
    before = numpy(variables)
    step([None, one])
    step([None, one])
    assert same_bits(numpy(variables)[0], before[0])


@two_routes
def test_row_10_a_nan_does_not_stay_in_the_accumulator(route):
    params, all_grads = draw(4)
    optimizer, variables, _, step = beside(route, {"gradient_accumulation_steps": 2}, params)
    for i, grads in enumerate(all_grads):
        step([np.full_like(grads[0], np.nan) if i == 0 else grads[0], grads[1]])
        if i % 2:
            assert all(np.array_equal(a, np.zeros_like(a)) for a in numpy(optimizer._accumulated_gradients))
    assert [np.isnan(v).all() for v in numpy(variables)] == [True, False]


def rows_of(*values_and_ids):
    """A sparse gradient of a variable of shape (4, 2), as the backend delivers it for an embedding."""
    values, ids = tensors(values_and_ids)
    if BACKEND == "torch":
        import torch

        return torch.sparse_coo_tensor(ids[None], values, (4, 2), check_invariants=True)
    if BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO((values, ids[:, None]), shape=(4, 2))
    import tensorflow as tf

    return tf.IndexedSlices(values, ids, dense_shape=tf.constant((4, 2)))


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "backward"])
@pytest.mark.parametrize("more", [{}, {"clipnorm": 1.0, "gradient_accumulation_steps": 2}], ids=["plain", "more"])
def test_row_11_rows_that_come_twice_in_a_sparse_gradient_are_added_first(route, more):
    params, all_values = draw(4, shapes=((4, 2),))
    settings = {"learning_rate": 0.0625, "epsilon": 0.1, **more}
    variables, reference = variables_of(params), Reference(params, **settings)
    step = ROUTES[route](Nadam(**settings), variables)
    for (values,) in all_values:
        step([rows_of(values, np.array([2, 0, 2, 2]))])
        dense = np.zeros_like(params[0])
        np.add.at(dense, [2, 0, 2, 2], values)
        reference.step([dense])
        assert_follows(variables, reference)
    assert same_bits(numpy(variables)[0][1], params[0][1])


@two_routes
def test_row_13_the_average_starts_at_the_variable_and_is_of_what_constraints_leave(route):
    params, all_grads = draw(5)
    optimizer = Nadam(0.5, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=4)
    variables = variables_of(params)
    for variable in variables:
        variable.constraint = keras.constraints.NonNeg()
    optimizer.build(variables)
    averages = optimizer._model_variables_moving_average
    assert all_same(numpy(averages), params)
    optimizer.finalize_variable_values(variables)
    assert all_same(numpy(variables), params)
    step = ROUTES[route](optimizer, variables)
    for i, grads in enumerate(all_grads):
        before = numpy(averages)
        step(grads)
        values, kept = numpy(variables), 0.75 if i else 0.0
        assert all(np.all(v >= 0) for v in values)
        if i == 3:
            assert all_same(numpy(averages), values)
            continue
        assert any(np.any(v == 0) for v in values)
        for average, old, value in zip(numpy(averages), before, values, strict=True):
            np.testing.assert_allclose(average, kept * old + (1 - kept) * value, rtol=1e-6, atol=1e-7)
    averaged = numpy(averages)
    assert not all_same(averaged, numpy(variables))
    optimizer.finalize_variable_values(variables)
    assert all_same(averaged, numpy(variables))


def decayed(*exclusions):
    """Which of three variables at 2 weight decay moves; their gradients are zero."""
    with keras.name_scope("norm"):
        variables = [keras.Variable(2.0, name="gamma")]
    variables += [keras.Variable(2.0, name="kernel"), keras.Variable(2.0, name="bias")]
    optimizer = Nadam(learning_rate=0.5, weight_decay=0.5)
    for kind, names in exclusions:
        chosen = names if kind == "var_names" else [v for v in variables if v.name in names]
        optimizer.exclude_from_weight_decay(**{kind: chosen})
    optimizer.apply(tensors([np.zeros((), np.float32)] * 3), variables)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    return [v.path for v, value in zip(variables, numpy(variables), strict=True) if value == 1.5]


def test_row_15_variables_are_excluded_from_weight_decay_as_documented():
    assert decayed() == ["norm/gamma", "kernel", "bias"]
    assert decayed(("var_list", ["gamma", "kernel", "bias"])) == []  # all of them
    assert decayed(("var_names", ["^norm/"])) == ["kernel", "bias"]  # the path, by a pattern
    assert decayed(("var_list", ["kernel"]), ("var_names", ["bias"])) == ["norm/gamma"]  # calls add up


CLIPS = [("float32", 1e20, "global_clipnorm"), ("float32", 1e20, "clipnorm"), ("float16", 300.0, "global_clipnorm")]


@two_routes
@pytest.mark.parametrize(("dtype", "size", "clip"), CLIPS)
def test_row_16_the_norm_of_finite_gradients_is_finite(route, dtype, size, clip):
    params, all_grads = draw(3, dtype)
    # An epsilon of the size of the clipped gradients, so that the step depends on it.
    optimizer, _, reference, step = beside(route, {"learning_rate": 0.0625, "epsilon": 0.1, clip: 0.5}, params)
    for grads in all_grads:
        step([(g * np.float32(size)).astype(DTYPES[dtype]) for g in grads])
        if BACKEND != "tensorflow" and route != "jit":  # there no norm comes out of the compiled step
            report = optimizer.last_step
            assert (report.grad_norm, report.clip_factor) == pytest.approx((reference.norm, reference.factor), rel=1e-6)


def test_row_19_the_name_is_nadam():
    assert [Nadam().name, Nadam().name, Nadam(name="other").name] == ["nadam", "nadam", "other"]


@two_routes
@pytest.mark.parametrize("steps", [None, 2])
def test_skip_nonfinite_leaves_everything_but_the_count(route, steps):
    params, all_grads = draw(4)
    settings = {"learning_rate": 0.0625, "use_ema": True, "gradient_accumulation_steps": steps, "skip_nonfinite": True}
    optimizer, variables, reference, step = beside(route, settings, params, largest=1.8e19)
    optimizer.build(variables)
    kept = [*variables, *(v for v in optimizer.variables if v is not optimizer._report)]
    for grads in all_grads:
        for j, bad in enumerate([np.nan, np.inf, -np.inf, 1e25]):
            before, spoilt = numpy(kept), [grads[0], grads[1].copy()]
            spoilt[1][j] = bad
            step(spoilt)
            assert all_same(before, numpy(kept))
            assert optimizer.last_step.skipped_steps == reference.skipped
        step(grads)
        assert not all_same(before, numpy(kept))
    assert optimizer.last_step.skipped_steps == reference.skipped == 16


@two_routes
@pytest.mark.parametrize("steps", [None, 2])
def test_last_step_says_what_the_last_call_did(route, steps):
    params, all_grads = draw(4)
    rates = [0.5, 0.25, 0.25, 0.125]
    settings = {"global_clipnorm": 0.5, "gradient_accumulation_steps": steps, "skip_nonfinite": True}
    settings["learning_rate"] = keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [0.5, 0.25, 0.125])
    optimizer, _, reference, step = beside(route, settings, params, learning_rate=rates.__getitem__)
    assert optimizer.last_step == (0, rates[0], None, None, 0, False, None)
    for i, grads in enumerate(all_grads, 1):
        step(grads)
        updated = i % (steps or 1) == 0
        norms = (reference.norm, reference.factor) if updated else (None, None)
        expected = (i // (steps or 1), rates[i - 1], *norms, 0, False)
        assert optimizer.last_step[:6] == (pytest.approx(expected, rel=1e-6) if updated else expected)
