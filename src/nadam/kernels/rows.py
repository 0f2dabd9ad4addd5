"""The tensors of a call -> the kernels' tables, for every host that has memory to point at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.kernels import spans
from nadam.kernels.layouts import axis_order, layout
from nadam.kernels.plan import Group
from nadam.kernels.table import Table, Tensors, address

Array = NDArray[Any]

# Large arrays begin at the same place of a memory page and, of equal size, lie at equal distances: reading all of them
# at once then means the same few banks of memory in turn, up to twice as slow. State that is shifted by this does not.
LARGE, SHIFT = 1 << 22, (1 << 16) + 64


class Memory(NamedTuple):
    """One tensor of a call, as NumPy arrays over its memory; of bfloat16, any dtype of that width will do."""

    param_format: str
    grad_format: str
    param: Array
    grad: Array
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None
    accumulator: Array | None
    decays: bool
    averaged: bool = True
    remainder: Array | None = None  # of a parameter that is SPLIT
    rounded: bool = False  # whether the first moment is bfloat16


def cells(made: Sequence[Group], column: int) -> list[int]:
    """Where the tables keep an address of each tensor, in the order of the call."""
    found: dict[int, int] = {}
    for group in made:
        first = address(group.table.rows) + 8 * column
        found.update((int(i), first + 8 * spans.COLUMNS * row) for row, i in enumerate(group.members))
    return [found[i] for i in range(len(found))]


def groups(
    tensors: Sequence[Memory], keep: Any = None, default_threads: Callable[[], int] | None = None
) -> list[Group]:
    """One group for all tensors with the same formats.

    Args:
        tensors: The tensors of the call, in its order.
        keep: What owns the memory.
        default_threads: As of `Table`.
    """
    alike: dict[tuple[str, str, bool, bool], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.param_format, tensor.grad_format, tensor.averaged, tensor.rounded), []).append(i)
    made = []
    for (param_format, grad_format, averaged, rounded), members in alike.items():
        rows = np.zeros((len(members), spans.COLUMNS), np.int64)
        sizes, layouts = [], []
        for row, i in zip(rows, members, strict=True):
            tensor = tensors[i]
            order = axis_order(tensor.exp_avg)
            layouts += [layout(tensor.param, order), layout(tensor.grad, order)]
            row[spans.PARAM], row[spans.GRAD] = address(tensor.param), address(tensor.grad)
            row[spans.EXP_AVG], row[spans.EXP_AVG_SQ] = address(tensor.exp_avg), address(tensor.exp_avg_sq)
            row[spans.EMA] = 0 if tensor.ema is None else address(tensor.ema)
            row[spans.REMAINDER] = 0 if tensor.remainder is None else address(tensor.remainder)
            row[spans.ACCUMULATOR] = 0 if tensor.accumulator is None else address(tensor.accumulator)
            row[spans.PARAM_LAYOUT], row[spans.GRAD_LAYOUT] = address(layouts[-2]), address(layouts[-1])
            row[spans.MEMBER] = i
            sizes.append(tensor.param.size * (2 if tensor.param.dtype.kind == "c" else 1))
        table = Table(param_format, grad_format, Tensors(rows, sizes, (keep, layouts)), default_threads, rounded)
        decays = np.array([float(tensors[i].decays) for i in members])
        made.append(Group(table, np.array(members, np.int64), decays, averaged))
    return made
