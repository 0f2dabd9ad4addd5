"""Keras's callbacks and wrappers around this optimizer: what they do is what they do around any other."""

import keras
import numpy as np
import pytest
from test_fit import AVERAGED, BATCH, STEPS, batches, draw, fit, gradients, linear, near, reference_fit, reference_of

from cases import same_bits
from nadam.keras import Nadam
from reference import Reference

MULTI = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no keras.optimizers.MultiOptimizer"
)


def loss(weights, x, y):
    kernel, bias = (np.asarray(w, "float64") for w in weights)
    return float(np.mean((x @ kernel + bias - y) ** 2))


def compiled(**settings):
    model = linear()
    reference = reference_of(model, settings)
    model.compile(Nadam(**settings), loss="mse")
    return model, reference, *draw()


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def rates_by_epoch(rates):
    return lambda calls: rates[calls // STEPS]


def test_learning_rate_scheduler():
    rates = [0.02, 0.005, 0.01]
    model, _, x, y = compiled()
    reference = Reference(model.get_weights(), learning_rate=rates_by_epoch(rates))
    history = fit(model, x, y, epochs=3, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])])
    assert near(model, reference_fit(reference, x, y, epochs=3).p)
    np.testing.assert_array_equal(history.history["learning_rate"], np.float32(rates))


def test_reduce_lr_on_plateau():
    model, _, x, y = compiled(learning_rate=0.02)
    reference = Reference(model.get_weights(), learning_rate=rates_by_epoch([0.02, 0.02, 0.01, 0.005]))
    never_enough = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=1e9)
    history = fit(model, x, y, epochs=4, callbacks=[never_enough])
    assert near(model, reference_fit(reference, x, y, epochs=4).p)
    np.testing.assert_array_equal(history.history["learning_rate"], np.float32([0.02, 0.02, 0.01, 0.005]))


@pytest.mark.parametrize("rate", [keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5), lambda: 0.02])
def test_a_learning_rate_that_is_computed_cannot_be_scheduled(rate):
    model, _, x, y = compiled(learning_rate=rate)
    with pytest.raises(TypeError, match="not settable"):
        fit(model, x, y, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)])


@pytest.mark.parametrize("accumulation", [None, 2])
def test_swap_ema_weights_validates_the_averages(accumulation):
    model, reference, x, y = compiled(**AVERAGED, gradient_accumulation_steps=accumulation)
    expected, shown = [], (x[:5] + 1, y[:5])
    for _ in range(2):  # the second one starts with the averages that the first one leaves
        swap = keras.callbacks.SwapEMAWeights()
        history = fit(model, x, y, epochs=2, validation_data=shown, validation_batch_size=5, callbacks=[swap])
        expected = []
        for _ in range(2):
            for inputs, targets in batches(x, y):
                reference.step(gradients(reference.p, inputs, targets))
            expected.append(loss(reference.ema, *shown))
        reference.p = list(reference.ema)
        np.testing.assert_allclose(history.history["val_loss"], expected, rtol=1e-5)
        assert near(model, reference.p)


