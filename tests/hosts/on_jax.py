"""`nadam.jax` as hosts: `fused` by the foreign kernels or by XLA's loops, and the transformation."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from hosts.base import RULE, STEP, Host, spelled


@contextmanager
def of_jax(wide, kernels):
    """Around what JAX does: with float64 if asked for, and with or without the foreign kernels."""
    import jax

    from nadam.kernels.xla import ffi

    with ExitStack() as stack:
        if wide:
            stack.enter_context(jax.enable_x64(True))
        if not kernels:
            stack.enter_context(patch.object(ffi, "usable", lambda: False))
        yield


# How many threads share a sum of XLA's, which changes its last bits.
ONE_THREAD = {"NPROC": "1"}


class Jax(Host):
    """`nadam.jax.fused` under jit, by the foreign kernels or by XLA's loops."""

    options, missing, mixed = frozenset(STEP), False, True
    needs, environment = ("jax", "optax"), ONE_THREAD

    def __init__(self, kernels=True):
        self.kernels = kernels

    def surroundings(self):
        return of_jax(self.wide, self.kernels)

    def _build(self, params, settings):
        import jax

        from nadam.jax import fused

        scale = settings.pop("loss_scale_factor", None)
        optimizer = fused(**self.spelled(settings, len(params)))
        step = getattr(optimizer, "step", None) or optimizer.update
        if scale is None:
            self.program = jax.jit(step, donate_argnums=(1, 2))
        else:  # a traced number, and a function that is not the step itself
            jitted = jax.jit(lambda scale, *given: step(*given, loss_scale=scale), donate_argnums=(2, 3))
            self.program = lambda *given: jitted(scale, *given)
        self.params = jax.tree.map(jax.numpy.array, params)
        self.optimizer, self.kept = optimizer, optimizer.init(self.params)

    @staticmethod
    def spelled(settings, count):
        excluded = settings.pop("excluded", ())
        mask = [i not in excluded for i in range(count)] if excluded else None
        return {**spelled(settings, lr="learning_rate", beta1="b1", beta2="b2", exp_avg_dtype="mu_dtype"), "mask": mask}

    def _step(self, grads):
        self.params, self.kept = self.program(grads, self.kept, self.params)

    def _state(self):
        kept = self.kept
        found = {"params": self.params, "exp_avg": kept.mu, "exp_avg_sq": kept.nu}
        found |= {"ema": kept.ema, "accumulator": kept.accumulator}
        counters = {"calls": kept.count, "momentum_product": kept.mu_product, "skipped": kept.last_step.skipped_steps}
        return {**found, **{name: [value] for name, value in counters.items()}}

    def _last_step(self):
        return self.kept.last_step

    def _stateful(self):
        return self.optimizer, self.kept

    def _resumed(self, state, params):
        self.kept, self.params = state, list(params.values())


class JaxTransform(Jax):
    """`nadam.jax.nadamw` under jit."""

    options, thorough = frozenset(RULE | {"exp_avg_dtype", "eps_root"}), False

    def _build(self, params, settings):
        import jax
        import optax

        from nadam.jax import nadamw

        settings["weight_decay"] = settings.get("weight_decay") or 0.0
        optimizer = nadamw(**self.spelled(settings, len(params)))

        def program(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.program = jax.jit(program)
        self.params = jax.tree.map(jax.numpy.array, params)
        self.optimizer, self.kept = optimizer, optimizer.init(self.params)

    def _state(self):
        moments = self.kept[0]
        product = [moments.mu_product] if hasattr(moments, "mu_product") else []
        found = {"params": self.params, "exp_avg": moments.mu, "exp_avg_sq": moments.nu}
        return {**found, "calls": [moments.count], "momentum_product": product}

    def _last_step(self):
        return None
