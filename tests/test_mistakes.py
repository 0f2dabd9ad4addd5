"""Mistakes that would pass in silence: each is an error or a warning that says what to do, and nothing has changed."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest

import nadam
from nadam.core.names import known_arguments


def named():
    return {"w": np.ones((2, 3)), "b": np.ones(3)}


@pytest.mark.parametrize(("name", "hint"), [
    ("betas", ": did you mean beta_1, beta_2?"),
    ("b2", ": did you mean beta_2?"),
    ("lr", ": did you mean learning_rate?"),
    ("eps", ": did you mean epsilon?"),
    ("psi", ": did you mean momentum_decay?"),
    ("max_norm", ": did you mean global_clipnorm?"),
    ("weight_decya", ": did you mean weight_decay?"),
    ("nesterov", ""),
])  # fmt: skip
def test_an_unknown_argument(name, hint):
    with pytest.raises(ValueError, match=f"^{name}=1: not an argument of Nadam{hint.replace('?', '[?]')}$"):
        nadam.Nadam(**{name: 1})


def test_an_unknown_argument_of_a_loss_scale():
    with pytest.raises(ValueError, match=r"clipnorm=1.0: not an argument of LossScaleOptimizer; give it to the inner"):
        nadam.LossScaleOptimizer(nadam.Nadam(), clipnorm=1.0)


@pytest.mark.parametrize(("make", "name", "end"), [
    (nadam.Nadam, "lr", ": did you mean learning_rate?"),
    (nadam.Nadam, "beta1", ": did you mean beta_1?"),
    (nadam.Nadam, "weight_decy", ": did you mean weight_decay?"),
    (nadam.Nadam, "foo", ""),
    (lambda: nadam.LossScaleOptimizer(nadam.Nadam()), "learning_rat", ": did you mean learning_rate?"),
])  # fmt: skip
def test_an_unknown_attribute(make, name, end):
    optimizer = make()
    with pytest.raises(AttributeError) as error:
        setattr(optimizer, name, 0.1)
    assert str(error.value).startswith(f"{name}=0.1: not an attribute of {type(optimizer).__name__}")
    assert str(error.value).endswith(end.removeprefix(": "))
    assert not hasattr(optimizer, name)


def test_a_subclass_has_attributes_of_its_own():
    class Counting(nadam.Nadam):
        pass

    optimizer = Counting()
    optimizer.count = 1
    with pytest.raises(AttributeError, match="did you mean learning_rate"):
        optimizer.lr = 1


BOOLS = [True, False, np.True_, np.array(True)]


@pytest.mark.parametrize("value", BOOLS, ids=lambda value: f"{type(value).__name__} {value}")
@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "epsilon", "weight_decay", "clipnorm", "momentum_decay"])
def test_a_bool_for_a_number(name, value):
    with pytest.raises(TypeError, match=f"^{name}=.*{bool(value)}.*: expected a number"):
        nadam.Nadam(**{name: value})
    optimizer = nadam.Nadam()
    with pytest.raises(TypeError, match=f"^{name}="):
        setattr(optimizer, name, value)


@pytest.mark.parametrize("container", [named, lambda: list(named().values())], ids=["dict", "list"])
def test_an_array_that_has_taken_a_parameters_place(container):
    params = container()
    key = "b" if isinstance(params, dict) else 1
    grads, optimizer = container(), nadam.Nadam(0.1, use_ema=True)
    optimizer.apply(grads, params)
    old = params[key]
    before = old.copy()
    params[key] = params[key] - 1.0
    for call in (lambda: optimizer.apply(grads), lambda: optimizer.apply(grads, params)):
        with pytest.raises(
            ValueError, match=rf"^variables\[{key!r}\]: .*assign in place, variables\[{key!r}\]\[\.\.\.\] ="
        ):
            call()
    with pytest.raises(ValueError, match="assign in place"):
        optimizer.finalize_variable_values()
    assert optimizer.iterations == 1
    assert np.array_equal(old, before)
    params[key] = old
    params[key][...] -= 1.0
    optimizer.apply(grads)
    assert optimizer.iterations == 2


def test_what_else_is_in_the_users_dict_is_the_users():
    params = named()
    optimizer, grads = nadam.Nadam(), named()
    optimizer.build(params)
    params["frozen"] = np.ones(2)
    optimizer.apply(grads)
    del params["b"]
    optimizer.apply(grads)
    assert optimizer.iterations == 2


@pytest.mark.parametrize("given", [lambda: (a for a in named().values()), lambda: iter(named().values())])
def test_a_generator_of_parameters(given):
    optimizer = nadam.Nadam()
    with pytest.raises(TypeError, match="variables: expected a list or a dict of arrays, got"):
        optimizer.build(given())
    with pytest.raises(TypeError, match="variables: expected a list or a dict of arrays, got"):
        optimizer.apply([np.ones(2)], given())
    assert not optimizer.built
    optimizer.build(list(named().values()))
    with pytest.raises(TypeError, match="variables: expected a list or a dict"):
        optimizer.build(given())


@pytest.mark.parametrize(("excluded", "message"), [
    ({"var_names": ["bias", "norm"]}, r"var_names=\['bias', 'norm'\]: not among the parameters \['w', 'b'\]"),
    ({"var_list": [np.ones(3)]}, r"var_list, an array of shape \(3,\): not among the parameters"),
])  # fmt: skip
def test_an_exclusion_that_fits_nothing(excluded, message):
    optimizer = nadam.Nadam(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(**excluded)
    with pytest.warns(UserWarning, match=message) as seen:
        optimizer.build(named())
    assert seen[0].filename == __file__
    assert optimizer.built


def test_the_warning_is_of_the_line_that_builds():
    optimizer = nadam.Nadam(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["norm"])
    with pytest.warns(UserWarning, match="norm") as seen:
        optimizer.apply(list(named().values()), list(named().values()))
    assert seen[0].filename == __file__


def test_an_exclusion_of_which_a_part_fits():
    optimizer = nadam.Nadam(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["b", "norm"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.build(named())
    assert optimizer.built


def test_a_value_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\['lr'\]\[1\]: a builtins.object cannot be saved"):
        nadam.checkpoint.save(tmp_path / "x", {"optimizer": {"lr": [1, object()]}})
    assert not list(tmp_path.iterdir())


SUBMODULES = ["torch", "keras", "jax", "schedules", "checkpoint", "conformance", "watch"]


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodules_are_there_without_an_import(name):
    if name in ("torch", "keras", "jax") and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    program = f"import nadam, sys; assert 'nadam.{name}' not in sys.modules; print(nadam.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() in (f"nadam.{name}", f"nadam.core.{name}"), done.stderr


def test_a_submodule_that_is_not():
    with pytest.raises(AttributeError, match="module 'nadam' has no attribute 'tensorflow'"):
        nadam.tensorflow  # noqa: B018


@pytest.mark.skipif(find_spec("keras") is None or find_spec("torch") is None, reason="needs Keras and a backend")
@pytest.mark.parametrize(("backend", "message"), [
    (None, "KERAS_BACKEND is not set, so that it is 'tensorflow': expected a backend that is installed, here ['torch'"),
    ("tensorflow", "KERAS_BACKEND='tensorflow': expected a backend that is installed, here ['torch'"),
    ("theano", "KERAS_BACKEND='theano': expected a backend that is installed, here ['torch'"),
])  # fmt: skip
def test_keras_without_its_backend(backend, message, tmp_path):
    program = "import sys; sys.modules['tensorflow'] = None; from nadam.keras import Nadam"
    variables = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    variables |= {"KERAS_HOME": str(tmp_path)} | ({"KERAS_BACKEND": backend} if backend else {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=variables)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Keras cannot be imported (")
    assert message in last


def test_who_checks_arguments_looks_like_what_it_checks():
    def function(a, *, b=1):
        """What it does."""
        return a, b

    checked = known_arguments()(function)
    assert checked(1, b=2) == (1, 2)
    assert (checked.__doc__, checked.__wrapped__, checked.__globals__) == (function.__doc__, function, globals())
