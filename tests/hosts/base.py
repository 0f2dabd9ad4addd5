"""What a host is, and which settings there are."""

from contextlib import nullcontext
from importlib.util import find_spec
from types import MappingProxyType

import numpy as np

RULE = {"lr", "lr schedule", "beta1", "beta2", "eps", "weight_decay", "excluded", "momentum_decay", "bias_correction"}
CLIPS = {"clipnorm", "clipvalue", "global_clipnorm"}
AVERAGE = {"use_ema", "ema_momentum", "ema_overwrite_frequency"}
STEP = RULE | CLIPS | AVERAGE | {"gradient_accumulation_steps", "skip_nonfinite", "loss_scale_factor"}
CALLABLES = {"lr callable", "beta1 callable", "beta2 callable"}
HALVES = ("bfloat16", "float16")
SHAPES = [(7, 5), (), (257,), (0, 3), (40_000,)]  # of which the last has more than one chunk
SMALL = [(3, 4), (), (5,), (0, 2), (2, 3, 2)]
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")  # where moments are kept in 8 bits


class Host:
    """An optimizer with its parameters.

    Attributes:
        options: Settings that it has, by core's names; ``lr schedule``, ``lr callable``, ... where one is computed.
        dtypes: Of parameters.
        missing: Whether a gradient may be None.
        mixed: Whether gradients may have another dtype than their parameters.
        dense: Whether parameters are to be dense in memory.
        shapes: Of parameters, that it takes in reasonable time.
        steps: Likewise.
        thorough: Whether it is run with each option alone, rather than in combinations: not every way of one host's to
            compile the same functions, for the time that takes.
        environment: Variables that its process has to have begun with.
        needs: Modules.
    """

    options = frozenset(STEP)
    dtypes = ("float32", "float64", *HALVES)
    missing, mixed, dense = True, False, False
    shapes, steps, thorough = SHAPES, 50, True
    environment = MappingProxyType({})
    needs = ()

    def available(self):
        """Whether its modules are installed; a folder of tests of that name is none."""
        return all(spec is not None and spec.origin is not None for spec in map(find_spec, self.needs))

    def build(self, params, settings):
        """Make the optimizer; the parameters are the host's from now on."""
        self.settings, self.wide = dict(settings), any(p.dtype == np.float64 for p in params)
        with self.surroundings():
            self._build(params, dict(settings))

    def step(self, grads):
        with self.surroundings():
            self._step(grads)

    def state(self):
        """Copies of params, exp_avg, exp_avg_sq, ema, accumulator, remainder and counters, as far as there are such."""
        with self.surroundings():
            return {name: [np.array(value) for value in values] for name, values in self._state().items() if values}

    def save(self, path):
        """Write the optimizer's state and the parameters to a file."""
        from nadam import checkpoint

        with self.surroundings():
            checkpoint.save(path, self._stateful(), self._named())

    def load(self, path):
        """Go on from a file that any host has written, whose parameters are in the same order."""
        from nadam import checkpoint

        own = list(self._named())
        with self.surroundings():
            made = checkpoint.load(path, self._stateful(), self._named(), rename=lambda n: own[int(n.strip("p"))])
            self._resumed(*made)

    def report(self):
        """What the last step did, in numbers of Python; None where the host does not say."""
        with self.surroundings():
            last = self._last_step()
        if last is None:
            return None
        norm, factor = (None if x is None else float(x) for x in (last.grad_norm, last.clip_factor))
        return [int(last.step), float(last.learning_rate), norm, factor, int(last.skipped_steps), bool(last.skipped)]

    def surroundings(self):
        """Around all that the host does."""
        return nullcontext()

    def _last_step(self):
        return self.optimizer.last_step

    def _stateful(self):
        """What has the state."""
        return self.optimizer

    def _named(self):
        """The parameters by name."""
        return {str(i): param for i, param in enumerate(self.params)}

    def _resumed(self, optimizer, params):
        """After loading."""


def spelled(settings, **names):
    """Settings by a host's names."""
    return {names.get(name, name): value for name, value in settings.items()}
