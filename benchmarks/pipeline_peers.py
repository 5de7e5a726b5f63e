"""Forward and backward of dist_mtp's pipeline against DeepSpeed's two, over the same modules, weights and rows.

    python benchmarks/pipeline_peers.py            # about ten minutes on two idle cores
    python benchmarks/pipeline_peers.py --quick    # D=1, two rounds: a smoke test

``model=small`` with a vocabulary of 4096 trains on two ranks of one thread each, in fp32, with one and two MTP modules. A step
is forward and backward of all microbatches and, where the embedding is on both ranks, the sum of its gradients; updates
are left out for all. Unit times are measured first (as ``dist-mtp plan measure=true`` does): dist_mtp plans with them,
and DeepSpeed's pipelines get the cut into whole layers that a search finds best with them, under their own schedules.

Per D and M, a table gives medians of steps timed in turn, ours over each, and the worst relative difference (2-norm) of any
parameter's gradient from ours. All goes to ``benchmarks/results/pipeline_peers.json``. Exit code 1 if a gradient differs by
more than 5e-6, or a ratio with the fewest microbatches that ``DualPipeVModule`` runs, M = 2 P, is above 0.95.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402 - needs the environment and the path above
from peers.cuts import best_cut, line, table_of, vee, whole_layers  # noqa: E402
from peers.results import ROOT, circumstances, quartiles, start_ranks, write  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from dist_mtp.bench.unit_times import measure_unit_times  # noqa: E402
from dist_mtp.cli.compose import compose  # noqa: E402
from dist_mtp.config import Config, resolve, to_dict  # noqa: E402
from dist_mtp.pipeline.plan import make_plan  # noqa: E402
from dist_mtp.pipeline.unit_times import UnitTimes, planned_costs  # noqa: E402

RANKS, VOCAB_SIZE = 2, 4096
OVERRIDES = (
    "model=small",
    f"model.vocab_size={VOCAB_SIZE}",
    "precision=fp32",
    "device=cpu",
    f"parallel.pp={RANKS}",
    "parallel.dp=1",
    "train.micro_batch_size=2",
    "train.seq_len=128",
)
PEERS = {"deepspeed PipelineModule": ("1f1b", False), "deepspeed DualPipeVModule": ("dualpipev", True)}
"""dist_mtp's table of the same schedule, for the search of a cut; placed as a V."""
GRADIENT_BOUND, RATIO_BOUND = 5e-6, 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "pipeline_peers.json")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--schedules", nargs="+", default=["planned", "zbv"], help="of dist_mtp; the first is compared")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8], help="the first is held to the bound")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for all rounds of one table")
    parser.add_argument("--quick", action="store_true", help="one table, two rounds; checks gradients, writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.depths, arguments.micro_batches, arguments.rounds = [1], [4], 2
    torch.set_num_threads(1)

    results = []
    for depth in arguments.depths:
        times = measure_unit_times(make_config(depth, arguments.schedules[0]), torch.device("cpu"))
        for micro_batches in arguments.micro_batches:
            configs = {
                f"dist_mtp {schedule}": make_config(depth, schedule, micro_batches, times)
                for schedule in arguments.schedules
            }
            print(f"timing {arguments.rounds} rounds with D={depth}, M={micro_batches} ...", flush=True)
            contenders = compare(configs, arguments.rounds, arguments.timeout)
            result = {"depth": depth, "micro_batches": micro_batches, "unit_times": times.to_json()["units"]}
            results.append({**result, "contenders": contenders})
            print("\n".join(table(results[-1])), flush=True)
    same = all(c["gradient_difference"] <= GRADIENT_BOUND for r in results for c in r["contenders"])
    if arguments.quick:
        return 0 if same else 1
    held = [r for r in results if r["micro_batches"] == arguments.micro_batches[0]]
    faster = all(c["ours_over_this"] <= RATIO_BOUND for r in held for c in r["contenders"] if c["name"] in PEERS)
    overview = {**circumstances(), "overrides": OVERRIDES, "rounds": arguments.rounds}
    write(arguments.output, {**overview, "same_gradients": same, "faster": faster, "tables": results})
    return 0 if same and faster else 1


def compare(configs: Mapping[str, Config], rounds: int, timeout_s: float) -> list[dict[str, Any]]:
    """Plan and cut with measured times, run in turn, compare gradients.

    Args:
        configs: of dist_mtp, by the contender's name; all train the same, and the first is compared with all others.
    """
    ours, config = next(iter(configs.items()))
    plans = {name: make_plan(config) for name, config in configs.items()}
    predicted = {name: plan.timeline.step_time for name, plan in plans.items()}
    stages = {name: [len(stage.units) for stage in plan.stages] for name, plan in plans.items()}
    layers, cuts = whole_layers(planned_costs(config, plans[ours].profile)), {}
    for name, (schedule, is_v) in PEERS.items():
        stage_to_rank = vee(RANKS) if is_v else line(RANKS)
        peer_table = table_of(schedule, stage_to_rank, config.train.micro_batches, splits=False)
        cuts[name], predicted[name] = best_cut(layers, stage_to_rank, peer_table)
        stages[name] = [stop - start for start, stop in pairwise(cuts[name])]

    spec = {"ours": {name: to_dict(config) for name, config in configs.items()}, "peers": cuts, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="dist_mtp_peers_") as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(json.dumps(spec))
        start_ranks("peers.computing:run_rank", RANKS, folder, timeout_s=timeout_s)
        seconds = json.loads((folder / "seconds.json").read_text())
        differences = {name: worst_difference(folder, ours, name) for name in seconds}
    steps = {name: quartiles(values) for name, values in seconds.items()}
    return [
        {
            "name": name,
            "step_s": step,
            "ours_over_this": steps[ours]["median"] / step["median"],
            "predicted_s": predicted[name],
            "stages": stages[name],
            "gradient_difference": differences[name][0],
            "worst_tensor": differences[name][1],
        }
        for name, step in steps.items()
    ]


def make_config(depth: int, schedule: str, micro_batches: int = 4, times: UnitTimes | None = None) -> Config:
    keys = (f"mtp.depth={depth}", f"pipeline.schedule={schedule}", f"train.micro_batches={micro_batches}")
    config = compose([*OVERRIDES, *keys])
    if times is not None:
        config = replace(config, pipeline=replace(config.pipeline, unit_times=dict(times.seconds)))
    return resolve(config, vocab_size=VOCAB_SIZE, world_size=RANKS)


def worst_difference(folder: Path, reference: str, name: str) -> tuple[float, str]:
    """Relative 2-norm of the gradient that differs most from the reference's, and its tensor; each rank's copy is compared."""
    expected = {k: v for rank in range(RANKS) for k, v in load_file(folder / f"{reference}.{rank}.safetensors").items()}
    found: dict[tuple[str, int], torch.Tensor] = {}
    for rank in range(RANKS):
        gradients = load_file(folder / f"{name}.{rank}.safetensors")
        found |= {(tensor, rank): gradient for tensor, gradient in gradients.items()}
    if missing := set(expected) ^ {tensor for tensor, _ in found}:
        raise AssertionError(f"{name} and {reference} do not have the same gradients: {sorted(missing)}")
    return max(
        (float((gradient - expected[tensor]).norm() / expected[tensor].norm()), f"{tensor} on rank {rank}")
        for (tensor, rank), gradient in found.items()
    )


def table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"D={result['depth']}, P={RANKS}, M={result['micro_batches']}",
        f"{'':<26}{'step, s':>9}{'IQR':>7}{'ours/this':>11}{'planned, s':>12}{'gradients differ by':>21}  {'units or layers per stage'}",
    ]
    for c in result["contenders"]:
        step = c["step_s"]
        lines.append(
            f"{c['name']:<26}{step['median']:9.3f}{step['iqr']:7.3f}{c['ours_over_this']:11.3f}{c['predicted_s']:12.3f}"
            f"{c['gradient_difference']:21.1e}  {', '.join(map(str, c['stages']))}"
        )
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
