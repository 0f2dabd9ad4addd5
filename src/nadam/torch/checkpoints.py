"""The checkpoints of an optimizer: what it saves, what it goes on from, and what a copy of it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from nadam.core.exclusive import Exclusive
from nadam.torch import mistakes, state
from nadam.torch.buckets import StateOptions
from nadam.torch.compressed import in_c_order

POSITION, SKIPPED = "accumulation_position", "skipped_steps"  # of a group


class WithCheckpoints(Optimizer):  # type: ignore[misc]
    """What `NAdam` has of its checkpoints."""

    _exclusive: Exclusive
    _extras: dict[str, Any]
    _options: StateOptions
    _position: int  # calls since the last update
    _skipped: int  # calls that were skipped
    _forget: Callable[[], None]
    _counters: Callable[[], tuple[int, int]]  # those two, as they are now
    _of_all: Callable[[], dict[str, Any]]  # the settings of the whole optimizer

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_extras", "_options")}
        counters = dict(zip(("_position", "_skipped"), self._counters(), strict=True))
        return {**super().__getstate__(), **own, **counters}

    def __setstate__(self, given: dict[str, Any]) -> None:
        counters: dict[str, Any] = {name: given[name] for name in ("_position", "_skipped") if name in given}
        super().__setstate__(given)
        self.__dict__.setdefault("_exclusive", Exclusive())  # a copy's own; while a state is loaded, the one at work
        self._forget()
        self.__dict__.update(counters)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._position = group.pop(POSITION, self._position)
            self._skipped = group.pop(SKIPPED, self._skipped)
        state.complete(self.state, self.param_groups, self._extras, self._options)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.NAdam`'s, which loads it; with the moving averages and accumulators, where there are any.

        Another thread's step is waited for.

        Raises:
            RuntimeError: A call from within a step, as by a signal handler.
        """
        return self._exclusive.run("state_dict", self._state_dict)

    def _state_dict(self) -> dict[str, Any]:
        position, skipped = self._counters()
        shown = {POSITION: position} if self._extras["gradient_accumulation_steps"] is not None else {}
        shown |= {SKIPPED: skipped} if self._extras["skip_nonfinite"] else {}
        for group in self.param_groups:
            group.update(shown)
        try:
            made = dict(super().state_dict())
            return {**made, "state": {key: in_c_order(entry) for key, entry in made["state"].items()}}
        finally:
            for group in self.param_groups:
                group.pop(POSITION, None)
                group.pop(SKIPPED, None)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this class or of `torch.optim.NAdam`.

        Moments keep the dtype that they have there, or get a wider one; with ``state_bits`` they are rounded to it.
        Where both sides name their parameters, they are matched by name.

        Raises:
            ValueError: It is another optimizer's, or of other parameters, or damaged; it says what is wrong, and
                nothing has changed. Of Adam's and NAdamW's it says what takes them.
            RuntimeError: A call from within a step, as by a signal handler.

        Warns:
            UserWarning: Moments were rounded to 8 bits; it says of which parameters, and how far.
        """
        device = self._options.state_device
        self._load(state_dict, lambda _, given: state.checked(self.param_groups, given, device))

    def load_adam_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of `torch.optim.Adam` or `AdamW`: its moments and steps.

        The momentum product is that of so many steps with the settings here; settings are not taken over.

        Raises:
            ValueError: As of `load_state_dict`.
        """
        self._load(state_dict, lambda _, given: state.of_adam(self.param_groups, given))

    def _load(self, state_dict: Mapping[str, Any], prepare: Callable[[Any, Any], Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict: expected a dict, got {type(state_dict).__name__}")

        def checked(optimizer: Any, given: Mapping[str, Any]) -> Any:
            mistakes.check_saved_groups(given, self._of_all())
            return prepare(optimizer, given)

        handle = self.register_load_state_dict_pre_hook(checked)  # after the user's own
        try:
            self._exclusive.run("load_state_dict", super().load_state_dict, dict(state_dict))
        finally:
            handle.remove()
