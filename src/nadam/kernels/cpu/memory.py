"""Memory by address, for Numba: pointers, scratch, and tensors that are not dense."""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from nadam.kernels.cpu.formats import FORMATS

# Elements of a strided tensor that are copied out at a time; on the stack, so few.
PIECE = 2048


def atomic_add(amount: int, ordering: str) -> Callable[..., Any]:
    """Address -> what the int64 there was before the amount was added, atomically."""

    @intrinsic
    def add(typing: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            counter = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
            return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), amount), ordering)

        return types.int64(types.int64), build

    return add  # type: ignore[no-any-return]


fetch_add = atomic_add(1, "monotonic")


@cache
def pointer_to(storage: Any) -> Callable[..., Any]:
    """Address -> pointer to elements of a Numba type."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        target = types.CPointer(storage)
        return target(types.int64), lambda context, b, sig, args: b.inttoptr(args[0], context.get_value_type(target))

    return pointer  # type: ignore[no-any-return]


integers = pointer_to(types.int64)
doubles = pointer_to(types.float64)


@cache
def fields_of(record: Any, storage: Any) -> Callable[..., Any]:
    """Address -> a NamedTuple of numbers that lie there in its order."""

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        made = types.NamedUniTuple(storage, len(record._fields), record)

        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = builder.inttoptr(args[0], context.get_value_type(types.CPointer(storage)))
            places = [ir.Constant(ir.IntType(64), i) for i in range(len(record._fields))]
            values = [builder.load(builder.gep(first, [place])) for place in places]
            return context.make_tuple(builder, made, values)

        return made(types.int64), build

    return load  # type: ignore[no-any-return]


@cache
def access(format_name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(scratch, opened, closed): part of a tensor as contiguous memory, and back.

    A dense tensor is used where it lies. Any other (strided, reversed, unaligned, expanded) is copied out to scratch
    and back, so that the arithmetic, and with it every bit, is the same.
    """
    storage, width = FORMATS[format_name].storage, FORMATS[format_name].width
    pointer = pointer_to(storage)
    target = types.CPointer(storage)

    @intrinsic
    def scratch(typing: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return cgutils.alloca_once(builder, context.get_data_type(storage), size=PIECE)

        return target(), build

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], context.get_value_type(target)))
            value.align = 1  # a strided array may lie at any address
            return value

        return storage(types.int64), build

    @intrinsic
    def store(typing: Any, address: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], context.get_value_type(target))).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, storage), build

    @njit(inline="always")
    def address_of(base, layout, index):
        dims = layout[0]
        for d in range(dims, 0, -1):
            base += (index % layout[d]) * layout[dims + d]
            index //= layout[d]
        return base

    @njit(error_model="numpy")
    def opened(base, layout, start, count, into):
        if layout[0] < 0:
            return pointer(base + start * width)
        for i in range(count):
            into[i] = load(address_of(base, layout, start + i))
        return into

    @njit(error_model="numpy")
    def closed(values, base, layout, start, count):
        if layout[0] >= 0:
            for i in range(count):
                store(address_of(base, layout, start + i), values[i])

    return scratch, opened, closed