class Weights(keras.callbacks.Callback):
    """What a callback that saves the model at the end of each epoch would see."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.model.get_weights())


def test_swap_ema_weights_shows_the_averages_at_the_end_of_an_epoch():
    model, reference, x, y = compiled(**AVERAGED)
    for _ in range(2):
        weights = Weights()
        fit(model, x, y, epochs=2, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True), weights])
        averages = []
        for _ in range(2):
            for inputs, targets in batches(x, y):
                reference.step(gradients(reference.p, inputs, targets))
            averages.append(list(reference.ema))
        reference.p = list(reference.ema)
        for seen, average in zip(weights.seen, averages, strict=True):
            np.testing.assert_allclose(flat(seen), flat(average), rtol=1e-6, atol=5e-6)  # as in near
        assert near(model, reference.p)


def test_swap_ema_weights_in_evaluate_leaves_everything_as_it_was():
    model, reference, x, y = compiled(use_ema=True, ema_momentum=0.7)
    model.optimizer.build(model.trainable_variables)
    for inputs, targets in batches(x, y):
        model.train_on_batch(inputs, targets)
        reference.step(gradients(reference.p, inputs, targets))
    given = model.evaluate(x, y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()])
    assert given == pytest.approx(loss(reference.ema, x, y), rel=1e-5)
    assert near(model, reference.p)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert near(model, reference.ema)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="there Keras's callback adds the average, which is float32, to the variable itself",
)
def test_swap_ema_weights_takes_half_precision_variables():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(Nadam(0.02, **AVERAGED), loss="mse")
    x, y = draw()
    weights = Weights()
    fit(model, x, y, epochs=2, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True), weights])
    for last, left in zip(weights.seen[-1], model.get_weights(), strict=True):
        assert str(left.dtype) == "bfloat16"
        assert same_bits(last, left)  # what it showed after the last epoch is what fit() leaves


@MULTI
def test_multi_optimizer_gives_each_variable_its_own():
    model, (x, y) = linear(name="dense"), draw()
    start = model.get_weights()
    settings = {"kernel": {"learning_rate": 0.02, **AVERAGED}, "bias": {"learning_rate": 0.01, "beta_1": 0.5}}
    optimizers = {name: Nadam(name=name, **given) for name, given in settings.items()}
    chosen = keras.optimizers.OptimizerMap(optimizers["kernel"], {".*/bias": optimizers["bias"]})
    model.compile(keras.optimizers.MultiOptimizer(chosen), loss="mse")
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (epoch + 1))
    fit(model, x, y, epochs=2, callbacks=[scheduler])
    rates = [rates_by_epoch([rate, rate / 2]) for rate in (0.02, 0.01)]
    kernel, bias = (
        Reference([w], **{**given, "learning_rate": rate})
        for w, given, rate in zip(start, settings.values(), rates, strict=True)
    )
    for inputs, targets in 2 * batches(x, y):
        grads = gradients([*kernel.p, *bias.p], inputs, targets)
        kernel.step(grads[:1])
        bias.step(grads[1:])
    assert near(model, [*kernel.ema, *bias.p])
    assert [int(o.iterations) for o in optimizers.values()] == [2 * STEPS, 2 * STEPS]


@pytest.mark.parametrize("accumulation", [None, 2])
def test_variables_are_excluded_from_weight_decay_before_compile(accumulation):
    settings = {"weight_decay": 0.5, "learning_rate": 0.02, "gradient_accumulation_steps": accumulation}
    model, (x, y) = linear(), draw()
    reference, decayed = (reference_of(model, settings, excluded=excluded) for excluded in ((1,), ()))
    optimizer = Nadam(**settings)
    optimizer.exclude_from_weight_decay(var_names=["bias", "norm"])
    model.compile(optimizer, loss="mse")
    fit(model, x, y)
    assert near(model, reference_fit(reference, x, y).p)
    assert not near(model, reference_fit(decayed, x, y).p)


def test_a_nan_batch_is_skipped_in_fit():
    model, reference, x, y = compiled(skip_nonfinite=True)
    x[BATCH] = np.nan
    fit(model, x, y)
    usable = np.r_[0:BATCH, 2 * BATCH : len(x)]
    assert near(model, reference_fit(reference, x[usable], y[usable]).p)
    assert model.optimizer.last_step.skipped_steps == 1
    assert int(model.optimizer.iterations) == STEPS - 1


@pytest.mark.parametrize("skip", [False, True])
def test_terminate_on_nan(skip):
    model, _, x, y = compiled(skip_nonfinite=skip)
    x[2 * BATCH] = np.nan
    reference = Reference(model.get_weights())
    fit(model, x, y, epochs=3, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert int(model.optimizer.iterations) == (2 if skip else 3)
    if skip:
        assert near(model, reference_fit(reference, x[: 2 * BATCH], y[: 2 * BATCH]).p)
        assert model.optimizer.last_step.skipped_steps == 1
    else:
        assert np.isnan(flat(model.get_weights())).all()


@pytest.mark.parametrize("settings", [{}, AVERAGED], ids=["plain", "average"])
def test_early_stopping_restores_weights_and_training_goes_on(settings):
    model, reference, x, y = compiled(learning_rate=0.02, **settings)
    weights = Weights()
    rising = keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=1, restore_best_weights=True)
    history = fit(model, x, y, epochs=5, callbacks=[weights, rising])
    assert len(history.epoch) == 2  # the loss falls, which is not wanted here
    assert all(map(same_bits, model.get_weights(), weights.seen[0]))
    best = None
    for _ in range(2):
        for inputs, targets in batches(x, y):
            reference.step(gradients(reference.p, inputs, targets))
        best = best or list(reference.p)
    reference.p = best
    assert near(model, best)
    fit(model, x, y)
    assert near(model, reference_fit(reference, x, y).p)
