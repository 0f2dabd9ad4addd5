"""What is measured, as rows, and the file of a run: written, read and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1  # of the file; another number for other keys
OURS, FLOOR = "ours", "floor"
# Plain, ours with moments of 8 bits and, in PyTorch, bfloat16 parameters with 8 bits of remainder; peers with float32.
COMPRESSED = "8 bits"
# Timed beside the optimizers, to tell how much of a time is no optimizer's: nothing is ahead of these or behind.
BOUNDS = (FLOOR, "SGD", "passed through", "plain, again")
LEVEL = 0.05  # times that differ by less are level


@dataclass(frozen=True)
class Timing:
    """Seconds of ours and of one other, timed in turns.

    Attributes:
        host: As in the headings, such as "Keras on torch".
        model: Model of a training loop, or case of a hot loop.
        kind: "plain" or "full", or what else is on.
        against: Whose seconds ``theirs`` are.
        ours: Median seconds.
        theirs: Median seconds.
        ratio: Median over the rounds of theirs / ours; above 1 ours takes less time.
        wanted: The least ratio to reach; None for none.
        note: What else was seen.
    """

    host: str
    model: str
    kind: str
    against: str
    ours: float
    theirs: float
    ratio: float
    wanted: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What a row of another run has in common with this one."""
        return self.host, self.model, self.kind, self.against

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is what was wanted; None where nothing was."""
        return None if self.wanted is None else self.ratio >= self.wanted

    @property
    def verdict(self) -> str:
        """One of "ahead", "level" and "behind"; "bound" beside what is no optimizer."""
        if self.against in BOUNDS:
            return "bound"
        return "level" if abs(self.ratio - 1) < LEVEL else "ahead" if self.ratio > 1 else "behind"


@dataclass(frozen=True)
class Growth:
    """Seconds of a step of so many parameters in one tensor, or of so many tensors of 1,000."""

    host: str
    axis: str
    size: int
    who: str
    seconds: float


@dataclass(frozen=True)
class Kept:
    """Bytes of an optimizer's state for each parameter, beside the parameter and its gradient."""

    host: str
    dtype: str
    kind: str
    who: str
    bytes: float


@dataclass(frozen=True)
class Target:
    """One figure to reach that is no ratio of times."""

    what: str
    wanted: str
    seen: str
    reached: bool


# The kinds of measurements in their order, what each is called, and what its rows are.
PARTS: dict[str, tuple[str, type[Any]]] = {
    "loops": ("In training loops", Timing),
    "gpu": ("On the GPU, steps by themselves", Timing),
    "growth": ("Growth", Growth),
    "kept": ("Bytes kept for each parameter", Kept),
    "steps": ("Steps by themselves, a hot loop", Timing),
    "watching": ("What watching a run costs", Timing),
    "targets": ("What a fresh process tells", Target),
}


@dataclass
class Run:
    """All of one run of `nadam bench`.

    Attributes:
        machine: What it ran on, by name.
        versions: Of what is installed, by name.
        options: Those that it was started with.
        rows: Of each part.
        failed: The last lines of what ended early, by its name.
        seconds: How long it took.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, Any]
    rows: dict[str, list[Any]] = field(default_factory=lambda: {part: [] for part in PARTS})
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def timings(self) -> Iterator[tuple[str, Timing]]:
        """Every ratio with the part that it is of."""
        for part, (_, kind) in PARTS.items():
            if kind is Timing:
                yield from ((part, row) for row in self.rows[part])

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def read(path: Path) -> Run:
    """Read the file of a run.

    Raises:
        ValueError: It cannot be read, or is no such file of this format.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError("expected what nadam bench --json wrote")
        if found.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        given: Mapping[str, Any] = found.pop("rows")
        rows = {part: [row_of(part, row) for row in given.get(part, ())] for part in PARTS}
        return Run(rows=rows, **found)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not what nadam bench --json wrote ({type(error).__name__}: {error})") from error


def row_of(part: str, values: Mapping[str, Any]) -> Any:
    """A row of a part from the values that JSON has of it."""
    kind = PARTS[part][1]
    unknown = values.keys() - {each.name for each in fields(kind)}
    if unknown:
        raise ValueError(f"unknown keys in a row of {part}: {sorted(unknown)}")
    return kind(**values)


class Change(NamedTuple):
    """One ratio in two runs."""

    part: str
    row: Timing
    before: float

    @property
    def factor(self) -> float:
        """Above 1 where ours takes less time beside the other than before."""
        return self.row.ratio / self.before


def compare(now: Run, then: Run) -> Sequence[Change]:
    """The ratios that both runs have."""
    before = {(part, row.key): row.ratio for part, row in then.timings()}
    return [Change(part, row, before[part, row.key]) for part, row in now.timings() if (part, row.key) in before]


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> duration(0.01749), duration(8.1e-6)
        ('17.5 ms', '8.10 us')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} us"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
