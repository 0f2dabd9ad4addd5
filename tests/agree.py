"""Steps of a host beside the float64 reference, each from the same starting point, compared in ulps."""

import numpy as np

from arguments import DEFAULTS, cases, problem
from cases import BFLOAT16, apart
from hosts import HOSTS
from hosts.base import MOMENTS, spelled
from reference import Reference

STEPS = 7  # two windows of each length that is accumulated over, an overwrite, a skipped call
SHAPES = [(7, 5), (), (257,), (0, 3)]
CONSTRAINTS = {"NonNeg": lambda param: np.maximum(param, 0.0)}  # of Keras, by name


def runs(names):
    """Every case of some hosts that the reference knows."""
    found = [(name, case) for name in names for case in cases(HOSTS[name]())]
    # A parameter of PyTorch's that misses a gradient has its own momentum product, which the reference has not.
    return [(name, case) for name, case in found if not (case.missing and name.split()[0] in ("torch", "triton"))]


def step_against_reference(name, case, given=None):
    """Run a host and compare params, state and report after every step with what the reference makes of the last.

    Args:
        name: Of the host.
        case: Settings and dtypes.
        given: Parameters and the gradients of each step, instead of those that are drawn for the case.

    Raises:
        AssertionError: Something is further apart than `allowed`.
    """
    host = HOSTS[name]()
    host.shapes = SHAPES
    params, all_grads = given or problem(case, host, STEPS)
    settings = DEFAULTS | case.settings
    names = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
    known = spelled({k: v for k, v in settings.items() if k not in ("remainder", "exp_avg_dtype", "seed")}, **names)
    known["constraint"] = CONSTRAINTS.get(settings.get("constraint"))
    reference = Reference([wide(p) for p in params], **known)
    host.build(params, settings)
    before = host.state()
    for step, grads in enumerate(all_grads):
        adopt(reference, before)
        start = Start(reference, grads)
        host.step(grads)
        with np.errstate(divide="ignore", invalid="ignore"):  # without an epsilon
            reference.step([None if g is None else wide(g) for g in grads])
        after = host.state()
        for what, far, most in distances(reference, start, after, allowed(name, case)):
            assert far <= most, f"{name}, {case}, step {step}: {what}: {far:.1f} ulps apart, at most {most:.1f}"
        check_counters(reference, after)
        if reference.i > start.calls:
            check_report(reference, host.report())
        assert all(g is None or g.tobytes() == kept for g, kept in zip(grads, start.grads, strict=True))
        before = after


class Start:
    """What a step began with, whose size is that of what is rounded in it."""

    def __init__(self, reference, grads):
        s, self.calls, self.ema = reference.settings, reference.i, reference.ema.copy()
        self.p, self.m, self.v = ([np.abs(x) for x in kept] for kept in (reference.p, reference.m, reference.v))
        self.grads = [None if g is None else g.tobytes() for g in grads]
        scaled = [0.0 if g is None else np.abs(wide(g)) / (s["loss_scale_factor"] or 1.0) for g in grads]
        self.g = [g + np.abs(acc) for g, acc in zip(scaled, reference.acc, strict=True)]
        if s["coupled_weight_decay"]:
            self.g = [g + s["weight_decay"] * p for g, p in zip(self.g, self.p, strict=True)]


def wide(array):
    """In float64; of complex numbers, both parts."""
    array = np.asarray(array)
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], axis=-1)
    return array.astype(np.float64)


def joined(state):
    """Parameters, with the remainder of those that have one, and the dtypes that they then have."""
    if "remainder" not in state:
        return [(p, p.real.dtype) for p in state["params"]]
    halves = [p.view(np.uint16).astype(np.int32) << 16 for p in state["params"]]
    wholes = [h + r.astype(np.int32) for h, r in zip(halves, state["remainder"], strict=True)]
    return [(np.asarray(w).view(np.float32), np.dtype(np.float32)) for w in wholes]


