"""Configs, .keras and weights files, checkpoints: training that goes on bit for bit, here and under other backends."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import across_backends
import keras
import numpy as np
import pytest
from across_backends import EVERYTHING, data, everything, gradients, numbers, schedule, small_model, train

import nadam
from arguments import ARGUMENTS
from cases import apart, same_bits
from nadam.keras import Nadam

BACKEND = keras.backend.backend()
RATE, BETA_1, BETA_2 = (
    across_backends.rate,
    across_backends.decay_of_the_first_moment,
    across_backends.decay_of_the_second_moment,
)
SETTINGS = {
    **ARGUMENTS,
    "lr schedule": {"learning_rate": schedule()},
    "lr callable": {"learning_rate": RATE},
    "beta1 callable": {"beta_1": BETA_1},
    "beta2 callable": {"beta_2": BETA_2},
    "track_grad_norm": {"track_grad_norm": True},
    "everything": EVERYTHING,
}
# Each argument is in one of these at least, which a test below makes sure of.
TOGETHER = {
    "defaults": {},
    "everything": EVERYTHING,
    "callables": {"learning_rate": RATE, "beta_1": BETA_1, "beta_2": BETA_2, "clipnorm": 0.5, "epsilon": 0.01},
    "others": {"learning_rate": 0.03, "clipvalue": 0.25, "loss_scale_factor": 8.0, "momentum_decay": float("inf")},
    "tracking": {"track_grad_norm": True},
}


def same(a, b):
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("argument", SETTINGS)
def test_a_config_that_went_through_json_makes_the_same_optimizer(argument):
    settings = SETTINGS[argument]
    optimizer = Nadam(**settings, name="mine")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    for again in (keras.saving.deserialize_keras_object(config), Nadam.from_config(optimizer.get_config())):
        assert type(again) is Nadam
        assert again.name == "mine"
        assert again.get_config() == optimizer.get_config()
        for name, value in settings.items():
            kept = getattr(again, name if name != "learning_rate" else "_learning_rate")
            if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
                assert (type(kept), kept.get_config()) == (type(value), value.get_config())
            elif callable(value):
                assert kept is value
            elif name == "learning_rate":
                assert float(kept.numpy()) == np.float32(value)
            else:
                assert (kept, type(kept)) == (value, type(value))


@pytest.mark.parametrize("kind", [keras.ops.convert_to_tensor, keras.Variable])
def test_a_tensor_beta_is_saved_as_its_number(kind):
    optimizer = Nadam(beta_1=kind(0.75), beta_2=kind(0.5))
    again = Nadam.from_config(json.loads(json.dumps(optimizer.get_config())))
    assert (again.beta_1, again.beta_2) == (0.75, 0.5)


def test_a_config_in_which_nothing_is_unlike_keras_is_one_that_keras_takes():
    keras.optimizers.Nadam.from_config(Nadam(0.01, use_ema=True).get_config())
    assert Nadam.from_config(keras.optimizers.Nadam(0.01, use_ema=True).get_config()).use_ema


def drawn(optimizer, seed=3):
    """Put any numbers into the optimizer's variables that could be its state."""
    rng = np.random.default_rng(seed)
    for variable in optimizer.variables:
        value = (
            5
            if "int" in str(variable.dtype)
            else 0.5
            if variable.shape == ()
            else np.abs(rng.normal(size=variable.shape))
        )
        variable.assign(np.asarray(value).astype(variable.dtype))
    return optimizer


@pytest.mark.parametrize("argument", SETTINGS)
def test_a_dict_and_a_weights_file_hold_every_optimizer_variable(argument, tmp_path):
    settings = SETTINGS[argument]
    model = small_model(Nadam(**settings))
    wanted, store = numbers(drawn(model.optimizer).variables), {}
    model.save_weights(tmp_path / "a.weights.h5")
    model.optimizer.save_own_variables(store)
    other = small_model(Nadam(**settings), seed=1)
    other.load_weights(tmp_path / "a.weights.h5")
    assert same(everything(other), everything(model))
    assert same(numbers(other.optimizer.variables), wanted)
    third = small_model(Nadam(**settings), seed=1)
    third.optimizer.load_own_variables(store)
    assert same(numbers(third.optimizer.variables), wanted)


