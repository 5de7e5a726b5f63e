"""What the runtime itself costs per action: measured on ranks that have nothing to compute (``idle``)."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from peers.results import start_ranks

from planner.growth import LAYERS, slope

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Case:
    """One pipeline. ``num_layers``: its units are shared out among the stages."""

    num_ranks: int
    micro_batches: int
    num_layers: int = LAYERS

    @property
    def num_units(self) -> int:
        return 2 * self.num_layers + 2


CASES = (
    *(Case(ranks, m) for ranks in (1, 2) for m in (8, 32, 128)),
    *(Case(ranks, 32, layers) for ranks in (1, 2) for layers in (15, 30)),
    Case(4, 32),
)
QUICK_CASES = (Case(1, 8), Case(2, 8))


def measure_actions(cases: Sequence[Case], passes: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds per action by kind, for each case: of the slowest rank, the median over passes.

    Args:
        passes: starts of each world, in turn.
        rounds: steps of each case in a pass.
    """
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(passes):
        for num_ranks in sorted({case.num_ranks for case in cases}):
            of_world = [case for case in cases if case.num_ranks == num_ranks]
            for case, microseconds in zip(of_world, _time_world(num_ranks, of_world, rounds), strict=True):
                found[case].append(microseconds)
    return [
        {
            **asdict(case),
            "num_units": case.num_units,
            "microseconds": {kind: median(one[kind] for one in of_passes) for kind in of_passes[0]},
        }
        for case, of_passes in found.items()
    ]


def clock_microseconds() -> float:
    """What reading the clock takes, once: an action's figures hold one to three times as much."""
    readings = [time.thread_time_ns() for _ in range(10_000)]
    return median(after - before for before, after in pairwise(readings)) / 1e3


def _time_world(num_ranks: int, cases: Sequence[Case], rounds: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="dist_mtp_actions_") as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(json.dumps({"cases": [asdict(case) for case in cases], "rounds": rounds}))
        start_ranks("planner.idle:run_rank", num_ranks, folder, timeout_s=TIMEOUT_S)
        ranks = [json.loads((folder / f"actions.{rank}.json").read_text()) for rank in range(num_ranks)]
    return [{kind: max(rank[kind] for rank in of_case) for kind in of_case[0]} for of_case in zip(*ranks, strict=True)]


def growth(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes of the logarithms of microseconds, by what varies while the rest is equal.

    A pipeline of one rank sends nothing, so slopes by ranks begin at two.
    """
    names = ("num_ranks", "micro_batches", "num_units")
    result = []
    for varied in names:
        groups = defaultdict(list)
        for case in measured:
            if varied == "num_ranks" and case["num_ranks"] == 1:
                continue
            groups[tuple((name, case[name]) for name in names if name != varied)].append(case)
        for others, cases in groups.items():
            values = sorted(case[varied] for case in cases)
            if len(cases) < 2:
                continue
            ordered = sorted(cases, key=lambda case: case[varied])
            kinds = set.intersection(*(set(case["microseconds"]) for case in ordered))
            slopes = {kind: slope(values, [case["microseconds"][kind] for case in ordered]) for kind in sorted(kinds)}
            result.append({"varied": varied, "values": values, **dict(others), "log_log_slopes": slopes})
    return result
