"""What a measured timeline costs: every third step of one run has one, and is compared with the step before it.

    python benchmarks/timeline_overhead.py    # about two minutes on two cores

The default model trains on two pipeline ranks. Three figures, of medians over the steps: the time of measured steps
over that of the steps before them (those after them follow a drawing, with cold caches); the same ratio between two
halves of the steps before, which says how far ratios are noise; and the seconds in which rank 0 draws a timeline after
its step, while the others wait. A second run without timelines must have the same metrics and the same tensors in its
final checkpoint, bit for bit. The measured bubble stands beside the plan's, and beside that of the plan's simulation
with the median measured time of each stage's actions in place of its own: what that leaves unexplained is messages and
the host. Last, the seconds that a picture of 16 ranks takes. All goes to ``benchmarks/results/timeline_overhead.json``;
exit code 1 if the runs differ.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from safetensors.numpy import load_file  # noqa: E402 - imports below need the path of this checkout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from training_runs import train_alone  # noqa: E402

from dist_mtp.cli.compose import compose  # noqa: E402
from dist_mtp.config import resolve  # noqa: E402
from dist_mtp.monitor.metrics import comparable, read_metrics  # noqa: E402
from dist_mtp.monitor.timeline_files import write_timeline  # noqa: E402
from dist_mtp.pipeline.costs import UnitCost  # noqa: E402
from dist_mtp.pipeline.plan import make_plan  # noqa: E402
from dist_mtp.pipeline.simulate import simulate  # noqa: E402
from dist_mtp.pipeline.timeline import FIRST_STEP, from_marks  # noqa: E402
from dist_mtp.run_folder import read_config  # noqa: E402

EVERY = 3
STEPS, WARM_UP = 240, 12
OVERRIDES = (
    f"train.steps={STEPS}",
    "parallel.pp=2",
    "device=cpu",
    "eval.every=0",
    "eval.batches=1",
    "checkpoint.every=0",
)
"""Nothing between steps but what is measured."""
DEFAULT_EVERY = 100
"""``monitor.timeline_every`` where nothing is said."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "timeline_overhead.json")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dist_mtp_timeline_") as scratch:
        measured, plain = Path(scratch) / "measured", Path(scratch) / "plain"
        for run, every in ((measured, EVERY), (plain, 0)):
            print(f"training {STEPS} steps with monitor.timeline_every={every} ...", flush=True)
            train_alone(run, (*OVERRIDES, f"monitor.timeline_every={every}"), arguments.timeout)
        result = {
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "deepspeed")}
            | {"python": platform.python_version()},
            "machine": {"cores": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 2)},
            "overrides": OVERRIDES,
            **timing(measured),
            "bubble": bubbles(measured),
            "large_picture": large_picture(16, 128, Path(scratch)),
            "same": {"metrics": metrics(measured) == metrics(plain), "checkpoint": state(measured) == state(plain)},
        }
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(result["same"].values()) else 1


