"""compile() and fit(): the numbers of the float64 reference, whatever the arguments and however a step is compiled."""

import shutil
from functools import partial

import keras
import numpy as np
import pytest

from cases import same_bits
from nadam.keras import Nadam
from reference import Reference

# torch.compile loads parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
BACKEND = keras.backend.backend()
BATCH, STEPS = 4, 6  # per epoch
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)
AVERAGED = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3}
# Every argument of the constructor, in sets that can be combined.
ARGUMENTS = {
    "defaults": {},
    "schedule": {"learning_rate": SCHEDULE, "beta_1": 0.5, "weight_decay": 0.3, "clipnorm": 0.4, "epsilon": 0.01},
    "rates": {"learning_rate": 0.03, "beta_2": 0.9, "epsilon": 0.1, "clipvalue": 0.1, "momentum_decay": 0.004},
    "scaled": {"beta_1": 0.0, "global_clipnorm": 0.3, "epsilon": 0.01, "loss_scale_factor": 100.0},
    "average": {"use_ema": True, "ema_momentum": 0.8, "skip_nonfinite": True, "momentum_decay": float("inf")},
    "accumulation": {"gradient_accumulation_steps": 3, "epsilon": 0.01, "learning_rate": 0.02},
    "overwrite": {**AVERAGED, "learning_rate": 0.02},
}
EVERYTHING = {"weight_decay": 0.1, "global_clipnorm": 0.5, "gradient_accumulation_steps": 2, "momentum_decay": 0.004}
EVERYTHING |= {"learning_rate": SCHEDULE, **AVERAGED}


def draw():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((BATCH * STEPS, width)).astype("float32") for width in (3, 2)]


def linear(**options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, **options)])
    rng = np.random.default_rng(6)
    model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])
    return model


def batches(*arrays):
    return [tuple(a[i : i + BATCH] for a in arrays) for i in range(0, len(arrays[0]), BATCH)]


def gradients(weights, x, y):
    """Of the mean squared error of a linear layer."""
    kernel, bias = weights
    error = 2.0 * (x @ kernel + bias - y) / y.size
    return [x.T @ error, error.sum(0)]


def reference_fit(reference, x, y, epochs=1, gradients=gradients):
    """What fit() does with a Reference: its steps, and the averages at the end."""
    for _ in range(epochs):
        for inputs, targets in batches(x.astype("float64"), y.astype("float64")):
            reference.step(gradients(reference.p, inputs, targets))
    if reference.settings["use_ema"]:
        reference.p = [average.copy() for average in reference.ema]
    return reference


def reference_of(model, settings, **more):
    settings = {**settings, "loss_scale_factor": None}  # the gradients here are not scaled
    rate = settings.get("learning_rate")
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        settings["learning_rate"] = lambda calls: float(rate(calls))
    return Reference(model.get_weights(), **{**settings, **more})


def fit(model, x, y, epochs=1, **options):
    return model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, **options)


def train(model, optimizer, x, y):
    model.compile(optimizer, loss="mse")
    fit(model, x, y)


def near(model, expected):
    """A gradient is a sum of float32 products that partly cancel; a step divides its size out and leaves that error."""
    tolerances = {"rtol": 1e-6, "atol": 2e-5 * 0.02 * STEPS}  # ... of the way that the steps go
    return all(np.allclose(w, e, **tolerances) for w, e in zip(model.get_weights(), expected, strict=True))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_do_in_fit_what_is_documented(name):
    settings, model, (x, y) = ARGUMENTS[name], linear(), draw()
    reference = reference_of(model, settings)
    train(model, Nadam(**settings), x, y)
    assert near(model, reference_fit(reference, x, y).p)
    assert int(model.optimizer.iterations) == STEPS // settings.get("gradient_accumulation_steps", 1)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_of_these_arguments_changes_the_numbers(name):
    settings, start, moved, (x, y) = ARGUMENTS[name], linear(), linear(), draw()
    moved.set_weights(reference_fit(reference_of(start, settings), x, y).p)
    for left_out in settings.keys() - {"loss_scale_factor", "skip_nonfinite"}:
        others = {k: v for k, v in settings.items() if k != left_out}
        assert not near(moved, reference_fit(reference_of(start, others), x, y).p), left_out


