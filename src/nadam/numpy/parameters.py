"""NumPy arrays as parameters: what may be one, their state, and the plan for a call's gradients."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.compressed import is_compressed, num_scales
from nadam.core.config import warn_of_unused
from nadam.core.counters import Counters
from nadam.core.dtypes import COMPUTE_DTYPE
from nadam.core.gradient import Check, largest_passing
from nadam.numpy.plans import FORMATS, CachedPlan, Parameter, check_memory

if TYPE_CHECKING:
    from nadam.kernels.cpu.plan import KernelPlan

Array = NDArray[Any]

# Plans for different sets of gradients that are kept, as for a model whose halves are trained in turn.
PLANS_KEPT = 8

_IN_PLACE = "assign in place, variables[{!r}][...] = ..., or build another optimizer"
_ANOTHER = f"another array than the optimizer was built with; {_IN_PLACE}"


@dataclass
class Exclusion:
    """What is excluded from weight decay: arrays, and patterns that are searched for in names."""

    arrays: list[Array]
    patterns: list[str]

    def covers(self, name: str, array: Array) -> bool:
        """Whether a parameter is excluded."""
        return any(array is other for other in self.arrays) or any(re.search(p, name) for p in self.patterns)

    def warn_of_unused(self, arrays: Mapping[str, Array]) -> None:
        """Warn where the patterns fit no parameter, or an array is none: what was meant would decay all the same."""
        known = set(map(id, arrays.values()))
        strangers = [f"var_list, an array of shape {each.shape}" for each in self.arrays if id(each) not in known]
        warn_of_unused(self.patterns, list(arrays), strangers, "parameters")


def _zeros(array: Array, dtype: np.dtype[Any], place: int) -> Array:
    """Zeros for a parameter's state: dense, in its axis order, and where large, shifted by a number of SHIFTs."""
    from nadam.kernels.strides import LARGE, SHIFT, axis_order

    like = np.empty_like(array, dtype, subok=False)
    if like.nbytes < LARGE:
        return np.zeros_like(like)
    shift, order = place * SHIFT, axis_order(like)
    memory = np.zeros(like.nbytes + shift, np.uint8)[shift:].view(dtype)
    return memory.reshape([like.shape[axis] for axis in order]).transpose(np.argsort(order))


