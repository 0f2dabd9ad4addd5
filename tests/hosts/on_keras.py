"""`nadam.keras.Nadam` as hosts, by each way that its backend does a step."""

import warnings
from contextlib import contextmanager, nullcontext

import numpy as np

from hosts.base import CALLABLES, MOMENTS, SCALES, STEP, Host, spelled
from hosts.on_jax import ONE_THREAD, of_jax

THREADS = {"jax": ONE_THREAD, "tensorflow": {**ONE_THREAD, "TF_NUM_INTRAOP_THREADS": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}}


class Keras(Host):
    """`nadam.keras.Nadam` in a process of its backend.

    Args:
        backend: Keras's.
        route: ``apply``, eagerly; ``jit``, of `stateless_apply`; ``function`` of TensorFlow, or ``XLA``, which
            compiles it.
        kernels: Whether JAX may call the foreign ones.
    """

    options = frozenset(STEP | CALLABLES | {"constraint"})

    def __init__(self, backend, route, kernels=True):
        self.backend, self.route, self.kernels = backend, route, kernels
        self.needs = ("keras", backend)
        self.environment = {"KERAS_BACKEND": backend, **THREADS.get(backend, {})}
        self.thorough = kernels and (route != "apply" or backend == "torch") and route != "XLA"
        if (backend, route) == ("torch", "apply"):
            self.options = Keras.options | {"state_bits", "seed"}
        if route == "XLA":  # which calls no function on the host
            self.options = frozenset(STEP | {"constraint"})

    @contextmanager
    def surroundings(self):
        with of_jax(self.wide, self.kernels) if self.backend == "jax" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist for variables")
            yield

    def _build(self, params, settings):
        import keras

        from nadam.keras import Nadam

        assert keras.backend.backend() == self.backend
        excluded, constraint = settings.pop("excluded", ()), settings.pop("constraint", None)
        if is_schedule(settings.get("lr")):
            settings["lr"] = _schedule(settings["lr"])
        names = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
        self.optimizer = optimizer = Nadam(**spelled(settings, **names))
        self.params = [keras.Variable(p, dtype=str(p.dtype), name=f"p{i}") for i, p in enumerate(params)]
        if constraint is not None:
            for variable in self.params:
                variable.constraint = getattr(keras.constraints, constraint)()
        optimizer.exclude_from_weight_decay(var_list=[self.params[i] for i in excluded])
        optimizer.build(self.params)
        self.program = getattr(self, f"_by_{self.route}")()

    def _by_apply(self):
        return lambda grads: self.optimizer.apply(grads, self.params)

    def _by_jit(self):
        import jax

        program = jax.jit(self.optimizer.stateless_apply, donate_argnums=(0, 2))

        def step(grads):
            kept = self.optimizer.variables
            new, state = program([v.value for v in kept], grads, [v.value for v in self.params])
            for variable, value in zip([*self.params, *kept], [*new, *state], strict=True):
                variable.assign(value)

        return step

    def _by_function(self, **options):
        import tensorflow as tf

        return tf.function(self._by_apply(), **options)

    def _by_XLA(self):  # noqa: N802
        return self._by_function(jit_compile=True)

    def _step(self, grads):
        from keras import ops

        self.program([None if g is None else ops.convert_to_tensor(g) for g in grads])

    def _state(self):
        optimizer, settings = self.optimizer, self.settings
        calls = optimizer.variables[0]  # which brings all of them up to date
        found = {
            "params": self.params,
            **dict(zip(MOMENTS, (optimizer._momentums, optimizer._velocities), strict=True)),
        }
        for name, kept in zip(SCALES, ("_momentum_scales", "_velocity_scales"), strict=True):
            found[name] = [scales for scales in getattr(optimizer, kept, ()) if scales is not None]
        if settings.get("use_ema"):
            found["ema"] = optimizer._model_variables_moving_average
        if settings.get("gradient_accumulation_steps"):
            found["accumulator"] = optimizer._accumulated_gradients
        found |= {"calls": [calls], "momentum_product": [optimizer._u_product]}
        last = optimizer.last_step
        skipped = [0 if last is None else last.skipped_steps]
        return {**{name: map(_value, values) for name, values in found.items()}, "skipped": skipped}

    def _named(self):
        return {variable.path: variable for variable in self.params}


def is_schedule(value):
    """Whether a learning rate is computed from the number of calls."""
    return callable(value) and value.__code__.co_argcount == 1


def _schedule(function):
    import keras

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return function(keras.ops.cast(step, "float32"))

        def get_config(self):
            return {}

    return Schedule()


def _value(variable):
    import keras

    return np.asarray(keras.ops.convert_to_numpy(variable.value))