def test_fit_is_a_loop_over_apply():
    x, y = draw()
    fitted, looped = linear(), linear()
    train(fitted, Nadam(**AVERAGED), x, y)
    optimizer = Nadam(**AVERAGED)
    for inputs, targets in batches(x, y):
        grads = [keras.ops.convert_to_tensor(g) for g in gradients(looped.get_weights(), inputs, targets)]
        optimizer.apply(grads, looped.trainable_variables)
    optimizer.finalize_variable_values(looped.trainable_variables)
    assert near(fitted, looped.get_weights())


def test_a_second_fit_goes_on_from_the_averages():
    model, (x, y) = linear(), draw()
    reference = reference_of(model, AVERAGED)
    model.compile(Nadam(**AVERAGED), loss="mse")
    for epochs in (1, 2):
        fit(model, x, y, epochs)
        assert near(model, reference_fit(reference, x, y, epochs).p)


XLA, EAGER, SEVERAL = {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 4}
COMPILED = {
    "torch": [{}, XLA, EAGER],  # there, it is torch.compile
    "jax": [{}, {"jit_compile": False}, EAGER, SEVERAL],
    "tensorflow": [{}, XLA, EAGER, SEVERAL, XLA | SEVERAL],
}


@pytest.mark.parametrize("options", COMPILED.get(BACKEND, [{}]), ids=str)
def test_callables_are_called_at_every_step_however_it_is_compiled(options):
    if BACKEND == "torch" and options == XLA and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    starts = {"learning_rate": 0.03, "beta_1": 0.9, "beta_2": 0.99}
    calls = dict.fromkeys(starts, 0)

    def falling(name):
        calls[name] += 1
        return starts[name] / (1 + 0.1 * calls[name])

    model, (x, y) = linear(), draw()
    falls = {name: partial(falling, name) for name in starts}
    expected = {name: lambda i, start=start: start / (1.1 + 0.1 * i) for name, start in starts.items()}
    reference = reference_of(model, {**EVERYTHING, **expected})
    model.compile(Nadam(**{**EVERYTHING, **falls}), loss="mse", **options)
    fit(model, x, y, epochs=2)
    assert near(model, reference_fit(reference, x, y, epochs=2).p)
    assert set(calls.values()) == {2 * STEPS}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a loop that is part of a graph is TensorFlow's")
def test_callables_are_called_at_every_round_of_a_loop_in_a_graph():
    import tensorflow as tf

    calls, variable = [], keras.Variable(np.ones(3, "float32"))
    optimizer = Nadam(lambda: calls.append(None) or 0.1 / len(calls))
    optimizer.build([variable])
    reference = Reference([np.ones(3)], learning_rate=lambda i: 0.1 / (i + 1))
    step = tf.function(lambda: optimizer.apply([tf.ones(3)], [variable]), jit_compile=True)

    @tf.function
    def loop():
        for _ in tf.range(4):
            step()

    loop()
    for _ in range(4):
        reference.step([np.ones(3)])
    assert len(calls) == 4
    np.testing.assert_allclose(variable.numpy(), reference.p[0], rtol=1e-6)  # some ulps of its four steps


def test_a_call_that_does_not_update_leaves_all_but_the_accumulators():
    model, (x, y) = linear(), draw()
    model.compile(Nadam(0.02, gradient_accumulation_steps=3, use_ema=True, weight_decay=0.1), loss="mse")
    fit(model, x[: 3 * BATCH], y[: 3 * BATCH])

    def kept():
        state = {v.path: np.array(v.numpy()) for v in model.optimizer.variables if not v.path.endswith("iteration")}
        accumulated = [state.pop(path) for path in list(state) if "accumulator" in path]
        return [*model.get_weights(), *state.values()], accumulated

    before, cleared = kept()
    assert not any(a.any() for a in cleared)
    fit(model, x[3 * BATCH : 5 * BATCH], y[3 * BATCH : 5 * BATCH])
    after, accumulated = kept()
    assert all(map(same_bits, before, after))
    assert all(a.all() for a in accumulated)
    fit(model, x[5 * BATCH :], y[5 * BATCH :])
    after, cleared = kept()
    assert not any(a.any() for a in cleared)
    # The learning rate is all that an update leaves.
    assert [same_bits(a, b) for a, b in zip(before, after, strict=True)].count(True) == 1


def test_frozen_layers_stay_as_they_are():
    x, y = draw()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), linear()])
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    reference = reference_of(model.layers[1], {})
    train(model, Nadam(), x, y)
    assert all(map(same_bits, frozen, model.layers[0].get_weights()))
    assert near(model.layers[1], reference_fit(reference, x @ frozen[0] + frozen[1], y).p)
    assert len(model.optimizer.variables) == 2 + 2 * 2 + 1