def adopt(reference, state):
    """Put a host's state into the reference: both then do the same step."""
    reference.p = [wide(p) for p, _ in joined(state)]
    kept = {"m": "exp_avg", "v": "exp_avg_sq", "ema": "ema", "acc": "accumulator"}
    for ours, theirs in kept.items():
        if len(state.get(theirs, ())) == len(reference.p):  # PyTorch's are made by the first step
            setattr(reference, ours, [wide(array) for array in state[theirs]])
    if "momentum_product" in state:
        reference.product = float(state["momentum_product"][0])
    if "seen" in state:
        reference.seen = state["seen"][0].tolist()


def distances(reference, start, state, limits):
    """Of each array: what it is, how far it is from the reference's, and how far it may be."""
    param_ulps, moment_ulps = limits
    for j, (param, dtype) in enumerate(joined(state)):
        compute = state["exp_avg_sq"][j].real.dtype if "exp_avg_sq" in state else dtype
        scale = np.maximum(start.p[j], reference.reach[j])
        yield f"params[{j}]", apart(wide(param), reference.p[j], scale, dtype), param_ulps
        if "ema" in state:
            # The average is of the parameter as it is stored, which in half precision is a unit of it away.
            coarse, kept = {BFLOAT16: 2.0**-7, np.dtype(np.float16): 2.0**-10}.get(dtype, 0.0), reference.kept[j]
            expected, most = reference.ema[j], param_ulps + coarse / np.finfo(compute).eps
            if coarse and kept is not None:  # so of the host's own, unless the average has overwritten it
                expected, most = kept * start.ema[j] + (1.0 - kept) * wide(param), param_ulps
                scale = np.maximum(np.abs(start.ema[j]), np.abs(wide(param)))
            yield f"ema[{j}]", apart(wide(state["ema"][j]), expected, scale, compute), most
        if "accumulator" in state:  # scale, product, sum
            far = apart(wide(state["accumulator"][j]), reference.acc[j], start.g[j], compute)
            yield f"accumulator[{j}]", far, 2.0
        largest = start.m[j] + start.g[j], start.v[j] + start.g[j] ** 2
        for name, ours, size in zip(MOMENTS, (reference.m, reference.v), largest, strict=True):
            if name in state:
                kept = state[name][j]
                yield f"{name}[{j}]", apart(wide(kept), ours[j], size, kept.real.dtype), moment_ulps


def check_counters(reference, state):
    assert int(state["calls"][0]) == reference.i
    assert int(state.get("skipped", [0])[0]) == reference.skipped
    if "momentum_product" in state:
        assert np.isclose(float(state["momentum_product"][0]), reference.product, rtol=2e-7, atol=0)


def check_report(reference, report):
    """Of a call that was not skipped; norm and factor, where the host tells them, of one that updates."""
    if report is None:
        return
    steps = reference.settings["gradient_accumulation_steps"] or 1
    step, lr, norm, factor, skipped, was_skipped = report
    assert np.isclose(lr, reference.lr, rtol=1e-6, atol=0) or np.isnan(lr)  # which Keras does not know of a callable
    assert (step, skipped, was_skipped) == (reference.i // steps, reference.skipped, False)
    if reference.i % steps == 0:
        for ours, theirs in ((norm, reference.norm), (factor, reference.factor)):
            assert ours is None or np.isclose(ours, theirs, rtol=1e-6, atol=0)


def allowed(name, case):
    """How many ulps parameters and averages, and moments, may be off."""
    # Half of one for each of a step's scalars and of its products and sums, which a compiler may fuse; where it traces
    # the scalars, they are computed in float32 as well.
    params = 6.0 if name.startswith(("jax", "keras")) else 4.0
    if case.settings.get("beta2") == 0.0:
        params *= 20.0  # a second moment that falls from 10 to 0.1 keeps the rounding of 10
    # Of the factor up to a whole unit of the gradient, then half of one each for product, difference and sum.
    return params, 2.5
