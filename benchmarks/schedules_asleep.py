"""Pipeline schedules in sleep mode: DeepSeek-V3 on 2, 4 and 8 ranks of a machine with two cores, against other pipelines.

    python benchmarks/schedules_asleep.py            # about 15 minutes; the machine should be idle
    python benchmarks/schedules_asleep.py --quick    # P=2, two rounds: a smoke test

Instead of computing, stages sleep for the time that the planner's ``h100`` profile gives their units (one MTP module, rows
of 4096 tokens, all times scaled by one factor), so that two cores are enough for any number of ranks. All else is real: each
contender runs from its own package, and hidden states of [1, 64, 256] travel over gloo. dist_mtp executes its plan's table
over half-layer units. Peers have the best cut into whole layers that a search finds under their own schedule and, where the
first and the last stage are apart, an embedding on both, whose gradients are added up after the step. Steps are timed in turn,
one of each contender per round.

Efficiency is the sleep of all ranks over ranks * step time, so 1 - bubble. ``predicted`` is the step that the plan of dist_mtp
says, or the simulation of the peer's cut under its schedule without any communication. All goes to
``benchmarks/results/schedules_asleep.json``; exit code 1 if dist_mtp misses its prediction by more than 5 % or an efficiency
of 0.9 at P=4, or a peer is as fast as its first schedule.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from peers.cuts import best_cut, line, table_of, vee, whole_layers  # noqa: E402 - needs the path above
from peers.results import ROOT, circumstances, quartiles, start_ranks, write  # noqa: E402
from peers.workload import make_config, scaled  # noqa: E402

from dist_mtp.pipeline.costs import total_cost, unit_costs  # noqa: E402
from dist_mtp.pipeline.plan import make_plan  # noqa: E402

SIZES = {2: 8, 4: 8, 8: 32}
"""Ranks and microbatches."""
BUSY_S = {2: 3.0, 4: 4.0, 8: 6.0}
"""Sleep of a rank in a step, the mean over ranks."""
PEERS = {
    "torch 1F1B": ("1f1b", False, True),
    "torch ZBVZeroBubble": ("zbv", True, True),
    "torch DualPipeV": ("dualpipev", True, True),
    "deepspeed PipelineModule": ("1f1b", False, True),
    "deepspeed DualPipeVModule": ("dualpipev", True, False),
}
"""dist_mtp's table of the same schedule, for the search of a cut; placed as a V; splits backwards."""
PREDICTION_BOUND, EFFICIENCY_BOUND = 0.05, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "schedules_asleep.json")
    parser.add_argument("--ranks", type=int, nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--schedules", nargs="+", default=["planned", "zbv"], help="of dist_mtp; the first is compared")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all rounds of one number of ranks")
    parser.add_argument("--quick", action="store_true", help="two ranks, two rounds of short steps; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ranks, arguments.rounds = [2], 2

    worlds = []
    for ranks in arguments.ranks:
        print(f"timing {arguments.rounds} rounds on {ranks} ranks ...", flush=True)
        busy_s = 0.5 if arguments.quick else BUSY_S[ranks]
        worlds.append(time_world(ranks, busy_s, arguments.schedules, arguments.rounds, arguments.timeout))
        print("\n".join(table(worlds[-1])), flush=True)
    if arguments.quick:
        return 0
    within = all(within_bounds(world) for world in worlds)
    write(arguments.output, {**circumstances(), "within_bounds": within, "worlds": worlds})
    return 0 if within else 1


def time_world(ranks: int, busy_s: float, schedules: Sequence[str], rounds: int, timeout_s: float) -> dict[str, Any]:
    """Plan, cut, run and sum up one number of ranks."""
    micro_batches = SIZES[ranks]
    configs = {schedule: make_config(ranks, micro_batches, schedule) for schedule in schedules}
    plans = {schedule: make_plan(config) for schedule, config in configs.items()}
    units = unit_costs(configs[schedules[0]], plans[schedules[0]].profile)
    scale = busy_s * ranks / (micro_batches * total_cost(units).time)
    layers = scaled(whole_layers(units), scale)

    predicted = {f"dist_mtp {schedule}": scale * plan.timeline.step_time for schedule, plan in plans.items()}
    stages = {f"dist_mtp {schedule}": [len(stage.units) for stage in plan.stages] for schedule, plan in plans.items()}
    cuts = {}
    for name, (schedule, is_v, splits) in PEERS.items():
        stage_to_rank = vee(ranks) if is_v else line(ranks)
        cuts[name], predicted[name] = best_cut(
            layers, stage_to_rank, table_of(schedule, stage_to_rank, micro_batches, splits=splits)
        )
        stages[name] = [stop - start for start, stop in pairwise(cuts[name])]

    spec = {"ranks": ranks, "micro_batches": micro_batches, "scale": scale, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="dist_mtp_asleep_") as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(json.dumps({**spec, "ours": schedules, "peers": cuts}))
        start_ranks("peers.asleep:run_rank", ranks, folder, timeout_s=timeout_s)
        measured = json.loads((folder / "seconds.json").read_text())
    contenders = []
    for name, seconds in measured["steps"].items():
        step = quartiles(seconds)
        contenders.append(
            {
                "name": name,
                "step_s": step,
                "efficiency": busy_s / step["median"],
                "predicted_s": predicted[name],
                "over_predicted": step["median"] / predicted[name],
                "stages": stages[name],
            }
        )
    return {**spec, "busy_s": busy_s, "message_s": measured["message"], "contenders": contenders}


def within_bounds(world: dict[str, Any]) -> bool:
    ours = [contender for contender in world["contenders"] if contender["name"] not in PEERS]
    peers = [contender for contender in world["contenders"] if contender["name"] in PEERS]
    ahead = all(ours[0]["step_s"]["median"] < peer["step_s"]["median"] for peer in peers)
    predicted = all(abs(contender["over_predicted"] - 1) <= PREDICTION_BOUND for contender in ours)
    return predicted and ahead and (world["ranks"] != 4 or ours[0]["efficiency"] >= EFFICIENCY_BOUND)


def table(world: dict[str, Any]) -> list[str]:
    first = world["contenders"][0]["step_s"]["median"]
    lines = [
        f"P={world['ranks']}, M={world['micro_batches']}, {world['busy_s']:g} s of sleep per rank and step, a message takes "
        f"{1e3 * world['message_s']:.2f} ms, medians of {world['rounds']}",
        f"{'':<26}{'step, s':>9}{'IQR':>7}{'efficiency':>12}{'predicted, s':>14}{'measured/predicted':>20}{'ours/this':>11}  units or layers per stage",
    ]
    for c in world["contenders"]:
        step = c["step_s"]
        lines.append(
            f"{c['name']:<26}{step['median']:9.3f}{step['iqr']:7.3f}{c['efficiency']:12.3f}{c['predicted_s']:14.3f}"
            f"{c['over_predicted']:20.3f}{first / step['median']:11.3f}  {', '.join(map(str, c['stages']))}"
        )
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
