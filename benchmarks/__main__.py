"""Time a step of every case against the floor and the installed peers, then check what has to be reached."""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from statistics import median

import nadam
from benchmarks.cases import CASES, KINDS, WIDTHS, Case, Ours, bytes_moved, random_arrays
from benchmarks.floor import Floor
from benchmarks.measure import alone, clock_for, in_turns, ratio
from benchmarks.peers import PEERS, Peer, limited_to, runs
from benchmarks.report import Table, duration, progress
from benchmarks.targets import Key, targets

PEER_REPEATS, PEER_BUDGET = 5, 0.4  # samples, and seconds spent on them, of one peer in one row


@dataclass
class Row:
    """Seconds per step with one number of threads."""

    ours: float
    floor: float
    form: str  # of the floor, the faster one
    share: float  # of the floor's speed
    peers: dict[str, float] = field(default_factory=dict)


def ours_and_floor(case: Case, kind: str, dtype: str, threads: list[int], repeats: int) -> dict[int, Row]:
    ours = Ours(case, kind, dtype)
    floor = Floor(ours.moved, kind, dtype)
    rows = {}
    for count in threads:
        nadam.set_num_threads(count)
        clock = clock_for(case.small, count)
        ours.step()
        for work in floor.forms.values():
            work()
        works = [ours.step, *floor.forms.values()]
        own, *floors = in_turns(works, small=case.small, clock=clock, repeats=repeats)
        seconds, form, samples = min(zip(map(median, floors), floor.forms, floors, strict=True))
        rows[count] = Row(median(own), seconds, form, ratio(samples, own))
    return rows


def peer_times(
    peer: Peer, case: Case, kind: str, dtype: str, threads: list[int], repeats: int
) -> Iterator[tuple[int, float]]:
    """Seconds per step with each number of threads; nothing where the peer does not do the case."""
    params, grads = random_arrays(case.shapes, dtype, 0), random_arrays(case.shapes, dtype, 1)
    try:
        running = peer.start(params, grads, kind == "full")
        if not runs(running):
            return
    except Exception as error:  # whatever another project raises where it has no such thing
        reason = str(error).partition("\n")[0][:100]
        progress(f"{peer.name}: {kind} {dtype}: {type(error).__name__}: {reason}")
        return
    for count in threads:
        clock = clock_for(case.small, count)
        with limited_to(count, peer):
            yield count, alone(running.step, small=case.small, clock=clock, repeats=repeats, budget=PEER_BUDGET)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, help="only these (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=WIDTHS, help="only these (default: all; --quick: float32)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, help="(default: yes; --quick: no)")
    parser.add_argument("--repeats", type=int, help="samples per figure (default: 15; --quick: 5)")
    parser.add_argument("--quick", action="store_true", help="a first look, within a minute")
    args = parser.parse_args()
    args.case = args.case or list(CASES)
    args.dtype = args.dtype or (["float32"] if args.quick else list(WIDTHS))
    args.peers = not args.quick if args.peers is None else args.peers
    args.repeats = args.repeats or (5 if args.quick else 15)
    if min(args.threads) < 1 or args.repeats < 1:
        parser.error("--threads and --repeats: expected numbers of at least 1")
    return args


def cases_table(args: argparse.Namespace, peers: list[Peer]) -> dict[Key, float]:
    """Measure and print every case; gives the shares of the floor."""
    columns = [("case", -11), ("kind", -5), ("dtype", -8), ("threads", 7), ("ours", 8), ("GB/s", 5), ("floor", 8)]
    columns += [("share", 5), ("floor's form", -12), *((peer.name, 16) for peer in peers)]
    table, shares = Table(columns), {}
    for name, kind, dtype in product(args.case, KINDS, args.dtype):
        case, label = CASES[name], f"{name}, {kind}, {dtype}"
        progress(f"{label}: ours and the floor")
        rows = ours_and_floor(case, kind, dtype, args.threads, args.repeats)
        for peer in peers:
            gc.collect()
            progress(f"{label}: {peer.name}")
            for count, seconds in peer_times(peer, case, kind, dtype, args.threads, min(args.repeats, PEER_REPEATS)):
                rows[count].peers[peer.name] = seconds
        gc.collect()
        for count, row in rows.items():
            shares[name, kind, dtype, count] = row.share
            speed = bytes_moved(kind, dtype) * sum(case.sizes) / row.ours / 1e9
            cells = [name, kind, dtype, str(count), duration(row.ours), f"{speed:.1f}", duration(row.floor)]
            cells += [f"{row.share:.2f}", row.form, *(peer_cell(row, peer) for peer in peers)]
            table.row(cells)
    return shares


def peer_cell(row: Row, peer: Peer) -> str:
    """Time, and how many times ours it is."""
    seconds = row.peers.get(peer.name)
    return "-" if seconds is None else f"{duration(seconds)} {seconds / row.ours:5.1f}x"


def main() -> None:
    args = arguments()
    peers = [peer for peer in PEERS if peer.installed] if args.peers else []
    print(f"nadam {nadam.__version__}, Python {platform.python_version()}, {platform.machine()}, {platform.system()}")
    print("Seconds of a step; share: floor / ours; of a peer: its seconds and peer / ours. See benchmarks/README.md.\n")
    shares = cases_table(args, peers)
    print("\ntargets")
    table = Table([("what", -78), ("wanted", 10), ("seen", 10), ("reached", 7)])
    progress("targets")
    for target in targets(shares, args.threads, args.repeats):
        reached = {True: "yes", False: "no", None: "-"}[target.reached]
        table.row([target.what, target.wanted, target.seen, reached])


main()