class Parameters:
    """The arrays that an optimizer trains, their state and its counters."""

    _source: list[Array] | dict[str, Array] | None = None  # the user's, where the arrays are from
    _held: Collection[Array] = ()  # what it holds now

    def __init__(
        self,
        variables: Any,
        *,
        average: bool = False,
        accumulate: bool = False,
        exclusion: Exclusion | None = None,
        state_bits: int | None = None,
        seed: int = 0,
    ) -> None:
        self.named = isinstance(variables, Mapping)
        arrays = _checked(variables)
        if exclusion is not None:
            exclusion.warn_of_unused(arrays)
        self.entries: list[Parameter] = []
        for name, array in arrays.items():
            dtype = np.dtype(COMPUTE_DTYPE.get(array.dtype.name, array.dtype.name))
            small = state_bits == 8 and is_compressed(array.size, dtype.name)
            kinds = (np.dtype(np.int8), np.dtype(np.uint8)) if small else (dtype, dtype)
            first, second = (_zeros(array, kind, place) for place, kind in enumerate(kinds, 1))
            accumulator = _zeros(array, dtype, 3) if accumulate else None
            ema = _zeros(array, dtype, 4) if average else None
            if ema is not None:
                ema[...] = array
            decays = exclusion is None or not exclusion.covers(name, array)
            scales = [np.zeros(num_scales(array.size), np.uint8) if small else None for _ in kinds]
            self.entries.append(Parameter(name, array, first, second, ema, accumulator, decays, *scales))
        self.seed = seed
        self.counters = Counters(len(self.entries))
        self._index()
        if isinstance(variables, (list, dict)):
            self._source, self._held = variables, variables.values() if isinstance(variables, dict) else variables

    def _index(self) -> None:
        self._arrays = [entry.array for entry in self.entries]
        self._positions = {entry.name: i for i, entry in enumerate(self.entries)}
        self._identities = {id(array): i for i, array in enumerate(self._arrays)}
        self._plans: dict[bytes, CachedPlan] = {}
        self._complete: CachedPlan | None = None  # the last one in which every parameter had a gradient

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what holds addresses and identities, which are another copy's."""
        return {name: getattr(self, name) for name in ("named", "entries", "counters", "seed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()

    def are(self, variables: Any) -> bool:
        """Whether these are the same arrays, in the same order."""
        arrays = variables
        if type(variables) is not list:
            arrays = list(_container(variables.values() if isinstance(variables, Mapping) else variables, "variables"))
        return len(arrays) == len(self._arrays) and all(map(is_, arrays, self._arrays))

    def check_source(self) -> None:
        """That no other array has taken a parameter's place in the user's list or dict: it would not be trained."""
        source = self._source
        if source is None or (len(self._held) == len(self._arrays) and all(map(is_, self._held, self._arrays))):
            return
        for label, array in source.items() if isinstance(source, dict) else enumerate(source):
            index = self._positions.get(str(label))
            if index is not None and array is not self._arrays[index]:
                raise ValueError(f"variables[{label!r}]: {_ANOTHER.format(label)}")

    def index_of(self, array: Any, position: object) -> int:
        """Which parameter an array is."""
        index = self._identities.get(id(array))
        if index is None:
            known = f"not one of the {len(self.entries)} arrays that the optimizer was built with"
            raise ValueError(f"variables[{position!r}]: {known}; {_IN_PLACE.format(position)}")
        return index

    def plan(self, grads: Any, variables: Any) -> tuple[KernelPlan, Any]:
        """The plan for a call's gradients, all of them checked; and what must be held until the step is done."""
        if variables is not None and type(variables) in (list, tuple, dict) and self.are(variables):
            variables = None
        if variables is None:
            self.check_source()
        if variables is None and self._complete is not None:
            named = self.named and isinstance(grads, dict) and len(grads) == len(self.entries)
            if self._complete.fits([grads.get(name) for name in self._positions] if named else grads):
                return self._complete.plan, grads
        members, arrays, labels = self._paired(grads, variables)
        key = members.tobytes()
        known = self._plans.get(key)
        if known is None or not known.fits(arrays):
            known = CachedPlan([self.entries[i] for i in members], arrays, labels, members, self.seed)
            if known.reusable:
                if len(self._plans) >= PLANS_KEPT:
                    self._plans.clear()
                self._plans[key] = known
        if known.reusable and len(members) == len(self.entries):
            self._complete = known
        return known.plan, arrays

    def nonfinite(self, members: NDArray[np.int64], grads: Any, inv_scale: float, check: Check) -> str | None:
        """The name of the first parameter whose gradient, of those that a plan was made for, does not pass a check."""
        for place, entry in enumerate(self.entries[i] for i in members):
            grad = grads[entry.name] if isinstance(grads, Mapping) else grads[place]
            wide = np.asarray(grad).astype("complex128" if np.iscomplexobj(grad) else "float64")
            if not (np.abs(wide) * inv_scale <= largest_passing(entry.compute_dtype, check)).all():
                return str(entry.name)
        return None

    def _paired(self, grads: Any, variables: Any) -> tuple[NDArray[np.int64], list[Any], list[object]]:
        """Which parameters have a gradient, the gradients, and what the caller calls them."""
        labels, given = _listed(grads, "grads")
        if variables is None:
            if isinstance(grads, Mapping):
                unknown = [name for name in labels if name not in self._positions]
                if unknown:
                    raise ValueError(
                        f"grads[{unknown[0]!r}]: no parameter has this name; they are {list(self._positions)}"
                    )
                indices = [self._positions[str(name)] for name in labels]
            elif len(given) != len(self.entries):
                raise ValueError(
                    f"grads: {len(given)} gradients, expected one for each of {len(self.entries)} parameters"
                )
            else:
                indices = list(range(len(given)))
        else:
            names, arrays = _listed(variables, "variables")
            if isinstance(grads, Mapping) and isinstance(variables, Mapping):
                if set(labels) - set(names):
                    raise ValueError(f"grads[{(set(labels) - set(names)).pop()!r}]: no variable has this name")
                pairs = dict(zip(labels, given, strict=True))
                labels, given = names, [pairs.get(name) for name in names]
            if len(given) != len(arrays):
                raise ValueError(f"grads: {len(given)} gradients, expected one for each of {len(arrays)} variables")
            indices = [self.index_of(array, name) for name, array in zip(names, arrays, strict=True)]
        if len(set(indices)) != len(indices):
            raise ValueError("variables: the same array twice")
        present = {i: (label, grad) for i, label, grad in zip(indices, labels, given, strict=True) if grad is not None}
        if not present:
            raise ValueError("grads: no gradient for any parameter")
        for i in np.flatnonzero(self.counters.seen):  # had one earlier in this window, none now: it counts as zero
            array = self.entries[i].array
            present.setdefault(int(i), (None, np.broadcast_to(np.zeros((), array.dtype), array.shape)))
        ordered = sorted(present)
        chosen = [present[i] for i in ordered]
        return np.array(ordered, np.int64), [grad for _, grad in chosen], [label for label, _ in chosen]


def _container(arrays: Any, argument: str) -> Any:
    """A list, dict or the like, which can be gone through again."""
    if isinstance(arrays, (np.ndarray, str, bytes, Iterator)) or not isinstance(arrays, Iterable):
        raise TypeError(f"{argument}: expected a list or a dict of arrays, got {type(arrays).__name__}")
    return arrays


def _listed(arrays: Any, argument: str) -> tuple[list[object], list[Any]]:
    """Labels and arrays of a list or dict."""
    if isinstance(arrays, Mapping):
        return list(arrays.keys()), list(arrays.values())
    if isinstance(arrays, (np.ndarray, str, bytes)) or not isinstance(arrays, Iterable):
        raise TypeError(f"{argument}: expected a list or a dict of arrays, got {type(arrays).__name__}")
    values = list(arrays)
    return list(range(len(values))), values


def _checked(variables: Any) -> dict[str, Array]:
    """Parameters by name, each checked; those of a list are named by their position."""
    labels, values = _listed(_container(variables, "variables"), "variables")
    if not values:
        raise ValueError("variables: expected at least one array")
    for label, array in zip(labels, values, strict=True):
        where = f"variables[{label!r}]"
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{where}: expected a NumPy array, got {type(array).__name__}")
        if array.dtype.name not in FORMATS or not array.dtype.isnative:
            raise TypeError(f"{where}: dtype {array.dtype}: expected one of {', '.join(FORMATS)}, in native byte order")
        check_memory(where, array)
    if isinstance(variables, Mapping) and not all(isinstance(label, str) for label in labels):
        raise TypeError("variables: expected names that are strings")
    _check_distinct(values, labels)
    return {str(label): array for label, array in zip(labels, values, strict=True)}


def _check_distinct(arrays: Sequence[Array], labels: Sequence[object]) -> None:
    from nadam.kernels.strides import overlapping

    found = overlapping(arrays)
    if found is not None:
        first, second = (labels[i] for i in found)
        raise ValueError(f"variables[{first!r}] and variables[{second!r}]: they share memory")