def test_the_average_is_of_constrained_variables():
    constraints = {"kernel_constraint": keras.constraints.MaxNorm(0.8), "bias_constraint": keras.constraints.NonNeg()}
    model, (x, y) = linear(**constraints), draw()
    reference = reference_of(model, {"learning_rate": 0.02})
    train(model, Nadam(0.02, **AVERAGED), x, y)
    averages = reference.p
    for step, (inputs, targets) in enumerate(batches(x.astype("float64"), y.astype("float64")), 1):
        reference.step(gradients(reference.p, inputs, targets))
        kernel, bias = reference.p
        norms = np.sqrt(np.sum(kernel**2, axis=0))
        reference.p = [kernel * np.minimum(norms, 0.8) / (norms + 1e-7), np.maximum(bias, 0.0)]
        weight = 1.0 if step == 1 else 1.0 - 0.7
        averages = [a + weight * (p - a) for a, p in zip(averages, reference.p, strict=True)]
        if step % 3 == 0:
            reference.p = list(averages)
    assert near(model, averages)


class Largest(keras.layers.Layer):
    """Passes its input on, and keeps its largest magnitude as the layers of float8 training do."""

    def build(self, shape):
        self.largest = self.add_weight(shape=(), initializer="zeros", name="largest")
        self.largest.overwrite_with_gradient = True

    def call(self, x):
        @keras.ops.custom_gradient
        def through(x, largest):
            def gradient(*args, upstream=None):
                return args[0] if upstream is None else upstream, keras.ops.max(keras.ops.abs(x))

            return x, gradient

        return through(x, keras.ops.convert_to_tensor(self.largest))


@pytest.mark.parametrize("steps", [None, 3])
def test_a_variable_takes_its_gradient_where_it_asks_for_that(steps):
    x, y = draw()
    settings = {**EVERYTHING, "gradient_accumulation_steps": steps}
    model = keras.Sequential([keras.Input((3,)), Largest(), linear()])
    reference = reference_of(model.layers[1], settings)
    train(model, Nadam(**settings), x, y)
    assert float(model.layers[0].largest.numpy()) == np.abs(x[-BATCH * (steps or 1) :]).max()
    assert near(model.layers[1], reference_fit(reference, x, y).p)


def embedded(weights, ids, y):
    """Gradient of the mean squared error of the mean of embeddings; ids that come twice add up."""
    (table,) = weights
    error = 2.0 * (table[ids.astype(int)].mean(1) - y) / y.size / ids.shape[1]
    grad = np.zeros_like(table)
    np.add.at(grad, ids.astype(int), error[:, None, :])
    return [grad]


def test_repeated_ids_of_an_embedding_add_up():
    ids = np.random.default_rng(8).integers(0, 5, (BATCH * STEPS, 4))  # the last of 6 rows is never looked up
    _, y = draw()
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(6, 2), keras.layers.GlobalAveragePooling1D()]
    )
    reference = reference_of(model, EVERYTHING)
    train(model, Nadam(**EVERYTHING), ids, y)
    assert near(model, reference_fit(reference, ids, y, gradients=embedded).p)


def sparse(rows, values, shape):
    """Rows of a gradient as the backend's sparse tensor; a row may come twice."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(rows), shape)
    if BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO((values, np.array(rows)[:, None]), shape=shape)
    import torch

    return torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values), shape, check_invariants=False)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_sparse_gradient_does_what_the_dense_one_does(steps):
    rng = np.random.default_rng(9)
    ours, dense = (keras.Variable(np.ones((5, 3), "float32")) for _ in range(2))
    optimizers = [Nadam(0.1, gradient_accumulation_steps=steps, weight_decay=0.1) for _ in range(2)]
    for rows in ([0, 2, 2, 0], [4, 1, 4, 4]):
        values = rng.integers(1, 9, (4, 3)).astype("float32") / 8  # sums are exact in any order
        summed = np.zeros((5, 3), "float32")
        np.add.at(summed, rows, values)
        optimizers[0].apply([sparse(rows, values, (5, 3))], [ours])
        optimizers[1].apply([keras.ops.convert_to_tensor(summed)], [dense])
    assert same_bits(ours.numpy(), dense.numpy())
    assert not np.array_equal(ours.numpy(), np.ones((5, 3)))
