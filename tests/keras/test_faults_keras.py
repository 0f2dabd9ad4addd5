"""Bad input: what it gives, and that nothing has changed by it. Numbers are the rows of faults/rows.txt."""

import math
import re
from contextlib import contextmanager

import keras
import numpy as np
import pytest

import nadam.keras
from cases import apart, same_bits
from reference import Reference

BACKEND = keras.backend.backend()
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="only torch's tensors are memory that others can reach")
SHAPES = [(3, 4), (5,)]
EVERYTHING = {"weight_decay": 0.1, "global_clipnorm": 1.0, "use_ema": True, "gradient_accumulation_steps": 2}


def variables_of(shapes=SHAPES, dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    return [keras.Variable(draw.standard_normal(shape), dtype=dtype) for shape in shapes]


def grads_of(shapes=SHAPES, dtype="float32", seed=1):
    """Gradients that every dtype holds exactly."""
    draw = np.random.default_rng(seed)
    return [keras.ops.convert_to_tensor(draw.integers(-16, 17, shape) / 8, dtype) for shape in shapes]


def array(value):
    return np.array(keras.ops.convert_to_numpy(value))


def snapshot(optimizer, variables):
    return [array(v) for v in [*variables, *optimizer.variables]]


def same(before, after):
    return len(before) == len(after) and all(map(same_bits, before, after))


@contextmanager
def unchanged(optimizer, variables):
    """Variables, state, counters and settings are the same afterwards, bit for bit."""
    before, settings = snapshot(optimizer, variables), optimizer._hyper
    yield
    assert same(before, snapshot(optimizer, variables))
    assert optimizer._hyper == settings


def compiled(optimizer, variables):
    """A call as fit() makes it: compiled, where the backend does that."""
    if BACKEND == "tensorflow":
        import tensorflow

        return tensorflow.function(lambda grads: optimizer.apply(grads, variables))
    if BACKEND == "torch":
        return lambda grads: optimizer.apply(grads, variables)
    import jax

    program = jax.jit(optimizer.stateless_apply)

    def call(grads):
        state = [v.value for v in optimizer.variables], grads, [v.value for v in variables]
        new, new_state = jax.block_until_ready(program(*state))
        for variable, value in zip([*variables, *optimizer.variables], [*new, *new_state], strict=True):
            variable.assign(value)

    return call


@pytest.fixture(scope="module")
def trained():
    """An optimizer in the middle of a window, for calls that must not change it."""
    variables, optimizer = variables_of(), nadam.keras.Nadam(0.01, **EVERYTHING)
    for _ in range(3):
        optimizer.apply(grads_of(), variables)
    assert all(array(v).any() for v in optimizer.variables)
    return optimizer, variables


@pytest.mark.parametrize("value", ["0.1", [0.1], np.ones(2), 1j, object()], ids=lambda value: type(value).__name__)
def test_a_value_that_is_no_number_is_refused(trained, value):
    for argument in ("learning_rate", "beta_1", "epsilon", "ema_momentum"):
        with pytest.raises(TypeError, match=f"{argument}="):
            nadam.keras.Nadam(**{argument: value})
        with unchanged(*trained), pytest.raises(TypeError, match=f"{argument}="):
            setattr(trained[0], argument, value)


@pytest.mark.parametrize("kind", [keras.ops.convert_to_tensor, keras.Variable], ids=["tensor", "variable"])
def test_a_tensor_or_variable_out_of_range(trained, kind):
    for argument in ("learning_rate", "beta_1", "beta_2"):
        with pytest.raises(ValueError, match=f"{argument}=-0.5: expected 0 <= {argument} <"):
            nadam.keras.Nadam(**{argument: kind(-0.5)})
    with unchanged(*trained), pytest.raises(ValueError, match=r"learning_rate=-0.5: expected 0 <= learning_rate <"):
        trained[0].learning_rate = kind(-0.5)


def test_a_learning_rate_that_follows_something_is_not_settable():
    for rate in (keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5), lambda: 0.1):
        optimizer = nadam.keras.Nadam(rate)
        with unchanged(optimizer, []), pytest.raises(TypeError, match=r"learning_rate=0.2: not settable"):
            optimizer.learning_rate = 0.2
        assert float(optimizer.learning_rate) == pytest.approx(0.1)


class From(keras.optimizers.schedules.LearningRateSchedule):
    """From the second call on it gives another value."""

    def __init__(self, then):
        self.then = then

    def __call__(self, step):
        return keras.ops.where(keras.ops.convert_to_tensor(step) < 1, 0.5, keras.ops.convert_to_tensor(self.then))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["learning_rate", "schedule", "beta_1", "beta_2"])
