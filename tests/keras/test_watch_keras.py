"""`nadam.watch.KerasCallback` in `fit`, and what a step reports without clipping."""

import keras
import numpy as np
import pytest

from nadam import watch
from nadam.keras import Nadam

BACKEND = keras.backend.backend()
STEPS, BATCH = 5, 4


def model_of(optimizer, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    return model


def data():
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, 3)).astype("float32")
    return x, x.sum(1, keepdims=True)


def fit(model, *callbacks, x=None, epochs=1):
    own, y = data()
    model.fit(own if x is None else x, y, BATCH, epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def norms_by_sgd():
    """The norms of the first gradient, and of the parameters before it, of the same model."""
    x, y = data()
    model = model_of(keras.optimizers.SGD(1.0))
    before = model.get_weights()
    model.train_on_batch(x[:BATCH], y[:BATCH])
    return [np.linalg.norm(a - b) for a, b in zip(before, model.get_weights(), strict=True)]


def test_the_norm_without_clipping():
    rows = []
    ours = fit(model_of(Nadam(0.01, track_grad_norm=True)), watch.KerasCallback(rows.append))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["grad_norm"] == pytest.approx(np.linalg.norm(norms_by_sgd()), rel=1e-5)
    assert all(row["grad_norm"] > 0 and row["clip_factor"] is None for row in rows)
    plain = []
    others = fit(model_of(Nadam(0.01)), watch.KerasCallback(plain.append, every=2))
    assert [(row["step"], row["grad_norm"]) for row in plain] == [(2, None), (4, None)]
    for one, other in zip(ours.get_weights(), others.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [None, 2])
def test_clipping_is_told(steps):
    rows = []
    settings = {"global_clipnorm": 0.25, "track_grad_norm": True, "gradient_accumulation_steps": steps}
    fit(model_of(Nadam(0.01, **settings)), watch.KerasCallback(rows.append, every=steps or 1))
    assert [row["step"] for row in rows] == ([1, 2] if steps else [1, 2, 3, 4, 5])
    for row in rows:
        assert row["clip_factor"] == pytest.approx(min(0.25 / row["grad_norm"], 1.0), rel=1e-5)


def test_a_step_that_was_skipped():
    rows, (x, _) = [], data()
    x[BATCH] = np.nan
    model = fit(model_of(Nadam(0.01, skip_nonfinite=True)), watch.KerasCallback(rows.append), x=x)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1, 1]
    assert [row["step"] for row in rows] == [1, 1, 2, 3, 4]
    name = model.trainable_variables[0].path if BACKEND == "torch" else None
    assert [row["nonfinite_param"] for row in rows] == [None, name, None, None, None]


def test_norms_of_each_tensor():
    rows = []
    model = model_of(Nadam(0.01))
    before = model.get_weights()
    fit(model, watch.KerasCallback(rows.append, every=STEPS, tensors=True), watch.KerasCallback([].append))
    again = []
    keras.utils.set_random_seed(0)
    first = model_of(Nadam(0.01))
    x, y = data()
    first.fit(x[:BATCH], y[:BATCH], BATCH, verbose=0, callbacks=[watch.KerasCallback(again.append, tensors=True)])
    for i, variable in enumerate(model.trainable_variables):
        assert rows[0]["param_norm/" + variable.path] == pytest.approx(np.linalg.norm(model.get_weights()[i]), rel=1e-5)
    for i, variable in enumerate(first.trainable_variables):
        moved = np.linalg.norm(first.get_weights()[i] - before[i])
        assert again[0]["update_norm/" + variable.path] == pytest.approx(moved, rel=1e-4)
        expected = pytest.approx(norms_by_sgd()[i], rel=1e-4) if BACKEND == "torch" else None
        assert again[0]["grad_norm/" + variable.path] == expected


def test_csv_in_several_fits(tmp_path):
    model = model_of(Nadam(0.01, track_grad_norm=True))
    with watch.CSV(tmp_path / "run.csv") as write:
        callback = watch.KerasCallback(write, every=2)
        fit(model, callback, epochs=2)
        fit(model, callback)
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "2", "4", "6", "8", "10", "12", "14"]


def test_under_a_loss_scale():
    rows = []
    fit(model_of(keras.optimizers.LossScaleOptimizer(Nadam(0.01))), watch.KerasCallback(rows.append))
    assert rows[-1]["step"] == STEPS


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="SGD has no last_step: expected an optimizer of nadam"):
        fit(model_of(keras.optimizers.SGD()), watch.KerasCallback([].append))


def test_a_report_before_the_first_step():
    optimizer = Nadam(0.5)
    assert optimizer.last_step == (0, 0.5, None, None, 0, False, None)
    optimizer.build([keras.Variable(np.ones(3, "float32"))])
    assert optimizer.last_step == (0, 0.5, None, None, 0, False, None)


def test_what_tracks_is_saved_and_loaded(tmp_path):
    model = fit(model_of(Nadam(0.01, track_grad_norm=True)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.track_grad_norm is True
    assert loaded.optimizer.last_step.step == STEPS
    assert "track_grad_norm" not in Nadam().get_config()
