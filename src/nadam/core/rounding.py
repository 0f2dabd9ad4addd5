"""Keys of stochastic rounding: one for each tensor and step, from which its elements have theirs.

In array operations of NumPy or JAX, all in uint32; the step may be traced.
"""

from typing import Any

import numpy as np

Array = Any


def hash32(index: Array, key: Any) -> Array:
    """32 bits that look like chance, of an index and a key: Wellons's lowbias32, a finalizer of murmur3's kind.

    Example:
        >>> hash32(np.arange(2, dtype=np.uint32), 7).tolist()
        [2492178918, 2803216774]
    """
    x = index * np.uint32(0x9E3779B9) ^ key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    return x ^ x >> np.uint32(16)


def step_key(seed: int, step: Any) -> Array:
    """``hash32(step, seed)``, of an int in an array of one."""
    known = isinstance(step, int)
    return hash32(np.array([step & 0xFFFFFFFF], np.uint32) if known else step.astype(np.uint32), np.uint32(seed))


def keys(seed: int, step: Any, members: Array) -> Array:
    """The keys of the tensors of a call: ``hash32(tensor, hash32(step, seed))``.

    Element i of a tensor is then rounded by the upper 16 bits of ``hash32(i, key)``, or by `compressed.noise`.

    Example:
        >>> keys(0, 1, np.arange(2)).tolist() == hash32(np.arange(2, dtype=np.uint32), step_key(0, 1)).tolist()
        True
    """
    return hash32(members.astype(np.uint32), step_key(seed, step))
