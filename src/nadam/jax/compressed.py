"""Moments of 8 bits in XLA's own loops: core/compressed.py, for arrays that may be spread over devices."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec

from nadam.core import compressed
from nadam.core.traced import Tensor

try:
    from jax.sharding import reshard
except ImportError:  # JAX 0.6
    from jax.experimental.shard import reshard

Array = Any
KEPT = "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"
BITS = compressed.Bits(
    jnp,
    lambda array: lax.bitcast_convert_type(array, jnp.uint32),
    lambda array: lax.bitcast_convert_type(array, jnp.float32),
)


def widened(tensor: Tensor) -> Tensor:
    """With moments in float32, and no scales."""
    kept = [getattr(tensor, name) for name in KEPT]
    first, second = map(_placed, compressed.widened(*map(_gathered, kept), bits=BITS), kept)
    return tensor._replace(exp_avg=first, exp_avg_sq=second, exp_avg_scale=None, exp_avg_sq_scale=None)


def narrowed(old: Tensor, new: Tensor, key: Array) -> Tensor:
    """A new tensor with codes and scales, where those of the old one are."""
    made = compressed.narrowed(_gathered(new.exp_avg), _gathered(new.exp_avg_sq), key=key, bits=BITS)
    return new._replace(**{name: _placed(each, getattr(old, name)) for name, each in zip(KEPT, made, strict=True)})


def _gathered(array: Array) -> Array:
    """An array that is whole on each device of an explicit mesh: JAX lets no axes be merged that are split."""
    place = jax.typeof(array).sharding
    return reshard(array, NamedSharding(place.mesh, PartitionSpec())) if _is_explicit(place) else array


def _placed(array: Array, like: Array) -> Array:
    """An array where another one of its shape is; else XLA would put state where the sums of its blocks are."""
    place = jax.typeof(like).sharding
    if _is_explicit(place):
        return reshard(array, place)
    return shard_alike(array, like)[0] if jax.device_count() > 1 else array


def _is_explicit(place: Any) -> bool:
    return any(part is not None for part in place.spec)