def test_a_value_computed_out_of_range(name, bad):  # 5
    variables, argument = variables_of(), "learning_rate" if name == "schedule" else name
    optimizer = nadam.keras.Nadam(**{argument: From(bad) if name == "schedule" else lambda: bad})
    optimizer.build(variables)
    optimizer.iterations.assign(1)
    with unchanged(optimizer, variables), pytest.raises(ValueError, match=f"{argument}={bad}: expected .* < "):
        optimizer.apply(grads_of(), variables)


@pytest.mark.parametrize("name", ["learning_rate", "beta_2"])
def test_a_callable_that_gives_a_bad_value_to_a_compiled_step(name):  # 5
    rates, variables = [0.5], variables_of()
    optimizer = nadam.keras.Nadam(**{name: lambda: rates[0]}, **EVERYTHING)
    optimizer.build(variables)
    call, before = compiled(optimizer, variables), snapshot(optimizer, variables)
    for _ in range(2):  # a call that accumulates, and one that updates
        rates[0] = -1.0
        with unchanged(optimizer, variables), pytest.raises(Exception, match=f"{name}=-1.0: expected 0 <= {name} <"):
            call(grads_of())
        rates[0] = 0.5
        call(grads_of())
    assert not any(map(same_bits, before[:2], snapshot(optimizer, variables)[:2]))
    assert int(optimizer.iterations) == 1


def test_a_schedule_that_gives_a_bad_value_to_a_compiled_step():  # 5
    bad, variables = keras.Variable(0.1, trainable=False), variables_of()
    optimizer = nadam.keras.Nadam(From(bad))
    optimizer.build(variables)
    call = compiled(optimizer, variables)
    call(grads_of())
    bad.assign(-1.0)
    if BACKEND == "torch":
        with unchanged(optimizer, variables), pytest.raises(ValueError, match=r"learning_rate=-1.0: expected"):
            call(grads_of())
        return
    call = call if BACKEND == "tensorflow" else compiled(optimizer, variables)
    call(grads_of())  # it cannot raise; but it is seen
    assert all(np.isnan(array(v)).all() for v in variables)


def test_the_same_variable_twice(trained):  # 6
    _, variable = trained[1]
    for optimizer in (trained[0], nadam.keras.Nadam()):
        with unchanged(optimizer, trained[1]), pytest.raises(ValueError, match="the same variable twice"):
            optimizer.apply([grads_of()[1]] * 2, [variable, variable])
    assert not optimizer.built


@only_torch
def test_memory_that_overlaps(trained):  # 6
    import torch

    base, grad = torch.ones(10), torch.ones(5)
    for first, second in ((base[:5], base[4:9]), (base[:5], base[:5]), (grad, torch.ones(1).expand(5))):
        pair = variables_of([(5,), (5,)])
        pair[0]._value.data, pair[1]._value.data = first, second
        optimizer = nadam.keras.Nadam()
        optimizer.build(pair)
        with unchanged(optimizer, pair), pytest.raises(ValueError, match=f"{pair[1].path}: .*share memory"):
            optimizer.apply([grad.clone(), grad.clone()], pair)
    optimizer, variables = trained
    for mine in (variables[1], optimizer._momentums[1], optimizer._accumulated_gradients[1]):
        with unchanged(*trained), pytest.raises(ValueError, match=f"{variables[1].path}.*shares memory"):
            optimizer.apply([grads_of()[0], mine.value.detach()], variables)


def test_zero_size_and_scalar_variables():  # 12
    shapes = [(0, 3), (), (2,)]
    variables, settings = variables_of(shapes), {**EVERYTHING, "learning_rate": 0.1, "skip_nonfinite": True}
    optimizer, reference = nadam.keras.Nadam(**settings), Reference(map(array, variables), **settings)
    for _ in range(4):
        optimizer.apply(grads_of(shapes), variables)
        reference.step(map(array, grads_of(shapes)))
    for variable, expected in zip(variables, reference.p, strict=True):
        assert apart(array(variable), expected, 1.0, np.float32) <= 4
    only = nadam.keras.Nadam(clipnorm=1.0)
    only.apply(grads_of([(0,)]), variables_of([(0,)]))
    assert int(only.iterations) == 1


