"""What a measuring process is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf

QUICK_BUDGET = 0.25
# Each host by its name on the command line: its heading, and what has to be installed.
HOSTS = {
    "numpy": ("NumPy", ()),
    "torch": ("PyTorch", ("torch",)),
    "jax": ("JAX", ("jax", "optax")),
    "keras-torch": ("Keras on torch", ("keras", "torch")),
    "keras-jax": ("Keras on jax", ("keras", "jax")),
    "keras-tensorflow": ("Keras on tensorflow", ("keras", "tensorflow")),
}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        host: One of `HOSTS`.
        parts: Of `records.PARTS`.
        models: Models and cases, only these; none for all.
        rounds: Samples of each figure, at least 1.
        quick: Whether a few models and sizes are enough.
    """

    host: str
    parts: Sequence[str]
    models: Sequence[str] = ()
    rounds: int = 12
    quick: bool = False

    @property
    def budget(self) -> float:
        """Seconds of one unit, after which its rounds end; there is at least one."""
        return QUICK_BUDGET if self.quick else inf

    @property
    def heading(self) -> str:
        """The host's name in tables."""
        return HOSTS[self.host][0]

    def chosen(self, names: Sequence[str], quick: Sequence[str]) -> list[str]:
        """Of the names of a module those to measure."""
        wanted = self.models or (quick if self.quick else names)
        return [name for name in names if name in wanted]

    def to_json(self) -> str:
        """As the argument of a command."""
        return json.dumps(asdict(self))