def timing(run: Path) -> dict[str, Any]:
    """Ratios and seconds, see above, and what they come to with :data:`DEFAULT_EVERY`."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if WARM_UP < row["step"] < STEPS]
    times = {int(row["step"]): row["step_time"] for row in rows}
    ended = {event.step: event.wall_time for event in scalar_events(run)}
    # What is left of the time between two steps' ends, without the second step itself, is what rank 0 did after the first.
    after = {step: ended[step + 1] - ended[step] - times[step + 1] for step in times if step + 1 in times}
    with_one, without = (
        [s for s in times if s % EVERY == place] for place in (FIRST_STEP % EVERY, (FIRST_STEP - 1) % EVERY)
    )
    base = statistics.median(times[s] for s in without)
    recording = statistics.median(times[s] for s in with_one) / base
    drawing = statistics.median(after[s] for s in with_one if s in after) - statistics.median(
        after[s] for s in without if s in after
    )
    return {
        "step_time_s": {
            "without": quartiles([times[s] for s in without]),
            "with": quartiles([times[s] for s in with_one]),
        },
        "recording_ratio": recording,
        "noise_ratio": statistics.median(times[s] for s in without[::2])
        / statistics.median(times[s] for s in without[1::2]),
        "drawing_s": drawing,
        "share_of_run_pct": 100 * ((recording - 1) * base + drawing) / (DEFAULT_EVERY * base),
    }


def bubbles(run: Path) -> dict[str, Any]:
    """As shares of a step of the pipeline, without optimizer and reduction."""
    timelines = [json.loads(file.read_text()) for file in sorted((run / "timelines").iterdir())]
    timelines = [timeline for timeline in timelines if timeline["step"] > WARM_UP]
    waits = [statistics.mean(rank["waited"] for rank in t["ranks"]) / t["step_time"] for t in timelines]
    plan, times = make_plan(read_config(run / "config.yaml")), action_times(timelines)
    measured = [UnitCost(*(times[stage, kind] for kind in "FIW")) for stage in range(plan.num_stages)]
    planned = [stage.cost for stage in plan.stages]
    return {
        "plan": plan.timeline.bubble,
        "plan_with_measured_times": simulate(plan.table, measured, plan.stage_to_rank).bubble,
        "micro_batch_s": {"plan": by_kind(planned), "measured": by_kind(measured)},
        "measured": quartiles([timeline["bubble"] for timeline in timelines]),
        "waiting_for_messages": statistics.median(waits),
    }


def action_times(timelines: Sequence[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Stage and kind of action -> median seconds."""
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for timeline in timelines:
        for rank in timeline["ranks"]:
            for name, _, start, end in rank["actions"]:
                stage, kind, _ = re.fullmatch(r"(\d+)([A-Z])(\d+)", name).groups()
                seconds[int(stage), kind].append(end - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def by_kind(stages: Sequence[UnitCost]) -> dict[str, float]:
    """Seconds of all stages together, one microbatch."""
    return {name: sum(getattr(cost, f"time_{name}") for cost in stages) for name in "fiw"}


def large_picture(ranks: int, micro_batches: int, folder: Path) -> dict[str, float]:
    """Seconds to draw a step of DeepSeek-V3 as simulated, on this machine; the second picture, as imports are made once."""
    overrides = ["model=deepseek_v3", "precision=bf16", "pipeline.device_profile=h800", "tokenizer=bpe"]
    sizes = [f"parallel.pp={ranks}", "parallel.dp=1", f"train.micro_batches={micro_batches}"]
    config = resolve(compose([*overrides, *sizes]), vocab_size=129280, world_size=ranks)
    plan = make_plan(config)
    lines = [[event for event in plan.timeline.events if event.rank == rank] for rank in range(ranks)]
    # Each rank waits for its input from the end of its previous action on.
    marks = [[(line[i - 1].end if i else 0.0, e.start, e.end) for i, e in enumerate(line)] for line in lines]
    timeline = from_marks(plan.table, marks)
    for _ in range(2):
        started = time.perf_counter()
        write_timeline(plan, 1, timeline, folder)
        seconds = time.perf_counter() - started
    return {"ranks": ranks, "micro_batches": micro_batches, "seconds": seconds}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quarter": low, "three_quarters": high}


def scalar_events(run: Path) -> list[Any]:
    """Of a scalar that every step has."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return list(events.Scalars("loss/main"))


def metrics(run: Path) -> list[dict[str, float]]:
    return [dict(comparable(row)) for row in read_metrics(run / "metrics.jsonl")]


def state(run: Path) -> dict[tuple[str, str], str]:
    """SHA-256 of each tensor in the final checkpoint, by file and name; whole files differ, as safetensors orders its header by
    chance."""
    files = sorted((run / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors"))
    assert files, f"{run} has no final checkpoint"
    return {
        (file.name, name): hashlib.sha256(tensor.tobytes()).hexdigest()
        for file in files
        for name, tensor in load_file(file).items()
    }


if __name__ == "__main__":
    sys.exit(main())
