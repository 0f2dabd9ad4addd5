"""Time training loops of every host and peer that is installed, and write report.html.

nadam bench --quick
nadam bench --host torch --model "MLP, 0.27M" --json mine.json
nadam bench --compare mine.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nadam.bench import machine, records
from nadam.bench.cases import CASES
from nadam.bench.loops import MODELS
from nadam.bench.options import HOSTS

PARTS = ("loops", "gpu", "growth", "kept")
STEPS = ("steps", "watching", "targets")
ROUNDS, QUICK_ROUNDS = 12, 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `nadam bench`."""
    names = [*MODELS, *CASES]
    parser.add_argument("--quick", action="store_true", help="a first look: one or two models, small sizes")
    parser.add_argument("--host", nargs="+", choices=HOSTS, metavar="HOST", help=f"only these of {', '.join(HOSTS)}")
    parser.add_argument("--model", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    parser.add_argument(
        "--rounds", type=int, help=f"samples of each figure (default: {ROUNDS}; with --quick up to {QUICK_ROUNDS})"
    )
    parser.add_argument("--steps", action="store_true", help="then steps by themselves, in a hot loop, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file; - for stdout")
    parser.add_argument("--html", type=Path, metavar="FILE", default=Path("report.html"), help="the page to write")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="set the ratios beside those of another run")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    installed = machine.installed_hosts()
    absent = [host for host in args.host or () if host not in installed]
    if absent:
        needs = " ".join(f'"nadam[{",".join(HOSTS[host][1][:1])}]"' for host in absent)
        args.parser.error(f"--host {' '.join(absent)}: not installed here: pip install {needs}")
    if args.rounds is not None and args.rounds < 1:
        args.parser.error(f"--rounds {args.rounds}: expected a number of at least 1")
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        raise ImportError('needs rich: pip install "nadam[bench]"') from None
    try:
        then = None if args.compare is None else records.read(args.compare)
    except ValueError as error:
        args.parser.error(f"--compare {error}")
    from nadam.bench import measure_all, page, terminal

    console = Console(stderr=args.json == Path("-"))
    if machine.busy_at(machine.machine()):
        console.print("Other programs compute on this machine: figures will be worse than it can do, and ratios wrong.")
    told = {
        "parts": [*PARTS, *STEPS] if args.steps else list(PARTS),
        "models": args.model or [],
        "rounds": args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        "quick": args.quick,
    }
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(text: str, done: int, units: int) -> None:
            bar.update(task, description=text, completed=done, total=units or None)

        found = measure_all.measure(args.host or installed, told, progress)
    changes = [] if then is None else records.compare(found, then)
    terminal.show(console, found, changes)
    if args.json == Path("-"):
        sys.stdout.write(found.to_json() + "\n")
    elif args.json is not None:
        args.json.write_text(found.to_json())
    args.html.write_text(page.render(found, changes), encoding="utf-8")
    console.print(f"{found.seconds:.0f} s; {args.html}", highlight=False)
    return 1 if found.failed else 0
