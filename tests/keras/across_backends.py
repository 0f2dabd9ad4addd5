"""A small model, its gradients and its state; as a script, training that goes on from a file under another backend."""

import sys

import keras
import numpy as np

import nadam.keras


@keras.saving.register_keras_serializable("nadam_tests")
def rate():
    return 0.02


@keras.saving.register_keras_serializable("nadam_tests")
def decay_of_the_first_moment():
    return 0.7


@keras.saving.register_keras_serializable("nadam_tests")
def decay_of_the_second_moment():
    return 0.95


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.5)


# Much of what an optimizer can be asked for at once; every argument is in one of these.
EVERYTHING = {
    "learning_rate": schedule(),
    "weight_decay": 0.1,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.8,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 3,
    "momentum_decay": 0.004,
    "bias_correction": "adam",
    "skip_nonfinite": True,
}


def small_model(optimizer, seed=0, build=True):
    """Four variables: kernels and biases of two layers, of which the names are the same in each process."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="first", bias_initializer="ones"),
            keras.layers.Dense(1, name="second", bias_initializer="ones"),
        ],
        name="small",
    )
    model.compile(optimizer, loss="mse")
    if build:
        optimizer.build(model.trainable_variables)
    return model


def gradients(count, seed=1):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(s).astype("float32") for s in ((4, 3), (3,), (3, 1), (1,))] for _ in range(count)]


def train(model, all_grads):
    """Steps on gradients, for a LossScaleOptimizer of the scaled loss; that one Keras runs only stateless on JAX."""
    optimizer, variables = model.optimizer, model.trainable_variables
    for grads in all_grads:
        scale = np.float32(optimizer.scale_loss(1.0))
        grads = [keras.ops.convert_to_tensor(g * scale) for g in grads]
        if keras.backend.backend() != "jax" or not hasattr(optimizer, "inner_optimizer"):
            optimizer.apply(grads, variables)
            continue
        import jax

        state = [v.value for v in optimizer.variables]
        new, state = jax.jit(optimizer.stateless_apply)(state, grads, [v.value for v in variables])
        for variable, value in zip(variables + optimizer.variables, new + state, strict=True):
            variable.assign(value)
    return model


def numbers(variables):
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


def everything(model):
    """The values of the model's variables and of its optimizer's."""
    return numbers(model.variables) + numbers(model.optimizer.variables)


def data(rows=16, seed=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 4)).astype("float32"), rng.standard_normal((rows, 1)).astype("float32")


if __name__ == "__main__":
    _, source, calls, target = sys.argv
    model = keras.saving.load_model(source)
    assert type(model.optimizer) is nadam.keras.Nadam
    np.savez(target, *everything(train(model, gradients(int(calls)))))
