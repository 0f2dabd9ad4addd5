"""Trains a linear layer on several devices of the CPU, and prints what came of it as JSON. Run by test_distribution.py.

Devices are made when a framework starts, so this has a process of its own.
"""

import json
import os
from functools import partial

import keras
import numpy as np

from nadam.keras import Nadam

DEVICES, SIZE, BATCH, STEPS, EPOCHS = 8, 8, 16, 4, 2
EVERYTHING = {"learning_rate": 0.02, "weight_decay": 0.1, "global_clipnorm": 0.5, "gradient_accumulation_steps": 2}
EVERYTHING |= {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3}
SETTINGS = {"plain": {}, "everything": EVERYTHING, "callable": {}, "skip": {"skip_nonfinite": True}}
CASES = {
    "jax": {
        "data 2": ["plain", "everything"],
        "data 8": ["everything", "callable", "skip"],
        "model 2": ["plain", "everything"],
        "model 8": ["everything", "callable", "skip"],
    },
    "tensorflow": {
        "fit": ["plain", "everything", "callable", "skip"],
        "run": ["everything", "callable", "skip"],
        "eager": ["everything", "callable", "skip"],
        "scaled": ["everything"],
    },
}


def draw(name):
    """Start, inputs and targets. Of one row, which is one device's: it would clip, or skip, by itself otherwise."""
    rng = np.random.default_rng(11)
    shapes = [(SIZE, SIZE), (SIZE,), (BATCH * STEPS, SIZE), (BATCH * STEPS, SIZE)]
    kernel, bias, x, y = (rng.standard_normal(shape).astype("float32") for shape in shapes)
    x[BATCH] *= np.nan if name == "skip" else 10.0
    return [kernel, bias], x, y


def start(name):
    """A model, its optimizer, and the list that grows with each call of the learning rate."""
    model = keras.Sequential([keras.Input((SIZE,)), keras.layers.Dense(SIZE, name="dense")])
    model.set_weights(draw(name)[0])
    calls = []

    def rate():
        calls.append(None)
        return 0.02 / len(calls)

    return model, Nadam(**SETTINGS[name], **({"learning_rate": rate} if name == "callable" else {})), calls


def fitted(name, wrap=lambda optimizer: optimizer, **options):
    model, optimizer, calls = start(name)
    model.compile(wrap(optimizer), loss="mse", **options)
    _, x, y = draw(name)
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    return model, optimizer, calls


def summary(model, optimizer, calls, **more):
    weights, called, last = [w.tolist() for w in model.get_weights()], len(calls), optimizer.last_step
    return {"weights": weights, "calls": called, "updates": last.step, "skipped": last.skipped_steps, **more}


def state(optimizer):
    """Each trained variable with its optimizer variables."""
    return [(slot.variable, [v for v in slot[1:5] if v is not None]) for slot in optimizer._runtime.slots]


def on_jax():
    distribution = keras.distribution
    devices = distribution.list_devices("cpu")

    def layout(*shape):
        mesh = distribution.DeviceMesh(shape, ("batch", "model"), devices[: shape[0] * shape[1]])
        layouts = distribution.LayoutMap(mesh)
        layouts[".*kernel"], layouts[".*bias"] = (None, "model"), ("model",)
        return distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")

    made = {
        "data 2": lambda: distribution.DataParallel(devices=devices[:2]),
        "data 8": lambda: distribution.DataParallel(devices=devices),
        "model 2": lambda: layout(1, 2),
        "model 8": lambda: layout(2, 4),
    }
    for where, names in CASES["jax"].items():
        for name in names:
            with made[where]().scope():
                model, optimizer, calls = fitted(name)
            places = [(v.value.sharding, [s.value.sharding for s in own], v.ndim) for v, own in state(optimizer)]
            alike = all(own.is_equivalent_to(of, ndim) for of, owns, ndim in places for own in owns)
            used = [len(of.device_set) for of, _, _ in places]
            split = [not of.is_fully_replicated for of, _, _ in places]
            yield f"{where} {name}", summary(model, optimizer, calls, alike=alike, used=used, split=split)


def on_tensorflow():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def agree(variables):
        copies = [strategy.experimental_local_results(getattr(v, "value", v)) for v in variables]
        return all(np.array_equal(first, second) for first, second in copies)

    def looped(name, compiled=tf.function):
        model, optimizer, calls = start(name)
        optimizer.build(model.trainable_variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum((model(x) - y) ** 2) / (BATCH * SIZE)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        run = compiled(lambda x, y: strategy.run(step, args=(x, y)))
        _, x, y = draw(name)
        for at in list(range(0, len(x), BATCH)) * EPOCHS:
            rows = [slice(at + i, at + BATCH, 2) for i in range(2)]
            parts = ([tf.constant(a[r]) for r in rows] for a in (x, y))
            given = (
                strategy.experimental_distribute_values_from_function(lambda c, p=p: p[c.replica_id_in_sync_group])
                for p in parts
            )
            run(*given)
        optimizer.finalize_variable_values(model.trainable_variables)
        return model, optimizer, calls

    made = {
        "fit": fitted,
        "run": looped,
        "eager": partial(looped, compiled=lambda function: function),
        "scaled": partial(fitted, wrap=keras.optimizers.LossScaleOptimizer),
    }
    for where, names in CASES["tensorflow"].items():
        for name in names:
            with strategy.scope():
                model, optimizer, calls = made[where](name)
                alike = agree([*model.trainable_variables, *optimizer.variables])
                yield f"{where} {name}", summary(model, optimizer, calls, alike=alike)


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for case, result in {"jax": on_jax, "tensorflow": on_tensorflow}[keras.backend.backend()]():
        print(json.dumps([case, result]), flush=True)
