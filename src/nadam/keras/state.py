"""The state of the Keras host in Keras's stores: what is written, what is refused."""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from nadam.core.portable_checks import LARGEST_SCALES
from nadam.keras.slots import path_of

Array = NDArray[Any]
Optimizer = Any

NADAM = "nadam"  # how the names begin that Keras gives its own
ITERATION, LEARNING_RATE, PRODUCT, REPORT = "iteration", "learning_rate", "momentum_product", "report"
# Attributes of an array in a file (HDF5), or of one in a dict.
SLOT, VARIABLE, CHECKSUM = "slot", "variable", "crc32"


# Between what the values of a slot lie, where that is not anything finite.
LIMITS = {"velocity": (0, np.inf), ITERATION: (0, np.inf), LEARNING_RATE: (0, np.inf), PRODUCT: (0, 1)}
LIMITS |= {"momentum_scale": (0, LARGEST_SCALES["exp_avg_scale"])}
LIMITS |= {"velocity_scale": (0, LARGEST_SCALES["exp_avg_sq_scale"])}
CODE_DTYPES = ("int8", "uint8")  # of moments of 8 bits, and their scales


class Label(NamedTuple):
    """What an optimizer variable is: its slot, and the path of the variable that it belongs to."""

    slot: str
    variable: str = ""

    def __str__(self) -> str:
        return f"{self.slot} of {self.variable}" if self.variable else self.slot


class Labelled(np.ndarray):
    """An array that carries its label, for stores that keep arrays as they are."""

    attrs: dict[str, Any]


def labels(optimizer: Optimizer) -> list[Label]:
    """What the optimizer's variables are, in their order, which is Keras's."""

    def each(field: str, *names: str) -> list[Label]:
        slots = [slot for slot in optimizer._runtime.slots if getattr(slot, field) is not None]
        return [Label(name, path_of(slot.variable)) for slot in slots for name in names]

    return [
        Label(ITERATION),
        *[Label(LEARNING_RATE)] * isinstance(optimizer._learning_rate, keras.Variable),
        *each("ema", "average"),
        *each("accumulator", "gradient_accumulator"),
        *each("exp_avg", "momentum", "velocity"),
        *each("exp_avg_scale", "momentum_scale", "velocity_scale"),
        *[Label(PRODUCT)] * optimizer.built,
        *[Label(REPORT)] * (optimizer.built and optimizer._report is not None),
    ]


def save(optimizer: Optimizer, store: Any) -> None:
    """Write every optimizer variable under its number, as Keras does; labelled, where the store can hold a label."""
    if optimizer._runtime.pending is not None:  # was loaded, and nothing has happened since
        for i, entry in enumerate(optimizer._runtime.pending):
            _write(store, str(i), entry.array, entry.label)
        return
    for i, (variable, label) in enumerate(zip(optimizer.variables, labels(optimizer), strict=True)):
        _write(store, str(i), np.asarray(keras.ops.convert_to_numpy(variable.value)), label)


def _write(store: Any, key: str, array: Array, label: Label | None) -> None:
    marks = {} if label is None else {SLOT: label.slot, VARIABLE: label.variable, CHECKSUM: _checksum(array)}
    if isinstance(store, dict):
        store[key] = array.view(Labelled)
        store[key].attrs = marks
        return
    store[key] = array
    attributes = _attributes(store, key)
    if attributes is not None:
        attributes.update(marks)


def load_or_keep(optimizer: Optimizer, store: Any) -> None:
    """Read the state, or keep it until the optimizer is built."""
    read = _read(store)
    if not read:
        warnings.warn(f"{optimizer.name}: there is no optimizer state to load", stacklevel=5)
    elif optimizer.built:
        load(optimizer, read)
    else:
        optimizer._runtime.pending = read


class Entry(NamedTuple):
    """An array that was read, and what it was labelled as."""

    array: Array
    label: Label | None
    checksum: int | None
    owner: str | None  # the name of the optimizer that wrote it

    @property
    def is_ours(self) -> bool:
        """Whether a Nadam wrote it, this package's or Keras's own, as far as the store tells."""
        return self.label is not None or str(self.owner).startswith(NADAM)


def _read(store: Any) -> list[Entry]:
    """The arrays of a store in their order, with their labels."""
    read, owner = [], dict(getattr(getattr(store, "_h5_entry_group", None), "attrs", {})).get("name")
    for key in sorted(store.keys(), key=_position):
        array = store[key]
        marks = dict(getattr(array, "attrs", None) or _attributes(store, key) or {})
        label = Label(str(marks[SLOT]), str(marks[VARIABLE])) if SLOT in marks else None
        checksum = int(marks[CHECKSUM]) if CHECKSUM in marks else None
        read.append(Entry(np.array(array, subok=False), label, checksum, owner))
    return read


