"""Where Keras's backends differ: a class each, looked up in a table. The one here computes eagerly by keras.ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from math import nan
from typing import Any

import keras
import numpy as np

from nadam.core import traced
from nadam.core.counters import Counters
from nadam.core.dtypes import COMPUTE_DTYPE
from nadam.core.exclusive import Exclusive
from nadam.core.gradient import largest_passing
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import StepReport
from nadam.keras.slots import Exclusion, Slot, checked_gradient, path_of

Optimizer = Any
# Backend -> module and class; any other (NumPy) does without what those know.
_CLASSES = {
    "torch": ("nadam.keras.on_torch", "TorchBackend"),
    "jax": ("nadam.keras.on_jax", "JaxBackend"),
    "tensorflow": ("nadam.keras.on_tensorflow", "TensorFlowBackend"),
}
# The report variable, where there is one, holds gradient norm, clip factor and, here, how many calls were skipped.
SKIPPED = 2
# What a copy of an optimizer has for itself.
OWN = ("exclusive", "counters", "unsynced", "on_cpu", "plans")


class Runtime:
    """What an optimizer has besides variables and settings. Not its variables, so Keras need not look into it."""

    def __init__(self) -> None:
        self.slots: tuple[Slot, ...] = ()
        self.overwritten = False  # whether there are variables that their gradient overwrites
        self.exclusion = Exclusion()
        self.pending: Any = None  # state that was loaded before the optimizer is built
        self.report: StepReport | None = None  # of the last eager step
        self.reported_at = (0, 0)  # calls and skipped ones after it
        self.window: tuple[int, set[int]] = (0, set())  # calls so far, and which had a gradient since the last update
        self.exclusive = Exclusive()
        self.counters: Counters | None = None
        self.unsynced: bool = False  # whether the counters may be ahead of the variables
        self.on_cpu = False
        self.plans: dict[Any, Any] = {}

    def note(self, calls: int, report: StepReport) -> None:
        """Keep what an eager step did."""
        self.report, self.reported_at = report, (calls, report.skipped_steps)

    def seen(self, calls: int) -> set[int]:
        """Which variables had a gradient since the last update, where that is known of so many calls."""
        return self.window[1] if self.window[0] == calls else set()

    def note_seen(self, calls: int, members: Sequence[int], updated: bool) -> None:
        """After a call: these variables had a gradient in it."""
        self.window = calls + 1, set() if updated else self.seen(calls) | set(members)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what belongs to this one's memory."""
        return {name: value for name, value in self.__dict__.items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(vars(Runtime()) | state)


class Backend:
    """Eager arrays through keras.ops: no kernel, right on every device."""

    keeps_codes = False  # whether it can keep moments in 8 bits

    def check_devices(self, optimizer: Optimizer, variables: Sequence[Any]) -> None:
        """Before the creation of variables: that state can be kept as is asked for where these are."""

    def building(self) -> AbstractContextManager[Any]:
        """Around the creation of variables."""
        return nullcontext()

    def near(self, optimizer: Optimizer, variable: Any) -> AbstractContextManager[Any]:
        """Around the creation of a variable's state: puts it on the same device."""
        return nullcontext()

    def alone(self, optimizer: Optimizer, method: str, work: Callable[..., None], *args: Any) -> None:
        """What a method does, ``work(*args)``, while no other thread does a step."""
        optimizer._runtime.exclusive.run(method, work, *args)

    def sync_counters(self, optimizer: Optimizer) -> None:
        """Before anyone looks at the variables."""

    def built(self, optimizer: Optimizer) -> None:
        """After the creation of all variables."""

    def finish(self, cls: type) -> None:
        """After the creation of the class."""

    def read(self, variable: Any) -> Any:
        """A variable's value, as a tensor."""
        return variable.value

    def is_traced(self, value: Any) -> bool:
        """Whether a value is a tensor that is known only when a compiled program runs."""
        return False

    def call_on_host(
        self, optimizer: Optimizer, function: Callable[[int], tuple[float, ...]], calls: Any, count: int
    ) -> Sequence[Any]:
        """What a Python function of the number of calls gives, at each step anew: ``count`` scalars."""
        return function(int(calls))

    def copy(self, optimizer: Optimizer, source: Any, target: Any) -> None:
        """Set a variable to another's value, in memory of its own."""
        target.assign(keras.ops.copy(source.value))

    def step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        """Do one call."""
        self.eager_step(optimizer, members, grads)

    def eager_step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        """One call with Python deciding what is done."""
        h, xp, slots, runtime = optimizer._hyper, keras.ops, optimizer._runtime.slots, optimizer._runtime
        calls = int(optimizer._iterations.value)
        steps = h.gradient_accumulation_steps or 1
        updating = (calls + 1) % steps == 0
        indices, grads = with_absent(h, slots, members, grads)
        owed = runtime.seen(calls) if updating else set()
        for place, i in enumerate(indices):
            if grads[place] is not None:
                grads[place] = checked_gradient(slots[i].variable, grads[place])
            elif i in owed:
                grads[place] = xp.zeros_like(slots[i].variable)
        now, before = optimizer._now(calls), self._progress(optimizer, indices)
        infos, means = infos_of([slots[i] for i in indices]), traced.Means(_when, cleared=_cleared)
        after, seen = traced.call(xp, h, infos, means, before, grads, now, 1.0 / (h.loss_scale_factor or 1.0))
        skipped, norm, factor = bool(seen.skipped), seen.grad_norm, seen.clip_factor
        if not skipped:
            self._assign(optimizer, indices, before, after)
            if steps > 1:
                runtime.note_seen(calls, members, updating)
        count = self._skipped(optimizer) + skipped
        calls = int(after.calls)
        norm, factor = (float(x) if x is not None and updating and not skipped else None for x in (norm, factor))
        if optimizer._report is not None:
            optimizer._report.assign([norm or 0.0, factor or 0.0, count])
        name = nonfinite(h, slots, indices, grads) if skipped else None
        runtime.note(calls, StepReport(calls // steps, float(now.lr), norm, factor, count, skipped, name))

    @staticmethod
    def _progress(optimizer: Optimizer, indices: Sequence[int]) -> traced.Progress:
        """The state of these variables."""
        slots = [optimizer._runtime.slots[i][:5] for i in indices]
        tensors = [traced.Tensor(*(None if v is None else getattr(v, "value", v) for v in slot)) for slot in slots]
        return traced.Progress(optimizer._iterations.value, optimizer._momentum_product.value, tensors)

    @staticmethod
    def _assign(optimizer: Optimizer, indices: Sequence[int], before: traced.Progress, after: traced.Progress) -> None:
        """Set variables, their state and the counters to what has changed of them; all, also if interrupted."""
        slots = optimizer._runtime.slots
        changed = [
            (variable, other)
            for i, old, new in zip(indices, before.tensors, after.tensors, strict=True)
            for variable, one, other in zip(slots[i][:5], old[:5], new[:5], strict=True)
            if variable is not None and one is not other
        ]
        changed += [(optimizer._iterations, after.calls), (optimizer._momentum_product, after.product)]
        try:
            for variable, value in changed:
                variable.assign(value)
        except BaseException:  # of a signal handler
            for variable, value in changed:
                variable.assign(value)
            raise

    @staticmethod
    def _skipped(optimizer: Optimizer) -> int:
        return 0 if optimizer._report is None else int(optimizer._report.numpy()[SKIPPED])

    def last_step(self, optimizer: Optimizer) -> StepReport:
        """What the last call did, as far as it is known outside of a compiled step: by its own report, or variables."""
        calls, skipped = int(optimizer._iterations.numpy()), self._skipped(optimizer)
        report = optimizer._runtime.report
        if report is None or optimizer._runtime.reported_at != (calls, skipped):
            norm, factor, _ = (None, None, 0) if optimizer._report is None else optimizer._report.numpy()
            rate = optimizer._learning_rate
            if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
                rate = rate(keras.ops.convert_to_tensor(max(calls - 1, 0)))
            elif not isinstance(rate, keras.Variable):
                rate = nan  # it is not this one's to call the user's function once more
            updates = calls // (optimizer.gradient_accumulation_steps or 1)
            report = StepReport(updates, rate, norm, factor or None, skipped)
        h = optimizer._hyper
        norm, factor = (None if x is None else float(x) for x in (report.grad_norm, report.clip_factor))
        always = h.track_grad_norm and calls and not (h.skip_nonfinite or h.gradient_accumulation_steps)
        if not factor and not norm and not always:  # what a compiled call gives that did not compute them
            norm = factor = None
        rate = report.learning_rate
        rate = float(rate.numpy() if isinstance(rate, keras.Variable) else rate)
        return StepReport(int(report.step), rate, norm, factor, skipped, report.skipped, report.nonfinite_param)


def nonfinite(h: Hyperparameters, slots: Sequence[Slot], members: Sequence[int], grads: Sequence[Any]) -> str | None:
    """The path of the first variable whose gradient does not pass the check of these settings."""
    for i, grad in zip(members, grads, strict=True):
        if grad is not None:
            dtype = COMPUTE_DTYPE[keras.backend.standardize_dtype(slots[i].variable.dtype)]
            largest = largest_passing(dtype, h.check())
            magnitudes = np.abs(np.asarray(keras.ops.convert_to_numpy(grad), np.float64)) / (h.loss_scale_factor or 1.0)
            if not (magnitudes <= largest).all():
                return path_of(slots[i].variable)
    return None


def with_absent(
    h: Hyperparameters, slots: Sequence[Slot], members: Sequence[int], grads: Sequence[Any]
) -> tuple[list[int], list[Any]]:
    """All variables that an update may move: with accumulation, also those without a gradient in this call."""
    if h.gradient_accumulation_steps is None or len(members) == len(slots):
        return list(members), list(grads)
    given = set(members)
    absent = [i for i, slot in enumerate(slots) if i not in given and slot.exp_avg is not None]
    return [*members, *absent], [*grads, *[None] * len(absent)]


def _when(condition: Any, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    return function(carry, True) if bool(condition) else carry


def _cleared(tensor: traced.Tensor, running: Any) -> traced.Tensor:
    return tensor._replace(accumulator=keras.ops.zeros_like(tensor.accumulator))


def infos_of(slots: Sequence[Slot]) -> list[traced.ParamInfo]:
    """What is known of variables before a step is compiled; those whose paths differ at the end are of one layer."""
    layers = [path_of(slot.variable).rpartition("/")[0] for slot in slots]
    ranks = {layer: rank for rank, layer in enumerate(dict.fromkeys(layers))}
    constraints = (getattr(slot.variable, "constraint", None) for slot in slots)
    rows = zip(slots, constraints, layers, strict=True)
    return [traced.ParamInfo(slot.decays, constraint, ranks[layer]) for slot, constraint, layer in rows]


def _make() -> Backend:
    module, name = _CLASSES.get(keras.backend.backend(), (__name__, "Backend"))
    made: Backend = getattr(import_module(module), name)()
    return made


backend = _make()
