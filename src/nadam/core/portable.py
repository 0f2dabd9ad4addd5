"""What an optimizer of any host knows, by parameter name and in arrays of NumPy: the state that moves between hosts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nadam.core.hyperparameters import Hyperparameters
from nadam.core.portable_checks import are_names, check_count, check_names, check_number, some
from nadam.core.portable_formats import Order, is_cut, joined_values, kept_moments, split_values, warn_of_rounding
from nadam.core.portable_param import SLOTS as SLOTS
from nadam.core.portable_param import ParamState as ParamState
from nadam.core.portable_param import checked_param
from nadam.core.portable_settings import plain, settings_of

Array = NDArray[Any]
FORMAT = 1
Rename = Mapping[str, str] | Callable[[str], str]
Transpose = Iterable[str] | Mapping[str, tuple[int, ...] | None]


@dataclass
class PortableState:
    """State of an optimizer.

    Attributes:
        optimizer: Class that it is of, with its module.
        step: Updates, of the parameter that had most.
        names: Of all parameters, in the optimizer's order.
        params: State by name; of a parameter that was never updated there may be none.
        momentum_product: Product of the momenta of all updates; None where the optimizer keeps none.
        position: Calls since the last update, with gradient accumulation.
        skipped_steps: Calls that changed nothing, since a gradient was not finite.
        groups: Settings, as far as they are known: a dict for each group of parameters, whose names are its "params".
            Under the names of `core.hyperparameters.Hyperparameters`; schedules and functions as `to_config` has them.
        loss_scale: Dynamic loss scaling: its "scale" and the "good_steps" since it changed; None where there is none.
        values: Values of the parameters, and of whatever else the model keeps by name; None where not given.
    """

    optimizer: str
    step: int
    names: list[str]
    params: dict[str, ParamState]
    momentum_product: float | None = None
    position: int = 0
    skipped_steps: int = 0
    groups: list[dict[str, Any]] = field(default_factory=list)
    loss_scale: dict[str, Any] | None = None
    values: dict[str, Array] | None = None

    def to_tree(self) -> dict[str, Any]:
        """Nested dicts of numbers, strings and arrays.

        A bfloat16 parameter with a remainder is in it as these two, not once more as the float32 number that they are.
        """
        params = {}
        for name, state in self.params.items():
            scalars = {"step": state.step, "momentum_product": state.momentum_product}
            params[name] = {**scalars, "accumulated": state.accumulated, **state.arrays()}
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.values is not None:
            own["values"] = split_values(self.values, self._remainders())
        return {"portable_state": FORMAT, **own, "params": params}

    def _remainders(self) -> dict[str, Array]:
        return {name: state.remainder for name, state in self.params.items() if state.remainder is not None}

    @classmethod
    def from_tree(cls, tree: Any) -> Self:
        """What `to_tree` gave, checked.

        Raises:
            ValueError: Something is missing, of another kind, out of its range or not finite; it says what.
        """
        if not isinstance(tree, Mapping) or tree.get("portable_state") != FORMAT:
            found = tree.get("portable_state") if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(f"state: portable_state={found!r}: expected the state of an optimizer, version {FORMAT}")
        given = {name: value for name, value in tree.items() if name != "portable_state"}
        known = {each.name for each in fields(cls)}
        if set(given) != known:
            raise ValueError(f"state: {sorted(set(given) ^ known)}: missing or not expected")
        for name, kind in _KINDS.items():
            if not isinstance(given[name], kind):
                raise ValueError(f"{name}: {type(given[name]).__name__}, which it cannot be")
        if given["loss_scale"] is not None:
            check_count(given["loss_scale"], "good_steps")
            check_number("loss_scale", given["loss_scale"].get("scale"), 2.0**-126, 2.0**127)
        for name in ("step", "position", "skipped_steps"):
            check_count(given, name)
        if not are_names(given["names"]):
            raise ValueError(f"names: {given['names']!r:.99}: expected strings")
        if len(set(given["names"])) < len(given["names"]) or not set(given["params"]) <= set(given["names"]):
            raise ValueError("names: expected each parameter once, and all that have state")
        check_number("momentum_product", given["momentum_product"], 0.0, 1.0, optional=True)
        for i, group in enumerate(given["groups"]):
            if not isinstance(group, Mapping) or not are_names(group.get("params")):
                raise ValueError(f"groups[{i}]: {group!r:.99}: expected a dict with a list of names, 'params'")
        given["params"] = {name: checked_param(name, entry) for name, entry in given["params"].items()}
        for name, value in (given["values"] or {}).items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"values[{name!r}]: {type(value).__name__}, expected an array")
        made = cls(**given)
        return made if made.values is None else replace(made, values=joined_values(made.values, made._remainders()))

    def renamed(self, rename: Rename | None = None, transpose: Transpose | None = None) -> PortableState:
        """State whose parameters have other names, and arrays with other axes.

        Args:
            rename: From names here to those of the result, which others keep; or a function of a name.
            transpose: Names (of the result) of arrays whose axes are reversed; or, by name, their permutation. Moments
                of theirs in 8 bits become float32.

        Raises:
            ValueError: Two parameters get one name, or one is not there.
        """
        table = rename if rename is not None and not callable(rename) else {}
        given = rename if callable(rename) else lambda name: table.get(name, name)
        everything = [*self.names, *(name for name in self.values or {} if name not in self.names)]
        new = {name: given(name) for name in everything}
        unknown = sorted(set(table) - set(everything))
        if unknown:
            raise ValueError(f"rename: {unknown} are not among the parameters {everything}")
        if len(set(new.values())) < len(new):
            twice = sorted(name for name in set(new.values()) if list(new.values()).count(name) > 1)
            raise ValueError(f"rename: {twice}: the names of several parameters")
        axes = dict(transpose) if isinstance(transpose, Mapping) else dict.fromkeys(transpose or ())
        unknown = sorted(set(axes) - set(new.values()))
        if unknown:
            raise ValueError(f"transpose: {unknown} are not among the parameters {list(new.values())}")

        def turned(name: str, array: Array) -> Array:
            return array.transpose(axes[name]) if name in axes else array

        params = {}
        for old, state in self.params.items():
            name = new[old]
            wide = state.wide() if name in axes else state
            params[name] = wide.having({slot: turned(name, array) for slot, array in wide.arrays().items()})
        values = None if self.values is None else {new[k]: turned(new[k], array) for k, array in self.values.items()}
        groups = [{**g, "params": [new[name] for name in g["params"]]} for g in self.groups]
        return replace(self, names=[new[n] for n in self.names], params=params, values=values, groups=groups)

    def check_fits(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        h: Hyperparameters,
        *,
        one_count: bool,
        values: Mapping[str, tuple[int, ...]] | None = None,
        loss_scale: bool = False,
    ) -> None:
        """That an optimizer of some parameters and settings can go on from this.

        Args:
            shapes: Of its parameters, by name.
            h: Its settings.
            one_count: Whether it keeps one count of updates for all parameters.
            values: Shapes of what is to be set to the values, by name; None for nothing.
            loss_scale: Whether it scales the loss dynamically.

        Raises:
            ValueError: It cannot; it says what is in the way.

        Warns:
            UserWarning: Averages are left out.
        """
        check_names("parameters", self.names, shapes)
        for name, state in self.params.items():
            if state.exp_avg.shape != tuple(shapes[name]):
                raise ValueError(f"{name}: shape {state.exp_avg.shape}, expected {tuple(shapes[name])}; see transpose")
            if h.use_ema and state.ema is None:
                raise ValueError(f"{name}: there is no moving average of it, which use_ema=True expects")
            if one_count and state.step != self.step:
                raise ValueError(
                    f"{name}: {state.step} updates, others {self.step}: this optimizer has one count for all parameters"
                )
        steps = h.gradient_accumulation_steps
        if self.position >= (steps or 1):
            raise ValueError(
                f"position={self.position} calls since the last update: expected fewer than "
                f"gradient_accumulation_steps={steps}"
            )
        if (self.loss_scale is not None) != loss_scale:
            there, wanted = ("", "no ") if self.loss_scale else ("no ", "")
            raise ValueError(
                f"loss_scale: there is {there}dynamic loss scaling in the state, and {wanted}in the optimizer"
            )
        if values is not None:
            if self.values is None:
                raise ValueError("params: the state was saved without parameters")
            check_names("values", self.values, values)
            for name, shape in values.items():
                if self.values[name].shape != tuple(shape):
                    raise ValueError(f"{name}: shape {self.values[name].shape}, expected {tuple(shape)}; see transpose")
        lost = [name for name, state in self.params.items() if state.ema is not None and not h.use_ema]
        if lost:
            warnings.warn(f"use_ema=False: the moving averages of {some(lost)} are left out", stacklevel=2)

    def check_settings(self, h: Hyperparameters, names: Iterable[str], *, adam: bool = False) -> None:
        """Warn where the settings with which some parameters were trained are others than those of an optimizer."""
        chosen, own, differ = set(names), settings_of(h, [], adam=adam), {}
        for given in self.groups:
            if chosen.isdisjoint(given["params"]):
                continue
            unused = set() if given.get("weight_decay") and own["weight_decay"] else {"coupled_weight_decay"}
            for key in (given.keys() & own.keys()) - _NOT_COMPARED - unused:
                kept, mine = plain(given[key]), plain(own[key])
                if kept != mine and None not in (kept, mine):  # what a function gives, nobody knows
                    name, shown = h.spelling.get(key, key), (own[key], given[key])
                    if name == f"de{key}":  # PyTorch's decoupled_weight_decay
                        shown = (not shown[0], not shown[1])
                    differ[key] = f"{name}={shown[0]!r} here, {shown[1]!r} in the state"
        if differ:
            warnings.warn(
                f"settings differ, those here are kept: {'; '.join(differ[key] for key in sorted(differ))}",
                stacklevel=2,
            )

    def fitted(self, codes: Mapping[str, Order], bits: Mapping[str, int]) -> PortableState:
        """The state with moments as an optimizer keeps them, to go on from.

        Args:
            codes: The parameters whose moments are kept in 8 bits, with the order of their axes in memory.
            bits: Of the remainder beside each bfloat16 parameter; 0 where there is none.

        Warns:
            UserWarning: Moments or parameters are rounded.
        """
        params, rounded = {}, []
        for name, each in self.params.items():
            arrays, exact = kept_moments(each.arrays(), name in codes, codes.get(name))
            params[name] = each.having(arrays)
            rounded += [name] * (not exact)
        cut = [name for name, kept in bits.items() if name in params and is_cut(params[name].remainder, kept)]
        if cut:
            few = " and ".join(f"{n} bits" if n else "none" for n in sorted({bits[name] for name in cut}))
            warnings.warn(f"remainder: {some(cut)}: {few} kept here, to which parameters are rounded", stacklevel=2)
        warn_of_rounding(rounded)
        return replace(self, params=params)

    def learning_rate(self, names: Iterable[str]) -> float | None:
        """The learning rate of some parameters, where it is a number and the same for all of them."""
        chosen = set(names)
        found = [group.get("lr") for group in self.groups if not chosen.isdisjoint(group["params"])]
        rate = found[0] if found and all(other == found[0] for other in found) else None
        return rate if isinstance(rate, float) and 0 <= rate < inf else None

    def product(self, h: Hyperparameters, of: ParamState | None = None) -> float:
        """The momentum product, computed with these settings where it was not kept.

        Raises:
            ValueError: It was not kept, and a function gives the first moment's decay rate.
        """
        kept, step = (self.momentum_product, self.step) if of is None else (of.momentum_product, of.step)
        return h.product_after(step) if kept is None else kept

    def check_complex(self, here: Container[str], joint: bool) -> None:
        """That the same parameters are complex as in an optimizer, and have second moments of its kind.

        Args:
            here: Names of its complex parameters, and of complex ones among what is to be set to the values.
            joint: Whether the two parts of one have one second moment, as in optax, rather than one each.
        """
        arrays = {name: state.exp_avg for name, state in self.params.items()}
        for name, array in [*arrays.items(), *(self.values or {}).items()]:
            if (array.dtype.kind == "c") != (name in here):
                kinds = ("complex", "real") if name in here else ("real", "complex")
                raise ValueError(f"{name}: expected {kinds[0]} numbers, the state has {kinds[1]} ones")
        is_joint = self.optimizer.startswith(("nadam.jax", "optax"))
        for name, array in arrays.items():
            if array.dtype.kind == "c" and is_joint != joint:
                moments = "one second moment for both parts" if is_joint else "a second moment for each part"
                raise ValueError(f"{name}: complex, and {self.optimizer} keeps {moments}, which this one does not")


def widened(array: Any) -> Array:
    """An array of NumPy; bfloat16, which not every installation of it knows, in float32, which holds its values.

    Example:
        >>> widened(np.ones(2, np.float16)).dtype
        dtype('float16')
    """
    found = np.asarray(array)
    return found.astype(np.float32) if found.dtype.name == "bfloat16" else found


_NOT_COMPARED = {"params", "lr", "loss_scale_factor", "track_grad_norm", "skip_nonfinite"}
_KINDS: dict[str, Any] = {
    "optimizer": str,
    "names": list,
    "params": Mapping,
    "groups": list,
    "loss_scale": (Mapping, type(None)),
    "values": (Mapping, type(None)),
}
