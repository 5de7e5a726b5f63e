"""Planning on the CPU: simulated steps of DeepSeek-V3 under every schedule, and what plans and their execution cost.

    python benchmarks/planning.py            # about ten minutes; the machine should be idle for the second and third part
    python benchmarks/planning.py --quick    # one setting, few sizes: a smoke test of the first target, writes nothing

1. Simulated steps with D = 0 to 3 MTP modules on 8 and 16 pipeline ranks: 1F1B over the best cut into whole layers, with head
   and MTP on the last rank, as the baseline; the registered schedules over half-layer units; and ``planned``, with its default
   activations and with at most 1.1 times those of the baseline's fullest rank. Rows of 4096 tokens, bf16, ``h100`` profile, and
   no limit of a device's memory. Once with all experts on each rank, once with the experts of a stage shared by 64 of 128
   replicas, whose all-to-alls nothing overlaps with. Simulations, not measurements.
2. Seconds of ``make_plan`` under ``planned`` (the median of three in a process of its own), of its parts, and the memory by which
   the process grows, by ranks, microbatches and units; and ``dist-mtp plan`` for 16 pipeline ranks x 128 replicas.
3. Microseconds of CPU time per action that the runtime's thread needs on ranks whose units compute nothing: its own (``runtime``),
   those of :class:`~dist_mtp.pipeline.stage.Stage` (autograd's call and a loop over units), and those of taking the input of F or
   I; medians, of the slowest rank. Waits do not count, nor do threads of gloo. With more ranks than cores caches are colder.

Slopes are those of the logarithms. All goes to ``benchmarks/results/planning.json``; exit code 1 if, with one MTP module and all
experts on each rank, no ``planned`` row within 1.1 times the baseline's activations has a bubble of at most 6 % (P=8, M=32) and
10 % (P=16, M=120), or ``dist-mtp plan`` takes more than 10 seconds or 1 GiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from peers.results import ROOT, circumstances, write  # noqa: E402 - needs the path above
from planner import actions, growth, steps  # noqa: E402

SETTINGS = tuple(
    steps.Setting(ranks, micro_batches, depth, dp, ep)
    for (dp, ep), (ranks, micro_batches), depth in product(((1, 1), (128, 64)), ((8, 32), (16, 120)), range(4))
)
QUICK_SETTINGS = (steps.Setting(8, 32, 1),)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "planning.json")
    parser.add_argument("--quick", action="store_true", help="one setting, few sizes; writes nothing")
    arguments = parser.parse_args()
    quick = arguments.quick

    result: dict[str, Any] = {"steps": []}
    for setting in QUICK_SETTINGS if quick else SETTINGS:
        rows = steps.compare(setting)
        met = steps.meets_target(setting, rows)
        result["steps"].append({**vars(setting), "target_met": met, "rows": rows})
        print("\n".join(steps_table(setting, rows, met)), flush=True)

    sweeps = growth.QUICK_SWEEPS if quick else growth.SWEEPS
    result["growth"] = growth.measure_sweeps(sweeps, repetitions=1 if quick else 3)
    print("\n".join(growth_table(result["growth"])), flush=True)
    with tempfile.TemporaryDirectory(prefix="dist_mtp_plan_") as scratch:
        result["command"] = growth.measure_command(Path(scratch))
    print("\n".join(command_lines(result["command"])), flush=True)

    cases = actions.QUICK_CASES if quick else actions.CASES
    result["actions"] = actions.measure_actions(cases, passes=1 if quick else 3, rounds=5 if quick else 30)
    result["action_growth"] = actions.growth(result["actions"])
    result["clock_microseconds"] = actions.clock_microseconds()
    print("\n".join(actions_table(result["actions"], result["action_growth"])))
    print(f"of which each reading of the clock takes {result['clock_microseconds']:.2f}, one to three times per figure")

    reached = all(setting["target_met"] is not False for setting in result["steps"])
    reached &= quick or result["command"]["within_limits"]
    if not quick:
        write(arguments.output, {**circumstances(), "reached": reached, **result})
    return 0 if reached else 1


def steps_table(setting: steps.Setting, rows: Sequence[dict[str, Any]], met: bool | None) -> list[str]:
    width = len(steps.CAPPED)
    experts = "" if setting.ep == 1 else f", dp={setting.dp}, ep={setting.ep} with exposed all-to-alls"
    lines = [
        f"P={setting.num_ranks}, M={setting.micro_batches}, D={setting.depth}{experts}",
        f"{'':<{width}}{'bubble':>9}{'step, s':>9}{'activations, GB':>17}{'ratio':>7}{'balance':>9}{'ramp':>8}  table",
    ]
    for row in rows:
        lines.append(
            f"{row['name']:<{width}}{row['bubble']:9.1%}{row['step_time']:9.3f}{row['peak_activation_bytes'] / 1e9:17.1f}"
            f"{row['activations_ratio']:7.2f}{row['bound']['balance']:9.1%}{row['bound']['ramp']:8.1%}  {row['origin']}"
        )
    if met is not None:
        target = steps.TARGETS[setting.num_ranks, setting.micro_batches]
        lines.append(
            f"planned, {target:.0%} at no more than {steps.ACTIVATIONS} x the activations: {'met' if met else 'MISSED'}"
        )
    return [*lines, ""]


def growth_table(sweeps: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "seconds of make_plan, and growth of memory",
        f"{'':<16}{'P':>4}{'M':>5}{'units':>7}{'all':>9}{'partition':>11}{'search':>9}{'rest':>9}{'MB':>8}",
    ]
    for sweep in sweeps:
        for cost in sweep["costs"]:
            lines.append(
                f"{'':<16}{cost['num_ranks']:4}{cost['micro_batches']:5}{2 * cost['num_layers'] + 2:7}{_costs(cost, 3)}"
                f"{cost['bytes'] / 1e6:8.1f}"
            )
        slopes = sweep["log_log_slopes"]
        lines.append(f"{'slope by ' + sweep['varied']:<32}{_costs(slopes, 2)}{slopes['bytes']:8.2f}")
    return lines


def _costs(seconds: dict[str, float], digits: int) -> str:
    widths = {"make_plan_s": 9, "partition_s": 11, "search_s": 9, "rest_s": 9}
    return "".join(f"{seconds[name]:{width}.{digits}f}" for name, width in widths.items())


def command_lines(command: dict[str, Any]) -> list[str]:
    return [
        f"{' '.join(command['command'])}",
        f"  {command['seconds']:.1f} s ({command['cpu_seconds']:.1f} s of CPU time), {command['max_rss_bytes'] / 2**20:.0f} MiB "
        f"(at most {growth.COMMAND_SECONDS:g} s and {growth.COMMAND_BYTES / 2**20:g} MiB)",
        "",
    ]


def actions_table(cases: Sequence[dict[str, Any]], grows: Sequence[dict[str, Any]]) -> list[str]:
    kinds = ("F runtime", "F stage", "I runtime", "I stage", "W runtime", "W stage", "input", "send", "receive")
    header = "".join(f"{kind:>11}" for kind in kinds)
    lines = ["microseconds of CPU time per action", f"{'':<28}{'P':>4}{'M':>5}{'units':>7}{header}"]
    for case in cases:
        spent = "".join(_cell(case["microseconds"].get(kind), 1) for kind in kinds)
        lines.append(f"{'':<28}{case['num_ranks']:4}{case['micro_batches']:5}{case['num_units']:7}{spent}")
    for group in grows:
        fixed = ", ".join(
            f"{short}={group[name]}"
            for name, short in (("num_ranks", "P"), ("micro_batches", "M"), ("num_units", "units"))
            if name in group
        )
        slopes = "".join(_cell(group["log_log_slopes"].get(kind), 2) for kind in kinds)
        lines.append(f"{'slope by ' + group['varied'] + ', ' + fixed:<44}{slopes}")
    return lines


def _cell(value: float | None, digits: int) -> str:
    return f"{'':>11}" if value is None else f"{value:11.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