@pytest.mark.skipif(BACKEND == "tensorflow", reason="stateless_apply does not exist on TensorFlow")
@pytest.mark.parametrize("copied", [True, False])
def test_a_stateless_call_changes_nothing_and_takes_no_gradient_of_another_shape(trained, copied):  # 15
    optimizer, variables = trained
    given = [
        [keras.ops.copy(v.value) if copied else v.value for v in each] for each in (optimizer.variables, variables)
    ]
    with unchanged(*trained):
        _, state = optimizer.stateless_apply(given[0], grads_of(), given[1])
    assert int(state[0]) == int(array(optimizer.variables[0])) + 1
    for bad, error in ((keras.ops.ones(1), ValueError), (keras.ops.ones(5, "complex64"), TypeError)):
        with unchanged(*trained), pytest.raises(error, match=re.escape(f"grads[{variables[1].path!r}]: ")):
            optimizer.stateless_apply(given[0], [grads_of()[0], bad], given[1])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow compiles for shapes that it does not know")
def test_a_gradient_whose_shape_is_known_only_when_compiled_code_runs(trained):  # 15
    import tensorflow

    optimizer, variables = trained
    for unknown in (None, [None]):
        signature = [[tensorflow.TensorSpec((3, 4)), tensorflow.TensorSpec(unknown)]]
        call = tensorflow.function(lambda grads: optimizer.apply(grads, variables), input_signature=signature)
        for shape in ((6,), (1,)):
            error = ValueError, tensorflow.errors.InvalidArgumentError
            with unchanged(*trained), pytest.raises(error, match=r"[Ss]hape.*not compatible"):
                call([grads_of()[0], keras.ops.ones(shape)])
        call(grads_of())


def test_other_variables(trained):  # 15, 21
    optimizer, variables = trained
    first, second = grads_of()
    with unchanged(*trained), pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([first, second], [variables[0], keras.Variable(np.ones(5))])
    with pytest.raises(ValueError, match="trainable_variables: expected the variables"):
        nadam.keras.Nadam().apply([first])


def test_missing_gradients_are_reported_as_keras_reports_them(trained):
    first, reports, variables = grads_of()[0], [], variables_of()
    for optimizer in (keras.optimizers.Nadam(), nadam.keras.Nadam(weight_decay=0.1)):
        with pytest.warns(UserWarning, match="Gradients do not exist") as seen:
            optimizer.apply([first, None], variables)
        reports.append([str(each.message) for each in seen if each.category is UserWarning])
    assert reports[0] == reports[1]
    assert same_bits(array(variables[1]), array(variables_of()[1]))
    with unchanged(*trained), pytest.raises(ValueError, match="no gradient for any variable"):
        trained[0].apply([None, None], trained[1])


def test_no_gradients_at_all_are_nothing_to_do(trained):
    for optimizer in (trained[0], nadam.keras.Nadam()):
        with unchanged(optimizer, trained[1]):
            optimizer.apply([], trained[1])
    assert not optimizer.built


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_variables_that_are_not_of_real_numbers(dtype):  # 16, 17
    bad = keras.Variable(np.ones(3), dtype=dtype, trainable=False)
    good, optimizer = keras.Variable(np.ones(3)), nadam.keras.Nadam()
    with unchanged(optimizer, [good, bad]), pytest.raises(TypeError, match=f"{bad.path}: dtype {dtype}: expected one"):
        optimizer.apply([keras.ops.ones(3), keras.ops.ones(3)], [good, bad])
    assert not optimizer.built
    optimizer.build([good])


@pytest.mark.parametrize("kind", [np.array, list], ids=["array", "list"])
def test_a_complex_gradient(trained, kind):  # 17
    message = re.escape(f"grads[{trained[1][1].path!r}]: dtype ") + ".*expected real numbers"
    with unchanged(*trained), pytest.raises(TypeError, match=message):
        trained[0].apply([grads_of()[0], kind(np.ones(5, np.complex64))], trained[1])


@pytest.mark.parametrize("kind", ["byte order", "masked"])
def test_arrays_of_another_byte_order_and_masked_ones(trained, kind):  # 19
    grad = np.ones(5, ">f4") if kind == "byte order" else np.ma.masked_array(np.ones(5, np.float32), [0, 1, 0, 0, 0])
    if BACKEND == "tensorflow" and kind == "byte order":  # it converts them
        results = []
        for given in (grad, np.ones(5, np.float32)):
            variables, optimizer = variables_of(), nadam.keras.Nadam(0.01)
            optimizer.apply([grads_of()[0], given], variables)
            results.append(snapshot(optimizer, variables))
        assert same(*results)
        return
    with unchanged(*trained), pytest.raises((TypeError, ValueError), match=r"byte order|JAX|masked"):
        trained[0].apply([grads_of()[0], grad], trained[1])