def test_every_argument_is_resumed_below():
    asked = set().union(*TOGETHER.values(), {"state_bits", "seed"})  # the last in test_compressed.py
    assert asked == set(inspect.signature(Nadam).parameters) - {"name", "kwargs"}


@pytest.mark.parametrize("settings", TOGETHER)
def test_training_goes_on_bit_for_bit(settings, tmp_path):
    settings = TOGETHER[settings]
    grads = gradients(11)
    if settings.get("skip_nonfinite"):
        grads[1][0][0, 0] = np.nan
    model = train(small_model(Nadam(**settings)), grads[:5])
    model.save(tmp_path / "a.keras")
    if settings is EVERYTHING:
        assert int(model.optimizer._iterations) == 4  # of 5 calls; the next update is at the sixth
        assert all(a.any() for a in numbers(model.optimizer._accumulated_gradients))
    before = everything(model)
    wanted = everything(train(model, grads[5:]))
    assert not same(before, wanted)
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert same(everything(loaded), before)
    assert same(everything(train(loaded, grads[5:])), wanted)


class PowerCut(keras.callbacks.Callback):
    """Keeps what a backup would have left, had the third epoch never begun."""

    def __init__(self, backup, left):
        super().__init__()
        self.backup, self.left = backup, left

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            shutil.copytree(self.backup, self.left)


def test_fit_goes_on_bit_for_bit_after_backup_and_checkpoints(tmp_path):
    settings = {"learning_rate": schedule(), "use_ema": True, "gradient_accumulation_steps": 3, "clipvalue": 0.5}
    # Four batches an epoch and three calls an update: the files are written in the middle of a window.
    common = {"batch_size": 4, "epochs": 4, "shuffle": False, "verbose": 0}
    checkpoint = keras.callbacks.ModelCheckpoint
    callbacks = [
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        PowerCut(tmp_path / "backup", tmp_path / "left"),
        checkpoint(tmp_path / "{epoch}.keras"),
        checkpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
    ]
    whole = small_model(Nadam(**settings), build=False)
    whole.fit(*data(), callbacks=callbacks, **common)
    wanted = everything(whole)

    restored = small_model(Nadam(**settings), seed=1, build=False)
    restored.fit(*data(), callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "left")], **common)
    assert same(everything(restored), wanted)

    loaded = keras.saving.load_model(tmp_path / "2.keras")
    assert int(loaded.optimizer._iterations) == 8
    loaded.fit(*data(), initial_epoch=2, **common)
    assert same(everything(loaded), wanted)

    other = small_model(Nadam(**settings), seed=1, build=False)
    other.load_weights(tmp_path / "2.weights.h5")  # row 17: its optimizer is not built yet
    other.fit(*data(), initial_epoch=2, **common)
    assert same(everything(other), wanted)


