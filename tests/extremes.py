"""An epsilon that the dtype cannot hold, and gradients whose squares overflow: the same cases for every host.

A host gives a function that trains: ``train(start, all_grads, **settings)`` takes arrays of one dtype and settings by
the names of the reference, and returns the parameters after each step.
"""

import numpy as np

from cases import BFLOAT16, apart
from reference import Reference

EPSILONS = (0.0, 5e-324, 1e-60, 1e-45, 1e-40, 2e-38, 1e-8)
# A gradient of zeros; one that comes after zeros; one that zeros come after. The second moment is exact, not tiny.
NEVER, LATE, EARLY = range(3)
GRADS = ([0.0, 0.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0])
REPEATS = 7  # for vectors and for what is left over of them
# The step's scalars, rounded to the compute dtype; where a compiler has them traced, computed in it as well.
ULPS = 8.0
STOCK_ULPS = 500.0  # which take 1 - beta**t in float32

# Whose squares overflow in the dtype that is computed in.
LARGE = {"bfloat16": 1e25, "float32": 1e25, "float64": 1e200}
WHERE, COUNT = 3, 11
SETTINGS = {"learning_rate": 0.125, "epsilon": 1e-7, "beta_2": 0.999}


def steps(reference, all_grads):
    """The parameter after each step."""
    after = []
    with np.errstate(all="ignore"):
        for grads in all_grads:
            reference.step([grads])
            after.append(reference.p[0].copy())
    return after


def check_epsilon(train, epsilon, dtype="float32", ulps=ULPS, **settings):
    """Elements as the reference has them, which never move where their gradients are 0; NaN only where it has NaN."""
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    start = np.ones(len(GRADS[0]) * REPEATS, kind)
    all_grads = [np.tile(np.array(grads), REPEATS).astype(kind) for grads in GRADS]
    # At first epsilon is multiplied by the root of 1 - beta_2.
    settings = {**SETTINGS, "epsilon": epsilon, "beta_2": 0.99999, **settings}
    expected = steps(Reference([start], **settings), all_grads)
    found = train(start, all_grads, **settings)
    assert len(found) == len(expected)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == kind
        assert apart(ours, wanted, 1.0, kind) <= ulps  # which compares where NaN is
        assert np.isnan(np.float64(ours[NEVER :: len(GRADS[0])])).all() == (epsilon == 0.0)
        if epsilon:
            assert (np.float64(ours[NEVER :: len(GRADS[0])]) == 1.0).all()
    if epsilon:
        assert (np.float64(found[0][LATE :: len(GRADS[0])]) == 1.0).all()


def overflowing(dtype, calls=3):
    """Parameters of ones; gradients, of which the first has one element whose square overflows."""
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    all_grads = [np.full(COUNT, 0.5 + i, np.float64) for i in range(calls)]
    all_grads[0][WHERE] = LARGE[dtype]
    return np.ones(COUNT, kind), [grads.astype(kind) for grads in all_grads]


def others(values):
    """All elements but the one whose gradient was large."""
    return np.delete(np.float64(values), WHERE)


def check_overflow(train, dtype="float32", frozen=False, ulps=ULPS, **settings):
    """One large element: it stays where it is, and is NaN from the next step on; the others never know.

    Args:
        train: Of the host.
        dtype: Of parameters and gradients.
        frozen: Whether it stays there for ever instead, as with some stock optimizers.
        ulps: How far the others may be apart.
        **settings: Of the host's family.
    """
    start, all_grads = overflowing(dtype)
    settings = {**SETTINGS, **settings}
    expected = steps(Reference([start], **settings), all_grads)
    found = train(start, all_grads, **settings)
    assert len(found) == len(expected) > 2
    for i, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == start.dtype
        assert apart(others(ours), others(wanted), 1.0, start.dtype) <= ulps
        element = float(ours[WHERE])
        assert (element == 1.0) if frozen or i == 0 else np.isnan(element)


def check_remedies(train, dtype="float32", **settings):
    """Skipping leaves everything as it was; clipping by norm gives what float64 gives."""
    start, all_grads = overflowing(dtype)
    settings = {**SETTINGS, **settings}
    found = train(start, all_grads, skip_nonfinite=True, **settings)
    assert np.array_equal(found[0], start)
    expected = steps(Reference([start], **settings), all_grads[1:])
    for ours, wanted in zip(found[1:], expected, strict=True):
        assert apart(ours, wanted, 1.0, start.dtype) <= ULPS
    settings["global_clipnorm"] = 1.0
    found = train(start, all_grads, **settings)
    expected = steps(Reference([start], **settings), all_grads)
    for ours, wanted in zip(found, expected, strict=True):
        assert np.isfinite(np.float64(ours)).all()
        assert float(ours[WHERE]) < 1.0
        if dtype != "float64":  # where the reference's squares overflow, too
            assert apart(ours, wanted, 1.0, start.dtype) <= ULPS
