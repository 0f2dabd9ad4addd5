"""Keras on TensorFlow: the step in XLA, in place on the variables, for each replica of a tf.distribute strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from nadam.core import traced
from nadam.core.hyperparameters import Hyperparameters, Now
from nadam.keras import packing
from nadam.keras.backends import SKIPPED, Backend, Optimizer, infos_of, with_absent
from nadam.keras.slots import check_unmasked, checked_gradient

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

    def read(self, variable: Any) -> Any:
        return tf.convert_to_tensor(variable.value)  # of tf.distribute's variables this replica's

    def is_traced(self, value: Any) -> bool:
        if tf.executing_eagerly() or not tf.is_tensor(value):
            return False
        return isinstance(value, tf.Variable) or not hasattr(value, "numpy")

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

    def alone(self, optimizer: Optimizer, method: str, work: Callable[..., None], *args: Any) -> None:
        if optimizer._distribution_strategy.num_replicas_in_sync > 1:
            work(*args)  # replicas are threads that wait for one another in the middle of a step
        else:
            super().alone(optimizer, method, work, *args)

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
        infos = infos_of([slots[i] for i in indices])
        shared = [optimizer._iterations, optimizer._momentum_product, optimizer._report]
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
    given, report = variables.slots[: len(variables.slots) - absent], variables.report
    padded = [*grads, *[None] * absent]
    in_xla = control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    packed = packing.small(h, [slot[0] for slot in given], infos[: len(given)]) if alone and not in_xla else []
    others = sorted(set(range(len(variables.slots))) - set(packed))

    @compiled
    def check(grads: list[Tensor]) -> Tensor:
        return traced.usable(xp, grads, list(map(_read, given)), inv_scale, h.check())

    def note(norm: Any, factor: Any) -> None:
        if report is not None:
            report.assign(tf.stack([norm, factor, report[SKIPPED]]))

    def accumulate(*_: Any) -> None:
        for slot, grad in zip(given, grads, strict=True):
            slot[4].assign_add(traced.unscaled(xp, grad, slot[4], inv_scale))
        note(*[tf.zeros((), variables.product.dtype)] * 2)

    def norms() -> Tensor | None:
        """Not compiled by itself: XLA on the CPU takes sums on one thread, a number at a time."""
        if not h.measures_norm:
            return None
        whole = traced.summed(xp, list(map(_read, variables.slots)), padded, inv_scale)
        return traced.norms_of(xp, whole, variables.product.dtype.name, lambda g: 2.0 * tf.nn.l2_loss(g))

    def change(
        members: Sequence[int], means: traced.Means, grads: list[Tensor], now: dict[str, Tensor], norms: Tensor
    ) -> Any:
        """Update some of the parameters; gives momentum product, norm and clip factor."""
        slots, updates = [variables.slots[i] for i in members], variables.iterations.read_value() // (steps or 1)
        before = traced.Progress(updates, variables.product.read_value(), list(map(_read, slots)))
        own, current = [infos[i] for i in members], Now(**constants, **now)
        outcome = traced.update(xp, h, own, means, before, grads, current, inv_scale, norms=norms)
        for slot, tensor in zip(slots, outcome.tensors, strict=True):
            for variable, value in zip(slot[:4], tensor[:4], strict=True):
                if variable is not None:
                    variable.assign(value)
            if slot[4] is not None:
                slot[4].assign(tf.zeros_like(slot[4]))
        return outcome[1:]

    def update(*_: Any) -> None:
        seen, taken = None, norms()
        if others:
            function = compiled(partial(change, others, traced.Means(_when)))
            seen = function([padded[i] for i in others], now, taken)
        if packed:
            means = traced.Means(_when, one_pass=partial(packing.one_pass, h))
            seen = change(packed, means, [padded[i] for i in packed], now, taken)
        assert seen is not None
        product, *measured = seen
        variables.product.assign(product)
        note(*measured)

    passed = check(grads) if h.skip_nonfinite else True
    accumulates, updates = traced.decided(h, variables.iterations.read_value(), passed)
    if steps:
        _when(accumulates, accumulate, None)
    _when(updates, update, None)
    variables.iterations.assign_add(tf.cast(passed, variables.iterations.dtype))
    if report is not None and h.skip_nonfinite:
        report.assign_add(tf.where(passed, tf.zeros(3, report.dtype), tf.one_hot(SKIPPED, 3, dtype=report.dtype)))


def _when(condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    if condition is True:
        return function(carry, True)
    return tf.cond(condition, lambda: function(carry, True), lambda: carry)


def _read(slot: Sequence[Any]) -> traced.Tensor:
    return traced.Tensor(*(None if variable is None else variable.value() for variable in slot))


def _dense(variable: Any, grad: Any) -> Tensor:
    """A gradient as a tensor of its variable's shape; rows of a sparse one that come twice are added."""
    if isinstance(grad, tf.IndexedSlices):
        grad = tf.math.unsorted_segment_sum(grad.values, grad.indices, variable.shape[0])
    elif isinstance(grad, tf.SparseTensor):
        grad = tf.sparse.to_dense(grad)
    check_unmasked(variable, grad)
    grad = tf.convert_to_tensor(grad)
    if not grad.shape.is_fully_defined() and grad.shape.is_compatible_with(variable.shape):
        grad = tf.ensure_shape(grad, variable.shape)  # which raises when it runs
    return checked_gradient(variable, grad)
