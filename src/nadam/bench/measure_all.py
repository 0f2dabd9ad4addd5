"""All measurements of a run: each host in a process of its own, one after another, their rows collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from nadam.bench import machine
from nadam.bench.options import HOSTS, Options
from nadam.bench.records import Run, row_of

LAST_LINES = 5  # of what a process wrote before it ended early
# Told once per process: what is measured next, of which host, and how many units are done, of how many.
Progress = Callable[[str, int, int], None]


@dataclass
class Worker:
    """A measuring process, which waits to be told to go on once it has imported what it measures."""

    host: str
    process: subprocess.Popen[str]
    errors: IO[str]
    units: int | None = None

    @classmethod
    def start(cls, options: Options) -> Worker:
        """Start the process of a host."""
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by stop)
        command = [sys.executable, "-m", "nadam.bench.worker", options.to_json()]
        environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
        return cls(options.host, process, errors)

    def prepared(self) -> int:
        """Wait until all is imported; the number of units."""
        if self.units is None:
            self.units = next((message["units"] for message in self.messages()), 0)
        return self.units

    def go(self) -> None:
        """Let it measure."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.close()
        except OSError:  # it has ended, which its status tells
            pass

    def messages(self) -> Any:
        """What it writes, line by line."""
        assert self.process.stdout is not None
        return map(json.loads, self.process.stdout)

    def reason(self) -> str | None:
        """Why it ended early; None where it did not."""
        if self.process.wait() == 0:
            return None
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()[-LAST_LINES:]
        return "\n".join([*lines, f"ended with status {self.process.returncode}"])

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.errors.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


def measure(hosts: Sequence[str], told: Mapping[str, Any], progress: Progress) -> Run:
    """Measure, one host after another.

    Args:
        hosts: Of `HOSTS`.
        told: The other fields of `Options`.
        progress: Called before each unit.
    """
    run = Run(machine.machine(), machine.versions(), dict(told))
    begin = time.perf_counter()
    options = [Options(host=host, **told) for host in hosts]
    workers: list[Worker] = []
    try:
        if told["quick"]:  # they import side by side, which takes longer than what they measure
            workers = [Worker.start(each) for each in options]
            for worker in workers:
                progress(f"{HOSTS[worker.host][0]}: imports", 0, 0)
                worker.prepared()
        for i, each in enumerate(options):
            if not told["quick"]:
                progress(f"{HOSTS[each.host][0]}: imports", 0, 0)
                workers.append(Worker.start(each))
            _collect(workers[i], run, progress)
    finally:
        for worker in workers:
            worker.stop()
    run.seconds = time.perf_counter() - begin
    return run


def _collect(worker: Worker, run: Run, progress: Progress) -> None:
    """Take the rows of one process."""
    heading, units, done = HOSTS[worker.host][0], worker.prepared(), 0
    worker.go()
    for message in worker.messages():
        part = message["part"]
        if "unit" in message:
            progress(f"{heading}: {message['unit']}", done, units)
            done += 1
        else:
            run.rows[part].append(row_of(part, message["row"]))
    reason = worker.reason()
    if reason is not None:
        run.failed[heading] = reason