@pytest.mark.parametrize("grad", [np.array(["a"] * 5), "abcde", np.array([{}] * 5)], ids=["texts", "text", "objects"])
def test_a_gradient_that_is_no_tensor(trained, grad):
    with unchanged(*trained), pytest.raises((TypeError, ValueError)):
        trained[0].apply([grads_of()[0], grad], trained[1])


@pytest.mark.parametrize("fault", ["shape", "complex", "learning_rate", "its own shape"])
def test_a_call_that_fails_overwrites_nothing(fault):
    variables, rates = variables_of([*SHAPES, (2,)]), [0.1]
    variables[0].overwrite_with_gradient = variables[2].overwrite_with_gradient = True
    optimizer, (first, *_) = nadam.keras.Nadam(lambda: rates[0]), grads_of()
    optimizer.build(variables)
    rates[0] = -1.0 if fault == "learning_rate" else 0.1
    second = keras.ops.ones(1 if fault == "shape" else 5, "complex64" if fault == "complex" else "float32")
    grads = [first[:1] if fault == "its own shape" else first, second, keras.ops.ones(2)]
    with unchanged(optimizer, variables), pytest.raises((TypeError, ValueError), match=r"grads|learning_rate|shape"):
        optimizer.apply(grads, variables)


@pytest.mark.parametrize(("name", "meant"), [
    ("betas", "beta_1, beta_2"), ("lr", "learning_rate"), ("eps", "epsilon"), ("b1", "beta_1"),
    ("learning_rat", "learning_rate"), ("psi", "momentum_decay"),
])  # fmt: skip
def test_an_unknown_argument_names_the_one_that_is_meant(name, meant):
    with pytest.raises(ValueError, match=rf"^{name}=1: not an argument of Nadam: did you mean {meant}\?$"):
        nadam.keras.Nadam(**{name: 1})
    config = {**nadam.keras.Nadam().get_config(), name: 1}
    with pytest.raises(ValueError, match=f"^{name}=1: not an argument"):
        nadam.keras.Nadam.from_config(config)


@pytest.mark.parametrize(("name", "meant"), [
    ("betas", "beta_1, beta_2"), ("lr", "learning_rate"), ("eps", "epsilon"), ("beta1", "beta_1"), ("b2", "beta_2"),
])  # fmt: skip
def test_an_attribute_by_another_hosts_name(trained, name, meant):
    optimizer = trained[0]
    for value in (0.1, keras.Variable(0.1, trainable=False)):
        with unchanged(*trained), pytest.raises(AttributeError, match=rf"^{name}=.* of Nadam: did you mean {meant}\?$"):
            setattr(optimizer, name, value)
    assert not hasattr(optimizer, name)
    nadam.keras.Nadam().note = "what else is set is Keras's affair"


@pytest.mark.parametrize("value", [True, np.True_, np.array(False)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "epsilon", "weight_decay", "clipnorm"])
def test_a_bool_for_a_number(trained, name, value):
    message = f"^{name}=.*{bool(value)}.*: expected a number"
    with pytest.raises(TypeError, match=message):
        nadam.keras.Nadam(**{name: value})
    with unchanged(*trained), pytest.raises(TypeError, match=message):
        setattr(trained[0], name, value)
    with pytest.raises(TypeError, match=f"^{name}="):
        nadam.keras.Nadam(**{name: keras.ops.convert_to_tensor(value)})


@pytest.mark.parametrize(("kind", "given"), [("var_names", ["bias", "norm"]), ("var_list", variables_of([(2,)]))])
def test_an_exclusion_that_fits_nothing(kind, given):
    optimizer, variables = nadam.keras.Nadam(weight_decay=0.1), variables_of()
    optimizer.exclude_from_weight_decay(**{kind: given})
    named = given if kind == "var_names" else [given[0].path]
    message = f"{kind}={named}: not among the variables {[v.path for v in variables]}"
    with pytest.warns(UserWarning, match=re.escape(message)) as seen:
        optimizer.build(variables)
    assert seen[0].filename == __file__
    part = nadam.keras.Nadam(weight_decay=0.1)
    part.exclude_from_weight_decay(**{kind: [*given, variables[0].path if kind == "var_names" else variables[0]]})
    part.build(variables)
