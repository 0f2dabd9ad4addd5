"""Nadam in float64, written from the documented semantics: slow, plain, and importing nothing of ours."""

import math

import numpy as np


class Reference:
    """What an optimizer with these settings does, one parameter after another.

    State is public and may be overwritten, to compare a single step from the same starting point.
    """

    def __init__(
        self,
        params,
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        momentum_decay=1.0,
        bias_correction="nadam",
        skip_nonfinite=False,
        maximize=False,
        coupled_weight_decay=False,
        eps_root=0.0,
        excluded=(),
        largest=math.inf,
        constraint=None,
    ):
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "params")}
        self.p = [np.array(p, np.float64) for p in params]
        self.m = [np.zeros_like(p) for p in self.p]
        self.v = [np.zeros_like(p) for p in self.p]
        self.ema = [p.copy() for p in self.p]
        self.acc = [np.zeros_like(p) for p in self.p]
        self.seen = [False] * len(self.p)
        self.reach = [np.zeros_like(p) for p in self.p]  # size of the last step's terms, which may cancel
        self.i, self.product, self.skipped = 0, 1.0, 0
        self.norm = self.factor = None
        self.kept = [None] * len(self.p)  # of the old averages in the last call, where it left the parameters as stored

    def momentum(self, beta, t):
        return beta * (1 - 0.5 * 0.96 ** (t * self.settings["momentum_decay"]))

    def step(self, grads):
        s, self.kept = self.settings, [None] * len(self.p)
        grads = [None if g is None else np.array(g, np.float64) / (s["loss_scale_factor"] or 1.0) for g in grads]
        assert any(g is not None for g in grads)
        if s["skip_nonfinite"] and not all(g is None or bool(np.all(np.abs(g) <= s["largest"])) for g in grads):
            self.skipped += 1
            return
        k = s["gradient_accumulation_steps"] or 1
        n = self.i // k
        lr, beta1, beta2 = (self.value(s[name]) for name in ("learning_rate", "beta_1", "beta_2"))
        self.lr = lr
        if k > 1:
            for j, g in enumerate(grads):
                if g is not None:
                    self.acc[j] = self.acc[j] + g
                    self.seen[j] = True
            if (self.i + 1) % k:
                self.i += 1
                return
            grads = [self.acc[j] / k if self.seen[j] else None for j in range(len(grads))]
            self.acc = [np.zeros_like(p) for p in self.p]
            self.seen = [False] * len(self.p)
        grads = self.clipped(grads)
        t = n + 1
        now, following = self.momentum(beta1, t), self.momentum(beta1, t + 1)
        self.product *= now
        ahead_correction = 1 - self.product * (1 if s["bias_correction"] == "adam" else following)
        for j, g in enumerate(grads):
            if g is None:
                continue
            g = -g if s["maximize"] else g
            if s["weight_decay"] and j not in s["excluded"]:
                if s["coupled_weight_decay"]:
                    g = g + s["weight_decay"] * self.p[j]
                else:
                    self.p[j] = self.p[j] - lr * s["weight_decay"] * self.p[j]
            largest = np.maximum(np.abs(self.m[j]), np.abs(g))
            self.m[j] = self.m[j] + (g - self.m[j]) * (1 - beta1)
            self.v[j] = self.v[j] + (g * g - self.v[j]) * (1 - beta2)
            ahead, here = following * self.m[j] / ahead_correction, (1 - now) * g / (1 - self.product)
            correction = -math.expm1(t * math.log(beta2)) if beta2 else 1.0  # 1 - beta2**t with all of its digits
            v_hat = np.sqrt(self.v[j] / correction + s["eps_root"]) + s["epsilon"]
            self.p[j] = self.p[j] - lr * (ahead + here) / v_hat
            ahead = following * largest / ahead_correction
            self.reach[j] = lr * (ahead + np.abs(here)) / v_hat
            if s["constraint"] is not None:
                self.p[j] = s["constraint"](self.p[j])
            if s["use_ema"]:
                d = 0.0 if t == 1 else s["ema_momentum"]
                self.ema[j] = self.p[j].copy() if t == 1 else d * self.ema[j] + (1 - d) * self.p[j]
                if s["ema_overwrite_frequency"] and t % s["ema_overwrite_frequency"] == 0:
                    self.p[j] = self.ema[j].copy()
                else:
                    self.kept[j] = d
        self.i += 1

    def value(self, setting):
        if not callable(setting):
            return setting
        try:
            return setting(self.i)
        except TypeError:
            return setting()

    def clipped(self, grads):
        s = self.settings
        norms = [0.0 if g is None else math.sqrt(float(np.sum(g * g))) for g in grads]
        self.norm, self.factor = math.sqrt(sum(x * x for x in norms)), None
        if s["clipnorm"] is not None:
            factors = [s["clipnorm"] / max(x, s["clipnorm"]) for x in norms]
            self.factor = min(f for f, g in zip(factors, grads, strict=True) if g is not None)
            return [None if g is None else g * f for g, f in zip(grads, factors, strict=True)]
        if s["global_clipnorm"] is not None:
            self.factor = s["global_clipnorm"] / max(self.norm, s["global_clipnorm"])
            return [None if g is None else g * self.factor for g in grads]
        if s["clipvalue"] is not None:
            return [None if g is None else np.clip(g, -s["clipvalue"], s["clipvalue"]) for g in grads]
        return grads
