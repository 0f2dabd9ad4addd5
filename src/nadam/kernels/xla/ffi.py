"""The CPU's passes inside JAX's compiled programs, through XLA's foreign function interface: one pass over memory.

Only on a machine where nothing can be split: XLA would gather a sharded array for a foreign function. Elsewhere its own
loops of the rule do the work (`core.traced`).
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from jax import numpy as jnp

from nadam.core.dtypes import COMPRESSED, COMPUTE_DTYPE, WIDE
from nadam.core.gradient import Check, largest_passing
from nadam.core.traced import ParamInfo, Pass, Tensor, dtype_of
from nadam.kernels.cpu import machine_code
from nadam.kernels.layout import CHUNK, CHUNK_COLUMNS, COLUMNS

# Scratch memory of a call in words: as in handler.py, and for each chunk what `measure` sums up.
FIXED, PER_CHUNK = 32, CHUNK_COLUMNS + 2
LARGE = 1 << 16  # elements of a tensor that has a call of its own
Array = Any


def usable() -> bool:
    """Whether compiled programs may call the passes: on the CPU, as the only device."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and sys.maxsize > 2**32 and _registered()


def one_pass(p: Pass, tensors: Sequence[Tensor], infos: Sequence[ParamInfo]) -> dict[int, Tensor]:
    """New tensors by their place, all but those with a constraint; in place where the caller donates.

    Where nothing needs all gradients together, a large tensor has a call of its own, so that its gradient is not kept
    until the last one is there. It waits for the gradients of the layer before, since the backward pass reads the
    parameters of a layer until then: XLA would copy what is written before its last reading.
    """
    alike: dict[tuple[str, str, bool], list[int]] = {}
    large: dict[int, list[int]] = {}
    early = p.early and len({info.layer for info in infos}) > 1
    for i, (tensor, grad, info) in enumerate(zip(tensors, p.gradients, infos, strict=True)):
        kind = dtype_of(tensor.param), "" if grad is None else dtype_of(grad)
        if info.constraint is None and set(kind) <= COMPUTE_DTYPE.keys():
            if early and tensor.param.size >= LARGE:
                large.setdefault(info.layer, []).append(i)
            else:
                alike.setdefault((*kind, tensor.exp_avg_scale is None), []).append(i)
    done: dict[int, Tensor] = {}
    before: list[Array] = []
    for _, members in sorted(large.items()):
        for i in members:
            done.update(_updated(p, tensors, infos, [i], before))
        before = [p.gradients[i] for i in members]
    for members in alike.values():
        done.update(_updated(p, tensors, infos, members))
    return done


def _updated(
    p: Pass, tensors: Sequence[Tensor], infos: Sequence[ParamInfo], members: Sequence[int], before: Sequence[Array] = ()
) -> dict[int, Tensor]:
    """New values of tensors of the same formats, once other arrays are there."""
    first, width = members[0], len(members)
    formats, flags = (dtype_of(tensors[first].param), dtype_of(p.gradients[first])), p.flags
    own = COMPUTE_DTYPE[formats[0]]
    s = p.scalars_in(jnp, own)
    factors = [p.factor(i) for i in members] if len(p.factors) > 1 else jnp.broadcast_to(p.factors[0], width)
    decays = [float(infos[i].decays) for i in members]
    operands = [_vector(s, own), _vector(factors, own), _vector(decays, own) * s.decay.astype(own)]
    grads = [p.gradients[i] for i in members]
    fields = ["param", "exp_avg", "exp_avg_sq", *["ema"] * flags.averaged, *["accumulator"] * flags.accumulated]
    kept = WIDE if tensors[first].exp_avg_scale is None else COMPRESSED
    if kept == COMPRESSED:
        fields += ["exp_avg_scale", "exp_avg_sq_scale"]
        operands.append(p.keys(members))
    state = [getattr(tensors[i], field) for field in fields for i in members]
    # An operand that the handler does not look at, but that the call has to wait for.
    last = [_vector([each.reshape(-1)[0] for each in before], own)] if before else []
    results = _call("one_pass", (*formats, *flags, kept), [*operands, *grads], grads, state, after=last)
    return {
        i: tensors[i]._replace(**dict(zip(fields, results[place::width], strict=True)))
        for place, i in enumerate(members)
    }


def measure(
    tensors: Sequence[Tensor], grads: Sequence[Array], inv_scale: float, accumulated: bool, check: Check
) -> tuple[Array, Array] | None:
    """The norm of each gradient, without accumulators not unscaled; and whether all values pass the check.

    None where the kernel cannot: in float64, where its sums may overflow, and of more than one format.
    """
    formats = {(dtype_of(grad), tensor.compute_dtype) for grad, tensor in zip(grads, tensors, strict=True)}
    if len(formats) != 1 or not formats <= {(name, "float32") for name in COMPUTE_DTYPE}:
        return None
    ((grad_format, own),) = formats
    counted, largest = check is not Check.NOTHING, largest_passing(own, check)
    operands = [_vector((inv_scale, largest, 1.0 if accumulated else 1.0 / inv_scale), own), *grads]
    operands += [tensor.accumulator for tensor in tensors] if accumulated else []
    shapes = [jax.ShapeDtypeStruct((len(grads),), own), jax.ShapeDtypeStruct((1,), "int32")]
    norms, outside = _call("measure", (grad_format, own, accumulated, counted), operands, grads, (), shapes)
    return norms, outside[0] == 0


def _call(
    name: str,
    variant: tuple[Any, ...],
    operands: Sequence[Array],
    grads: Sequence[Array],
    changed: Any,
    new: Any = (),
    after: Sequence[Array] = (),
) -> list[Array]:
    """What a handler of handler.py gives: what is ``changed``, in place, then results of ``new`` shapes."""
    words = FIXED + COLUMNS * len(grads) + PER_CHUNK * sum(-(-grad.size // CHUNK) for grad in grads)
    shapes = [jax.ShapeDtypeStruct((2 * words,), jnp.int32)]
    shapes += [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (*changed, *new)]
    aliases = {len(operands) + i: 1 + i for i in range(len(changed))}
    function = jax.ffi.ffi_call(_target(name, variant), shapes, input_output_aliases=aliases)
    return list(function(*operands, *changed, *after)[1:])


def _vector(values: Any, dtype: str) -> Array:
    return jnp.stack([jnp.asarray(value).astype(dtype) for value in values]) if len(values) else jnp.zeros(0, dtype)


@cache
def _target(name: str, variant: tuple[Any, ...]) -> str:
    """The name by which XLA knows a handler."""
    target = "-".join(["nadam", name, *map(str, variant)])
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(target, new_capsule(machine_code.handler(name, *variant), None, None), platform="cpu")
    return target


@cache
def _registered() -> bool:
    """Whether this version of XLA takes a handler of ours, and what it computes is right."""
    try:
        with jax.ensure_compile_time_eval():
            grad = jnp.array([3.0, 4.0], jnp.float32)
            found = measure([Tensor(grad, grad, grad, None, None)], [grad], 1.0, False, Check.NOTHING)
            return found is not None and float(found[0][0]) == 5.0
    except Exception as error:
        warnings.warn(f"nadam: on XLA's own loops, since it does not take the kernels: {error}", stacklevel=2)
        return False
