"""Where rows go: a CSV file, and TensorBoard's event files. Each row is on disk before training goes on."""

from __future__ import annotations

import csv
import io
import os
import sys
from importlib import import_module
from typing import Any, TextIO

from nadam.watch.rows import Row

# Which packages write TensorBoard's files, and by what; PyTorch's only where PyTorch is in use anyway.
EVENT_WRITERS = {
    "torch.utils.tensorboard": "SummaryWriter",
    "tensorboardX": "SummaryWriter",
    "tensorboard.summary": "Writer",
}
TAG = "nadam/"


class CSV:
    """Appends rows to a CSV file; the first writes the header, unless the file has it already.

    So a run that is resumed goes on in the same file. Steps that it repeats come twice. An incomplete last line, of a
    run that was killed while it wrote, is removed.

    Args:
        path: Of the file.

    Raises:
        ValueError: At the first row: the file has other columns. It is left as it was.
        OSError: It cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder, CSV(folder + "/run.csv") as write:
        ...     write({"step": 1, "grad_norm": 0.5})
        ...     print(pathlib.Path(write.path).read_text())
        step,grad_norm
        1,0.5
        <BLANKLINE>
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def __call__(self, row: Row) -> None:
        """Write a row."""
        if self._file is None:
            self._file = self._opened(list(row))
        elif list(row) != self._columns:
            raise ValueError(self._difference(self._columns, list(row)))
        self._write(row.values())
        self._file.flush()

    def close(self) -> None:
        """Close the file; another row opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> CSV:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, columns: list[str]) -> TextIO:
        """The file, ready for the next row."""
        file = open(self.path, "a+", encoding="utf-8", newline="")  # noqa: SIM115
        try:
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind("\n") + 1]
            header = _line(columns)
            if whole or not header.startswith(content):
                found = next(csv.reader([content.partition("\n")[0]]))
                if found != columns:
                    raise ValueError(self._difference(found, columns))
            if whole != content:
                file.truncate(len(whole.encode()))
            if not whole:
                file.write(header)
            self._columns, self._write = columns, csv.writer(file, lineterminator="\n").writerow
        except BaseException:
            file.close()
            raise
        return file

    def _difference(self, found: list[str], wanted: list[str]) -> str:
        missing, others = ([n for n in one if n not in two] for one, two in ((wanted, found), (found, wanted)))
        told = [f"it has no {missing}"] * bool(missing) + [f"this run has no {others}"] * bool(others)
        return f"{self.path}: other columns than this run's: {'; '.join(told) or 'another order'}; expected a new file"


class TensorBoard:
    """Writes rows as scalars ``nadam/grad_norm`` and so on, by step, for TensorBoard.

    By what is installed: PyTorch's writer where PyTorch is in use, tensorboardX or TensorBoard's own.

    Args:
        folder: For the event files.

    Raises:
        ImportError: None of them is installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer = _event_writer()(os.fspath(folder))

    def __call__(self, row: Row) -> None:
        """Write a row, without what there is not."""
        step = row["step"]
        for name, value in row.items():
            if isinstance(value, str):
                if hasattr(self._writer, "add_text"):  # TensorBoard's own writes numbers only
                    self._writer.add_text(TAG + name, value, step)
            elif value is not None and name != "step":
                self._writer.add_scalar(TAG + name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event files."""
        self._writer.close()


def _event_writer() -> Any:
    for module, name in EVENT_WRITERS.items():
        if module.startswith("torch.") and "torch" not in sys.modules:
            continue
        try:
            return getattr(import_module(module), name)
        except ImportError:
            continue
    raise ImportError("nadam.watch.TensorBoard needs a writer of event files: pip install tensorboard")


def _line(values: Any) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerow(values)
    return made.getvalue()
