"""A tensor group: tensors of the same number formats, which one call of a kernel does together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import CounterBuffers
from nadam.core.dtypes import COMPRESSED, COMPUTE_DTYPE, HALF, LARGEST, SMALLEST_NORMAL, SPLIT8, WIDE
from nadam.core.element import Flags
from nadam.core.scalars import Scalars, clamp_eps
from nadam.kernels import layout as at
from nadam.kernels.cpu import machine_code
from nadam.kernels.cpu.machine_code import Kernel
from nadam.kernels.cpu.threads import Sharing
from nadam.kernels.strides import address, axis_order, layout

Array = NDArray[Any]


class TensorMemory(NamedTuple):
    """One tensor of a call, as NumPy arrays over its memory; of bfloat16, any dtype of that width will do."""

    param_format: str
    grad_format: str
    param: Array
    grad: Array
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None
    accumulator: Array | None
    remainder: Array | None  # of a parameter that is SPLIT
    exp_avg_scale: Array | None  # of moments that are COMPRESSED
    exp_avg_sq_scale: Array | None
    decays: bool
    averaged: bool = True  # whether the pass keeps the moving average, or the host does after it

    @property
    def kept(self) -> str:
        """How the moments are kept."""
        if self.exp_avg_scale is not None:
            return COMPRESSED
        return HALF if self.exp_avg.itemsize < self.exp_avg_sq.itemsize else WIDE

    @property
    def kind(self) -> tuple[str, str, bool, str]:
        """What the tensors of a group have in common."""
        return self.param_format, self.grad_format, self.averaged, self.kept


class TensorGroup:
    """Tensors of one kind, cut into chunks, and the passes over them.

    Not for two threads at once. The arguments of its kernels live in buffers that it reuses, so that a step allocates
    nothing. ``members`` are their places among the call's tensors, ``keep`` owns the memory, and ``default_threads``
    tells how many threads a framework uses, where nobody asks for another number.
    """

    def __init__(
        self,
        tensors: Sequence[TensorMemory],
        members: Sequence[int],
        keep: Any = None,
        default_threads: Callable[[], int] | None = None,
    ) -> None:
        param_format, grad_format, self.averaged, self.kept = tensors[0].kind
        self.rounds = self.kept != WIDE or param_format == SPLIT8  # stochastically
        self.members, self.decays = np.array(members, np.int64), np.array([float(tensor.decays) for tensor in tensors])
        self.rows, self.sizes, layouts = _descriptors(tensors, members)
        self.keep = keep, layouts
        compute = self.compute = COMPUTE_DTYPE[param_format]
        self.chunks = at.cut_into_chunks(self.sizes)
        size = sum(self.sizes), len(self.chunks)
        # One for each pass: what is faster for one tells nothing of another.
        self.sharing = {name: Sharing(*size, default_threads) for name in ("one_pass", "accumulate", "measure")}
        self.largest, self.smallest = LARGEST[compute], SMALLEST_NORMAL[compute]
        n = len(self.sizes)
        self._factors, self._decays = np.ones(n, compute), np.zeros(n, compute)
        self._bounds, self._scale = np.zeros(2, compute), np.ones(1)
        self._scalars = np.zeros(len(Scalars._fields), compute)
        self._pack_scalars = Struct(f"{len(Scalars._fields)}{'f' if compute == 'float32' else 'd'}")
        self._totals, self._outside = np.zeros(len(self.chunks)), np.zeros(len(self.chunks), np.int64)
        self._control = np.zeros(2, np.int64)
        self.shared = self._control.data  # the same, faster to read
        self.keys = np.zeros(n, np.uint32)  # of the stochastic rounding, new at every step
        self._blocks = {
            "one_pass": self._block(self._factors, self._decays, self._scalars, self.keys),
            "accumulate": self._block(self._bounds),
            "measure": self._block(self._bounds, self._scale, self._totals, self._outside),
        }
        self._formats = {"one_pass": (param_format, grad_format)}
        self._formats["accumulate"] = self._formats["measure"] = grad_format, compute
        self._kernels: dict[tuple[str, tuple[Any, ...]], Kernel] = {}
        self._buffers: dict[str, CounterBuffers] = {}
        self._multipliers: Any = None

    def _block(self, *extra: Array) -> tuple[NDArray[np.int64], int]:
        common = [address(self._control), len(self.chunks), address(self.rows), address(self.chunks), 0, 0, 0, 0]
        block = np.array([*common, *map(address, extra)], np.int64)
        return block, address(block)

    def ready(self, name: str, buffers: CounterBuffers | None, *variant: Any) -> tuple[Kernel, int]:
        """The kernel of a pass, and the address of its arguments."""
        kernel = self._kernels.get((name, variant))
        if kernel is None:
            made = machine_code.kernel("passes", name, *self._formats[name], *variant)
            kernel = self._kernels[name, variant] = made
        block, address_of_block = self._blocks[name]
        if buffers is not None and buffers is not self._buffers.get(name):
            self._buffers[name] = buffers
            current, after, shown = buffers
            block[at.COUNTERS : at.EXTRA] = address(current), address(after), len(current), shown
        return kernel, address_of_block

    def _run(self, name: str, buffers: CounterBuffers | None, *variant: Any) -> None:
        self.sharing[name].run(*self.ready(name, buffers, *variant), self.shared)

    def measure(
        self, inv_scale: float, accumulated: bool, largest: float | None = None, scale: float = 1.0
    ) -> tuple[NDArray[np.float64], int]:
        """The sum of squares of each gradient, in chunk order whatever the threads; how many values are too large.

        Counted are values whose magnitude, times ``inv_scale`` and without the accumulator, is not at most ``largest``;
        with it, values are multiplied by ``scale`` before they are squared.
        """
        counted = largest is not None
        self._bounds[:] = inv_scale, largest or 0.0
        self._scale[0] = scale
        self._totals[:], self._outside[:] = 0.0, 0
        self._run("measure", None, accumulated, counted)
        sums = np.zeros(len(self.sizes))
        np.add.at(sums, self.chunks[:, at.TENSOR], self._totals)
        if not (accumulated or counted):
            sums *= inv_scale**2
        return sums, int(self._outside.sum())

    def set_multipliers(self, grad_factors: Sequence[float] | float, decay: float) -> None:
        """What multiplies each tensor's gradient, or all of them, and how much of each parameter decays."""
        wanted = (grad_factors, decay)
        if wanted != self._multipliers:
            self._multipliers = None
            self._factors[:] = grad_factors
            np.multiply(self.decays, decay, out=self._decays, casting="same_kind")
            self._multipliers = wanted

    def forget_multipliers(self) -> None:
        """Somebody else writes them."""
        self._multipliers = None

    def accumulate(self, inv_scale: float, buffers: CounterBuffers) -> None:
        """Add the unscaled gradients to the accumulators."""
        self._bounds[0] = inv_scale
        self._run("accumulate", buffers)

    def update(self, s: Scalars, flags: Flags, buffers: CounterBuffers) -> None:
        """The one pass, after `set_multipliers`."""
        s = s._replace(eps=clamp_eps(s.eps, s.eps, self.smallest))
        self._pack_scalars.pack_into(self._scalars.data, 0, *s)  # five times as fast as NumPy's assignment
        self._run("one_pass", buffers, *flags, self.kept)


def _descriptors(
    tensors: Sequence[TensorMemory], members: Sequence[int]
) -> tuple[NDArray[np.int64], list[int], list[Array]]:
    """A row per tensor, as layout.py has it; their sizes; what the rows point to besides their memory."""
    rows = np.zeros((len(tensors), at.COLUMNS), np.int64)
    sizes: list[int] = []
    layouts: list[Array] = []
    for row, tensor, member in zip(rows, tensors, members, strict=True):
        order = axis_order(tensor.exp_avg)
        own = layout(tensor.param, order), layout(tensor.grad, order)
        arrays = *tensor[2:11], *own  # in the order of the row
        row[:] = *(0 if array is None else address(array) for array in arrays), member
        layouts += own
        sizes.append(tensor.param.size * (2 if tensor.param.dtype.kind == "c" else 1))
    return rows, sizes, layouts