def test_a_file_goes_on_training_under_the_other_backends(tmp_path):  # row 14
    calls = 5
    model = train(small_model(Nadam(**EVERYTHING)), gradients(4, seed=5))
    model.save(tmp_path / "a.keras")
    others = sorted({"torch", "jax", "tensorflow"} - {BACKEND})
    paths = [str(Path(file).resolve().parent) for file in (Path(nadam.__file__).parent, across_backends.__file__)]
    processes = {}
    for name in others:
        environment = {**os.environ, "KERAS_BACKEND": name, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, across_backends.__file__, tmp_path / "a.keras", str(calls), tmp_path / f"{name}.npz"]
        processes[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wanted = everything(train(model, gradients(calls)))
    for name, process in processes.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {output.decode()[-2000:]}"
        found = np.load(tmp_path / f"{name}.npz")
        assert len(found.files) == len(wanted)
        for key, ours in zip(found.files, wanted, strict=True):
            assert np.all(np.isfinite(ours))
            # Two updates, each of which is within 4 units of the reference on either backend.
            assert apart(found[key], ours, 1.0 if ours.shape else 0.0, np.float32) <= 2 * 2 * 4.0


def pair(tmp_path, settings=EVERYTHING):
    """A trained model, and the path of a file of its weights."""
    model = train(small_model(Nadam(**settings)), gradients(5))
    model.save_weights(tmp_path / "a.weights.h5")
    return model, tmp_path / "a.weights.h5"


def test_weights_loaded_before_the_optimizer_is_built_are_its_state(tmp_path):  # row 17
    model, path = pair(tmp_path)
    other = small_model(Nadam(**EVERYTHING), seed=1, build=False)
    other.load_weights(path)
    assert not other.optimizer.built
    other.optimizer.build(other.trainable_variables)
    assert same(everything(other), everything(model))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a compiled step that builds the optimizer exists on TensorFlow")
def test_weights_loaded_before_are_the_state_once_where_a_compiled_step_builds(tmp_path):
    import tensorflow as tf

    model, path = pair(tmp_path, {})
    other = small_model(Nadam(), seed=1, build=False)
    other.load_weights(path)
    step = tf.function(lambda grads: other.optimizer.apply(grads, other.trainable_variables))
    for grads in gradients(2, seed=6):
        step([tf.constant(g) for g in grads])
    assert same(everything(other), everything(train(model, gradients(2, seed=6))))


def test_weights_loaded_before_are_saved_again_before_the_optimizer_is_built(tmp_path):
    model, path = pair(tmp_path)
    between = small_model(Nadam(**EVERYTHING), seed=1, build=False)
    between.load_weights(path)
    between.save_weights(tmp_path / "b.weights.h5")
    other = small_model(Nadam(**EVERYTHING), seed=1)
    other.load_weights(tmp_path / "b.weights.h5")
    assert same(everything(other), everything(model))


def test_a_model_that_was_not_trained_yet_is_saved_and_loaded(tmp_path):
    model = small_model(Nadam(0.01), build=False)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    model.optimizer.build(model.trainable_variables)
    assert same(everything(train(loaded, gradients(2))), everything(train(model, gradients(2))))


def test_a_saved_dict_does_not_change_with_training():
    model, store = train(small_model(Nadam()), gradients(1)), {}
    model.optimizer.save_own_variables(store)
    kept = {key: np.array(value) for key, value in store.items()}
    train(model, gradients(2))
    assert all(same_bits(np.asarray(store[key]), kept[key]) for key in kept)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_state_of_half_precision_variables_stays_float32(dtype, tmp_path):  # FAULTS row 24
    keras.config.set_dtype_policy(dtype)
    try:
        model, path = pair(tmp_path, {"use_ema": True})
        other = small_model(Nadam(use_ema=True), seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    other.load_weights(path)
    assert model.trainable_variables[0].dtype == dtype
    assert {str(v.dtype) for v in other.optimizer._momentums + other.optimizer._velocities} == {"float32"}
    assert same(everything(other), everything(model))


def test_what_does_not_decay_stays_so_in_a_file(tmp_path):
    optimizer = Nadam(0.1, weight_decay=0.5)
    model = small_model(optimizer, build=False)
    optimizer.exclude_from_weight_decay(var_list=[model.layers[0].kernel], var_names=["bias"])
    optimizer.build(model.trainable_variables)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    decays = [[m.optimizer._use_weight_decay(v) for v in m.trainable_variables] for m in (model, loaded)]
    assert decays == [[False, False, True, False]] * 2
    assert [slot.decays for slot in loaded.optimizer._runtime.slots] == decays[0]
    assert keras.optimizers.Nadam.from_config(Nadam(0.1).get_config()).get_config()["learning_rate"] == pytest.approx(
        0.1
    )
