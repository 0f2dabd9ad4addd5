"""Steps of nadam.Nadam beside the float64 reference, each from the same starting point, compared in ulps."""

import inspect

import numpy as np

import nadam
from cases import BFLOAT16, apart
from reference import Reference

# Of a parameter: the step's scalars and moments are rounded to the compute dtype, half a unit each, and the compiler
# may fuse a multiplication with an addition; half precision rounds once more, on store.
PARAM_ULPS, MOMENT_ULPS = 4.0, 4.0


def reference_for(params, settings, **more):
    """A reference with the same settings; a schedule that needs the step gets it."""
    known = {k: v for k, v in settings.items() if k in inspect.signature(Reference).parameters}
    return Reference([np.asarray(p, np.float64) for p in params], **known, **more)


def adopt(reference, optimizer):
    """Put the optimizer's state into the reference: both then do the same step."""
    parameters = optimizer._parameters
    for j, entry in enumerate(parameters.entries):
        reference.p[j] = np.array(entry.array, np.float64)
        reference.m[j], reference.v[j] = np.array(entry.exp_avg, np.float64), np.array(entry.exp_avg_sq, np.float64)
        if entry.ema is not None:
            reference.ema[j] = np.array(entry.ema, np.float64)
        if entry.accumulator is not None:
            reference.acc[j] = np.array(entry.accumulator, np.float64)
    reference.seen = [bool(seen) for seen in parameters.counters.seen]
    assert reference.i == parameters.counters.calls
    assert reference.skipped == parameters.counters.skipped
    reference.product = parameters.counters.momentum_product


def follow(optimizer, reference, params, all_grads, factor=1.0):
    """Do one step per list of gradients with both, and compare everything after each.

    Args:
        factor: How many times the usual distance is allowed, with a reason.
    """
    optimizer.build(params)
    for grads in all_grads:
        adopt(reference, optimizer)
        before = [np.array(p, np.float64) for p in params]
        old_m, old_v, old_acc = ([x.copy() for x in s] for s in (reference.m, reference.v, reference.acc))
        kept = [None if g is None else np.array(g) for g in grads]
        optimizer.apply(grads)
        reference.step(grads)
        assert optimizer._parameters.counters.calls == reference.i
        assert optimizer._parameters.counters.skipped == reference.skipped
        inv_scale = 1.0 / (reference.settings["loss_scale_factor"] or 1.0)
        for j, entry in enumerate(optimizer._parameters.entries):
            g = 0.0 if grads[j] is None else np.abs(np.asarray(grads[j], np.float64)) * inv_scale
            g = g + np.abs(old_acc[j])
            compute = entry.exp_avg.dtype
            scale = np.maximum(np.abs(before[j]), reference.reach[j])
            narrow = entry.array.dtype != compute and entry.array.dtype.kind != "c"
            assert apart(entry.array, reference.p[j], scale, entry.array.dtype) <= PARAM_ULPS * factor
            assert (
                apart(entry.exp_avg, reference.m[j], np.maximum(np.abs(old_m[j]), g), compute) <= MOMENT_ULPS * factor
            )
            scale = np.maximum(np.abs(old_v[j]), g * g)
            assert apart(entry.exp_avg_sq, reference.v[j], scale, compute) <= MOMENT_ULPS * factor
            if entry.ema is not None:
                scale = np.maximum(np.abs(before[j]), reference.reach[j])
                # The average is of the parameter as it is stored, which in half precision is a unit of it away.
                coarse = 2.0**-7 if entry.array.dtype == BFLOAT16 else 2.0**-10
                tolerance = MOMENT_ULPS * factor + (coarse / np.finfo(compute).eps if narrow else 0.0)
                assert apart(entry.ema, reference.ema[j], scale, compute) <= tolerance
            if entry.accumulator is not None:
                assert apart(entry.accumulator, reference.acc[j], g, compute) <= 2.0  # scale, product, sum
            if kept[j] is not None:
                assert np.array_equal(kept[j], grads[j], equal_nan=kept[j].dtype.kind in "fc")
    return optimizer


def run(settings, params, all_grads, **more):
    """`follow` from the constructor's arguments."""
    return follow(nadam.Nadam(**settings), reference_for(params, settings, **more), params, all_grads)
