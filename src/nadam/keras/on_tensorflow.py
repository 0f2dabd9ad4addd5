"""Keras on TensorFlow: the step in XLA, in place on the variables, for each replica of a tf.distribute strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import inf, nan
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from nadam.core import traced
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.keras import packing
from nadam.keras.backends import SKIPPED, Backend, Optimizer, info_of, with_absent
from nadam.keras.slots import checked_gradient

Tensor = Any


class Local(NamedTuple):
    """The variables of one replica."""

    slots: list[list[Any]]  # per parameter: itself, both moments, average, accumulator
    iterations: Any
    product: Any
    report: Any


class TensorFlowBackend(Backend):
    """Values are read and assigned inside compiled functions, which then work in place."""

    def building(self) -> AbstractContextManager[Any]:
        scope: AbstractContextManager[Any] = tf.init_scope()
        return scope

    def near(self, optimizer: Optimizer, variable: Any) -> AbstractContextManager[Any]:
        value = variable.value if isinstance(variable, keras.Variable) else variable
        scope: AbstractContextManager[Any] = optimizer._distribution_strategy.extended.colocate_vars_with(value)
        return scope

    def is_traced(self, value: Any) -> bool:
        return bool(tf.is_tensor(value)) and not hasattr(value, "numpy")

    def number(self, value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        if tf.executing_eagerly():
            return float(value)
        # A compiled step cannot raise: a learning rate out of its range makes everything NaN, which is seen.
        return tf.where((value >= 0) & (value < inf), value, tf.constant(nan, value.dtype))

    def call_on_host(
        self, optimizer: Optimizer, function: Callable[[int], tuple[float, ...]], calls: Any, count: int
    ) -> Sequence[Any]:
        if tf.executing_eagerly():
            return function(int(calls))
        dtype = tf.as_dtype(optimizer._momentum_product.dtype)
        graph = tf.compat.v1.get_default_graph()
        if control_flow_util.GraphOrParentsInXlaContext(graph):
            # XLA cannot call Python: the values are made when the compiled function is called, and passed to it.
            def values() -> Tensor:
                return tf.constant(function(int(optimizer._iterations.numpy())), dtype)

            key = object()
            given = graph.capture_call_time_value(values, tf.TensorSpec((count,), dtype), key=key)

            def outside() -> list[Tensor]:
                if tf.executing_eagerly():
                    return [values()]
                # Called from another graph: a callback in each of its rounds, outside of what XLA compiles.
                with tf.control_dependencies(None):
                    calls = tf.convert_to_tensor(optimizer._iterations.value)
                    return [tf.stack(self.call_on_host(optimizer, function, calls, count))]

            # TensorFlow's own would be evaluated once for all rounds of a loop, and not at all inside of tf.cond.
            graph._function_captures.by_ref_external[key] = outside
        else:
            given = tf.numpy_function(lambda n: tf.constant(function(int(n)), dtype).numpy(), [calls], dtype)
            given.set_shape((count,))
        return list(tf.unstack(given))

    def copy(self, optimizer: Optimizer, source: Any, target: Any) -> None:
        target = target.value if isinstance(target, keras.Variable) else target
        optimizer._distribution_strategy.extended.update(
            target, lambda to, value: to.assign(tf.cast(value, to.dtype)), args=(source.value,)
        )

    def alone(self, optimizer: Optimizer, work: Callable[..., None], *args: Any) -> None:
        if optimizer._distribution_strategy.num_replicas_in_sync > 1:
            work(*args)  # replicas are threads that wait for one another in the middle of a step
        else:
            super().alone(optimizer, work, *args)

    def step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        slots = optimizer._runtime.slots
        dense = [_dense(slots[i].variable, grad) for i, grad in zip(members, grads, strict=True)]
        strategy, replica = optimizer._distribution_strategy, tf.distribute.get_replica_context()
        if replica is not None and strategy.num_replicas_in_sync > 1:
            dense = replica.all_reduce(tf.distribute.ReduceOp.SUM, dense)
        merged = partial(self._on_all_replicas, optimizer, members)
        tf.__internal__.distribute.interim.maybe_merge_call(merged, strategy, dense)

    def _on_all_replicas(self, optimizer: Optimizer, members: Sequence[int], strategy: Any, grads: list[Any]) -> None:
        h, slots = optimizer._hyper, optimizer._runtime.slots
        now = optimizer._now(tf.convert_to_tensor(optimizer._iterations.value))._asdict()
        constants = {name: now.pop(name) for name in ("beta1", "beta2") if not callable(getattr(h, name))}
        dtype = optimizer._momentum_product.dtype
        now = {name: traced.scalar(keras.ops, value, dtype) for name, value in now.items()}
        indices, padded = with_absent(h, slots, members, grads)
        absent = len(padded) - len(grads)
        infos = [info_of(slots[i]) for i in indices]
        report = optimizer._report if h.skip_nonfinite else None
        shared = [optimizer._iterations, optimizer._momentum_product, report]
        replicas = len(strategy.experimental_local_results(optimizer._iterations.value))
        for replica in range(replicas):

            def local(variable: Any, replica: int = replica) -> Any:
                value = variable.value if isinstance(variable, keras.Variable) else variable
                return None if value is None else strategy.experimental_local_results(value)[replica]

            variables = Local([[local(v) for v in slots[i][:5]] for i in indices], *map(local, shared))
            own = [strategy.experimental_local_results(grad)[replica] for grad in grads]
            if not tf.executing_eagerly():
                own = tf.tuple(own, control_inputs=list(now.values()))  # a callable that raises comes first
            call = partial(_call, h, infos, constants, absent, variables, replicas == 1)
            with tf.device(variables.iterations.device):
                if tf.executing_eagerly():
                    key = (h, tuple(indices), absent, replica, tuple(infos), tuple(constants.items()))
                    plans = optimizer._runtime.plans
                    if key not in plans:
                        plans[key] = tf.function(call)
                    call = plans[key]
                call(own, now)
        optimizer._runtime.report = None


def _call(
    h: Hyperparameters,
    infos: Sequence[traced.ParamInfo],
    constants: dict[str, float],
    absent: int,
    variables: Local,
    alone: bool,
    grads: list[Tensor],
    now: dict[str, Tensor],
) -> None:
    """One call on the variables of one replica; ``absent`` of the parameters, the last ones, have no gradient."""
    xp, steps, inv_scale = keras.ops, h.gradient_accumulation_steps, 1.0 / (h.loss_scale_factor or 1.0)
    # With other replicas around, a function that is compiled by itself might not end up on its device.
    compiled: Any = partial(tf.function, jit_compile=True, autograph=False) if alone else lambda function: function
    given = variables.slots[: len(variables.slots) - absent]

    @compiled
    def check(grads: list[Tensor]) -> Tensor:
        return traced.usable(xp, grads, list(map(_read, given)), inv_scale, h.check())

    def accumulate(grads: list[Tensor]) -> None:
        for slot, grad in zip(given, grads, strict=True):
            slot[4].assign_add(traced.unscaled(xp, grad, slot[4], inv_scale))
        if variables.report is not None:
            nothing = tf.zeros((), variables.report.dtype)
            variables.report.assign(tf.stack([nothing, nothing, variables.report[SKIPPED]]))

    def norms(grads: list[Tensor]) -> Tensor:
        """Not compiled by itself: XLA on the CPU takes sums on one thread, a number at a time."""
        if not h.clips_by_norm:
            return None
        given = list(map(_read, variables.slots)), [*grads, *[None] * absent], variables.product.dtype.name
        return traced.norms(xp, *given, inv_scale=inv_scale, sum_of_squares=lambda g: 2.0 * tf.nn.l2_loss(g))

    in_xla = control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    with_gradient = [slot[0] for slot in given], infos[: len(given)]
    packed = packing.small(h, *with_gradient) if alone and not in_xla else []
    others = sorted(set(range(len(variables.slots))) - set(packed))

    def change(
        members: Sequence[int], one_pass: Any, grads: list[Tensor], now: dict[str, Tensor], norms: Tensor
    ) -> Any:
        """Update some of the parameters; gives momentum product, norm and clip factor."""
        slots, product = [variables.slots[i] for i in members], variables.product.read_value()
        updates = variables.iterations.read_value() // (steps or 1)
        arguments = (xp, h, Now(**constants, **now), updates, product, list(map(_read, slots)), grads)
        options = {"inv_scale": inv_scale, "norms": norms, "one_pass": one_pass}
        outcome = traced.update(*arguments, [infos[i] for i in members], **options)
        for slot, tensor in zip(slots, outcome.tensors, strict=True):
            for variable, value in zip(slot[:4], tensor[:4], strict=True):
                if variable is not None:
                    variable.assign(value)
            if slot[4] is not None:
                slot[4].assign(tf.zeros_like(slot[4]))
        zero = tf.zeros_like(product)
        return outcome.momentum_product, *(zero if x is None else x for x in (outcome.grad_norm, outcome.clip_factor))

    def update(grads: list[Tensor], now: dict[str, Tensor], norms: Tensor) -> None:
        padded = [*grads, *[None] * absent]
        report = None
        if others:
            report = compiled(partial(change, others, None))([padded[i] for i in others], now, norms)
        if packed:
            report = change(packed, partial(packing.one_pass, h), [padded[i] for i in packed], now, norms)
        assert report is not None
        variables.product.assign(report[0])
        if variables.report is not None:
            variables.report.assign(tf.stack([*report[1:], variables.report[SKIPPED]]))

    def run() -> None:
        if steps is None:
            update(grads, now, norms(grads))
        else:
            updating = (variables.iterations.read_value() + 1) % steps == 0
            tf.cond(updating, lambda: update(grads, now, norms(grads)), lambda: accumulate(grads))
        variables.iterations.assign_add(1)

    if variables.report is None:
        run()
        return

    def skip() -> None:
        variables.report.assign(variables.report + tf.constant([0.0, 0.0, 1.0], variables.report.dtype))

    tf.cond(check(grads), run, skip)


def _read(slot: Sequence[Any]) -> traced.Tensor:
    return traced.Tensor(*(None if variable is None else variable.value() for variable in slot))


def _dense(variable: Any, grad: Any) -> Tensor:
    """A gradient as a tensor of its variable's shape; rows of a sparse one that come twice are added."""
    if isinstance(grad, tf.IndexedSlices):
        grad = tf.math.unsorted_segment_sum(grad.values, grad.indices, variable.shape[0])
    elif isinstance(grad, tf.SparseTensor):
        grad = tf.sparse.to_dense(grad)
    grad = tf.convert_to_tensor(grad)
    if not grad.shape.is_fully_defined() and grad.shape.is_compatible_with(variable.shape):
        grad = tf.ensure_shape(grad, variable.shape)  # which raises when it runs
    return checked_gradient(variable, grad)
