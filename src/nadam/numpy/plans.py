"""The plan for a call: gradients as the kernels take them, matched with their parameters in tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.compressed import SCALES
from nadam.core.dtypes import COMPUTE_DTYPE
from nadam.core.portable_formats import kept_moments, wide_moments

if TYPE_CHECKING:
    from nadam.kernels.cpu.pointers import Pointers

Array = NDArray[Any]

# Number format of the elements, by dtype; complex parameters are pairs of reals.
FORMATS = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}
SLOTS = ("exp_avg", "exp_avg_sq", "ema", "accumulator", *SCALES.values())


@dataclass
class Parameter:
    """One array and its state. The state lies dense in memory, in the array's own axis order."""

    name: str
    array: Array
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None
    accumulator: Array | None
    decays: bool
    exp_avg_scale: Array | None = None  # of moments of 8 bits (core/compressed.py)
    exp_avg_sq_scale: Array | None = None

    @property
    def state(self) -> dict[str, Array]:
        """The state arrays by name, those that there are."""
        arrays = {name: getattr(self, name) for name in SLOTS}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def compute_dtype(self) -> str:
        """What it is computed in; of complex numbers, their parts."""
        return "float32" if self.exp_avg_scale is not None else self.exp_avg.real.dtype.name

    @property
    def order(self) -> list[int] | None:
        """The axes of the state in memory, outermost first; None where they are those of C."""
        from nadam.kernels.strides import axis_order

        return None if self.exp_avg.flags.c_contiguous else axis_order(self.exp_avg)

    @property
    def saved(self) -> dict[str, Array]:
        """The state arrays as they are saved: codes of 8 bits, which belong to an order of memory, only of C's."""
        return self.state if self.order is None else wide_moments(self.state, self.order)

    def __getstate__(self) -> dict[str, Any]:
        """For copies. Pickle keeps no order of memory but C's and Fortran's, and codes belong to theirs."""
        codes = self.exp_avg_scale is not None
        return {**vars(self), **dict.fromkeys(SCALES.values()), **self.saved, "codes": codes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        codes = state.pop("codes")
        self.__dict__.update(state)
        self.__dict__.update(kept_moments(self.state, codes, self.order)[0])


class CachedPlan:
    """A plan, and what tells whether it fits other gradients."""

    def __init__(
        self,
        entries: Sequence[Parameter],
        grads: Sequence[Any],
        labels: Sequence[object],
        members: NDArray[np.int64],
        seed: int = 0,
    ) -> None:
        from nadam.kernels.cpu.group import TensorMemory
        from nadam.kernels.cpu.plan import KernelPlan
        from nadam.kernels.cpu.pointers import WRITEABLE, Look, Pointers, array_wanted, arrays_readable
        from nadam.kernels.strides import address

        for entry in entries:
            _check_unchanged(entry)
        arrays = [
            as_gradient(label, grad, entry.array) for label, grad, entry in zip(labels, grads, entries, strict=True)
        ]
        owners = [array for entry in entries for array in (entry.array, *entry.state.values())]
        check_apart(arrays, owners, labels)
        tensors = []
        for e, grad in zip(entries, arrays, strict=True):
            formats = FORMATS[e.array.dtype.name], FORMATS[grad.dtype.name]
            state = e.exp_avg, e.exp_avg_sq, e.ema, e.accumulator, None, e.exp_avg_scale, e.exp_avg_sq_scale
            tensors.append(TensorMemory._make([*formats, e.array, grad, *state, e.decays, True]))
        self.plan = KernelPlan(tensors, members, seed, keep=(entries, arrays))
        # Only what the kernels use in place can be swapped for another array that lies alike.
        self.reusable = arrays_readable() and all(a is g for a, g in zip(arrays, grads, strict=True))
        self._pointers: Pointers | None = None
        if self.reusable:
            fixed = [Look(e.array, array_wanted(e.array, WRITEABLE), address(e.array)) for e in entries]
            cells = self.plan.gradient_cells()
            new = [Look(g, array_wanted(g, 0), cell) for g, cell in zip(arrays, cells, strict=True)]
            self._pointers = Pointers("numpy_array", fixed, new, owners)
        # Whoever does the step holds the gradients meanwhile; afterwards they are not ours to keep.
        if self.reusable:
            arrays.clear()

    def fits(self, grads: Any) -> bool:
        """Whether gradients lie as those that this was made for; if so, their addresses are in the tables now."""
        if self._pointers is None or type(grads) not in (list, tuple):
            return False
        return self._pointers.fits(grads if type(grads) is list else list(grads))


def _check_unchanged(entry: Parameter) -> None:
    """That nobody has resized, retyped or frozen an array since the optimizer was built."""
    where, array, state = f"variables[{entry.name!r}]", entry.array, entry.exp_avg
    kept = state.dtype.name if entry.exp_avg_scale is None else entry.compute_dtype
    if array.shape != state.shape or COMPUTE_DTYPE.get(array.dtype.name, array.dtype.name) != kept:
        built = f"shape {state.shape} and state of {kept}"
        raise ValueError(f"{where}: shape {array.shape} and dtype {array.dtype}, but was built with {built}")
    check_memory(where, array)


def check_memory(where: str, array: Array) -> None:
    """That a parameter can be written to, each element by itself."""
    from nadam.kernels.strides import overlaps_itself

    if not array.flags.writeable:
        raise ValueError(f"{where}: the array is read-only")
    if overlaps_itself(array):
        raise ValueError(f"{where}: elements of the array share memory, as in one that was expanded")


def as_gradient(label: object, grad: Any, param: Array) -> Array:
    """A gradient as an array that the kernels take: itself wherever it can be."""
    where = f"grads[{label!r}]"
    if isinstance(grad, np.ma.MaskedArray):
        raise TypeError(f"{where}: expected an array, got a masked one")
    array = grad if isinstance(grad, np.ndarray) else np.asarray(grad)
    if array.shape != param.shape:
        raise ValueError(f"{where}: shape {array.shape}, expected that of its parameter, {param.shape}")
    is_complex, may_be_complex = array.dtype.kind == "c", param.dtype.kind == "c"
    if (array.dtype.kind not in "fiuc" and array.dtype.name not in FORMATS) or (is_complex and not may_be_complex):
        raise TypeError(f"{where}: dtype {array.dtype}: expected real numbers for a parameter of {param.dtype}")
    if array.dtype.name in FORMATS and array.dtype.isnative and is_complex == may_be_complex:
        return array
    return array.astype(COMPUTE_DTYPE.get(param.dtype.name, param.dtype))


def check_apart(grads: Sequence[Array], owners: Sequence[Array], labels: Sequence[object]) -> None:
    """That no gradient lies in memory that the step writes to."""
    from nadam.kernels.strides import overlapping

    found = overlapping(owners, grads)
    if found is not None:
        label = labels[found[1] - len(owners)]
        raise ValueError(f"grads[{label!r}]: it shares memory with a parameter or the optimizer's state")
