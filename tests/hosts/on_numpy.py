"""`nadam.Nadam` as a host."""

from hosts.base import CALLABLES, MOMENTS, SCALES, STEP, Host, spelled


class Numpy(Host):
    """`nadam.Nadam`."""

    options = frozenset(STEP | CALLABLES | {"state_bits", "seed"})
    dtypes = (*Host.dtypes, "complex64")
    mixed = True

    def _build(self, params, settings):
        from nadam import Nadam

        excluded = settings.pop("excluded", ())
        names = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
        self.params, self.optimizer = params, Nadam(**spelled(settings, **names))
        self.optimizer.exclude_from_weight_decay(var_list=[params[i] for i in excluded])
        self.optimizer.build(params)

    def _step(self, grads):
        self.optimizer.apply(grads)

    def _state(self):
        found = self.optimizer.state_dict()
        entries = found["state"].values()
        kept = {name: [e[name] for e in entries if name in e] for name in (*MOMENTS, *SCALES, "ema", "accumulator")}
        seen = [str(name) in found["accumulated"] for name in found["state"]]
        counters = {"calls": [found["iteration"]], "momentum_product": [found["momentum_product"]]}
        return {"params": self.params, **kept, **counters, "skipped": [found["skipped_steps"]], "seen": [seen]}