def load(optimizer: Optimizer, read: Sequence[Entry]) -> None:
    """Put a state into a built optimizer, all of it or, if anything is wrong with it, nothing."""
    wanted, variables = labels(optimizer), optimizer.variables
    if len(read) <= 2 and all(entry.is_ours for entry in read):
        read = _completed(optimizer, read, wanted)
    read = _matched(optimizer, list(read), wanted)
    values = [_checked(*each) for each in zip(wanted, variables, read, strict=True)]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _completed(optimizer: Optimizer, read: Sequence[Entry], wanted: Sequence[Label]) -> list[Entry]:
    """The state of an optimizer that was saved before it was built: that in which a new one begins."""
    begin = {"average": lambda i: optimizer._runtime.slots[i].variable.value, PRODUCT: lambda _: 1.0}
    fresh, seen = list(read), [label.slot for label in wanted[: len(read)]]
    for label, variable in list(zip(wanted, optimizer.variables, strict=True))[len(read) :]:
        value = begin.get(label.slot, lambda _, like=variable: _zeros(like))(seen.count(label.slot))
        fresh.append(Entry(np.array(keras.ops.convert_to_numpy(value)), label if read[0].label else None, None, None))
        seen.append(label.slot)
    return fresh


def _zeros(variable: Any) -> Array:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return np.zeros(variable.shape, dtype if dtype in CODE_DTYPES else np.float64)


def _matched(optimizer: Optimizer, read: list[Entry], wanted: list[Label]) -> list[Entry]:
    """The entries in the order of the labels."""
    without_product = len(read) == len(wanted) - 1 and read[0].label is None and wanted[-1].slot == PRODUCT
    if without_product and not read[0].is_ours:
        if all(entry.array.shape == tuple(v.shape) for entry, v in zip(read, optimizer.variables, strict=False)):
            raise ValueError(
                "optimizer state: no momentum product, expected one: this is the state of Adam or AdamW: load it into "
                "a model compiled with that, then compile with nadam.keras.from_stock(model.optimizer)"
            )
    elif without_product:
        # Keras's own inside a LossScaleOptimizer does not save its momentum product.
        updates = int(read[0].array) // (optimizer.gradient_accumulation_steps or 1)
        read.append(Entry(np.asarray(optimizer._hyper.product_after(updates)), None, None, NADAM))
    named = [entry.label for entry in read]
    if None not in named:
        have, want = (Counter(label.slot for label in those if label) for those in (named, wanted))
        wrong = [f"{have[s]} arrays {s!r}, expected {want[s]}" for s in want | have if have[s] != want[s]]
        if wrong:
            raise ValueError(f"optimizer state: {'; '.join(wrong)}")
        by_label = dict(zip(named, read, strict=True))
        if set(by_label) == set(wanted):
            return [by_label[label] for label in wanted]
        # Of another model of the same kind: layers that Keras names anew in each process.
    if len(read) != len(wanted):
        counts = ", ".join(f"{count} {slot}" for slot, count in Counter(label.slot for label in wanted).items())
        raise ValueError(f"optimizer state: {len(read)} arrays, expected {len(wanted)}: {counts}")
    for entry, label in zip(read, wanted, strict=True):
        if entry.label is not None and entry.label.slot != label.slot:
            raise ValueError(f"optimizer state: {entry.label}, expected {label}")
    return read


def _checked(label: Label, variable: Any, entry: Entry) -> Array:
    """An entry's array as it is to be assigned."""
    array, dtype = entry.array, keras.backend.standardize_dtype(variable.dtype)
    kinds, kind = ("iu", "integers") if label.slot == ITERATION else ("iuf", "real numbers")
    if tuple(array.shape) != tuple(variable.shape):
        raise ValueError(f"{label}: shape {tuple(array.shape)}, expected {tuple(variable.shape)}")
    if dtype in CODE_DTYPES and array.dtype != dtype:
        raise ValueError(f"{label}: dtype {array.dtype}, expected {dtype}")
    if array.dtype.kind not in kinds and (label.slot == ITERATION or array.dtype.name != "bfloat16"):
        raise ValueError(f"{label}: dtype {array.dtype}, expected {kind}")
    if entry.checksum is not None and _checksum(array) != entry.checksum:
        raise ValueError(f"{label}: its values are not those that were saved: the checksum is another")
    low, high = LIMITS.get(label.slot, (-np.inf, np.inf))
    high = np.iinfo(dtype).max if label.slot == ITERATION else high
    if label.slot != ITERATION and dtype in ("float32", "float64"):
        with np.errstate(over="ignore"):  # what is too large for the variable is infinite in it
            array = array.astype(dtype)
    values = array.astype(np.float64) if array.dtype.kind not in "iu" else array
    if not np.isfinite(values).all():
        raise ValueError(f"{label}: not all of its values are finite")
    if values.size and not (low <= values.min() and values.max() <= high):
        raise ValueError(f"{label}: expected {low} <= values <= {high}")
    return array


def _checksum(array: Array) -> int:
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return zlib.crc32(native.reshape(-1).view(np.uint8).data)


def _position(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdecimal() else (1 << 62, key)


def _attributes(store: Any, key: str) -> Any:
    """Where an array's attributes are in a store over an HDF5 file; None elsewhere."""
    group = getattr(store, "_h5_entry_group", None)
    if isinstance(group, Mapping) and not hasattr(group, "attrs"):
        return None
    return group[key].attrs if group is not None and key in group else None
