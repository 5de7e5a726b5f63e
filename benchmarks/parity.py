"""The full parity matrix: every layout of 2, 4 and 8 ranks, pipelines, replicas and shared experts, against one process.

    python benchmarks/parity.py            # about ten minutes on two cores; `make parity`

Each run trains three steps in fp32 on the small model of ``tests/support/parity.py``: every MTP depth, tied and untied, and
all ways to balance experts. The first table gives, per layout, the worst relative difference from the single process over
all variants: of any loss, of the clip norm and of any gradient tensor (2-norm). The second part is the yardstick: how far the single process itself is from the same step
in float64. Both go to ``benchmarks/results/parity.json``. Exit code 1 when a layout exceeds its bound.
"""

# ruff: noqa: E402 - imports below need the path of the test helpers
from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from safetensors.torch import load_file
from support.parity import (
    ALL_VARIANTS,
    GRADIENT_BOUND,
    LOSS_BOUND,
    NORM_BOUND,
    REFERENCE,
    STEPS,
    Difference,
    Layout,
    Variant,
    compare,
    make_config,
    relative,
    run_dir,
    write_corpus,
)
from support.ranks import run_ranks
from support.worlds import matrix

from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.naming import logical_tensors, routers
from dist_mtp.model.targets import count_targets, loss_coefficients
from dist_mtp.model.transformer import HEAD, LanguageModel, MicroBatch
from dist_mtp.pipeline.costs import list_units

WORLDS = (1, 2, 4, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parity.json")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all runs of one world size")
    arguments = parser.parse_args()

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dist_mtp_parity_") as scratch:
        folder = Path(scratch)
        write_corpus(folder / "text")
        for world in WORLDS:
            print(f"training on {world} rank(s) ...", flush=True)
            run_ranks("support.worlds:whole_matrix", world, folder / f"world_{world}", timeout_s=arguments.timeout)
        rows = [row for world in WORLDS[1:] for row in rows_of(folder, world)]
        floor = rounding_floor(folder / "world_1")

    within = all(row["within_bounds"] for row in rows)
    print("\n".join(["", *table(rows), "", *floor_lines(floor)]))
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "numpy")}
        | {"python": platform.python_version()},
        "variants": [str(variant) for variant in ALL_VARIANTS],
        "steps": STEPS,
        "bounds": {"loss": LOSS_BOUND, "grad_norm": NORM_BOUND, "gradient": GRADIENT_BOUND},
        "within_bounds": within,
        "layouts": rows,
        "fp32_rounding_floor": floor,
        "seconds": round(time.monotonic() - started),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    return 0 if within else 1


def rows_of(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """One row per layout of this number of ranks."""
    found: dict[Layout, dict[Variant, Difference]] = {}
    for layout, variant in matrix(world_size):
        run = run_dir(folder / f"world_{world_size}", layout, variant)
        reference = run_dir(folder / "world_1", REFERENCE, variant)
        found.setdefault(layout, {})[variant] = compare(run, reference)
    return [row_of(layout, differences) for layout, differences in found.items()]


def row_of(layout: Layout, found: dict[Variant, Difference]) -> dict[str, Any]:
    """Worst differences of one layout over its variants."""
    variant, worst = max(found.items(), key=lambda item: item[1].gradient)
    return {
        "layout": str(layout),
        "placement": layout.placement,
        "schedule": layout.schedule,
        "pp": layout.pp,
        "dp": layout.dp,
        "ep": layout.ep,
        "variants": len(found),
        "loss": max(difference.loss for difference in found.values()),
        "grad_norm": max(difference.grad_norm for difference in found.values()),
        "gradient": worst.gradient,
        "worst_tensor": f"{variant}: {worst.tensor}",
        "within_bounds": all(difference.within_bounds() for difference in found.values()),
    }


def rounding_floor(world_1: Path) -> dict[str, Any]:
    """Relative 2-norm differences of the single process's fp32 gradients from float64 ones, over all dumped tensors."""
    found: dict[str, float] = {}
    for variant in ALL_VARIANTS:
        for step in (1, STEPS):
            dump = load_file(run_dir(world_1, REFERENCE, variant) / "dumps" / f"step_{step}.safetensors")
            for name, gradient in float64_gradients(world_1, variant, dump).items():
                found[f"{variant}: step {step} grad/{name}"] = relative(dump[f"grad/{name}"], gradient)
    worst = max(found, key=lambda name: found[name])
    return {
        "worst": found[worst],
        "median": statistics.median(found.values()),
        "worst_tensor": worst,
        "tensors": len(found),
    }


def float64_gradients(folder: Path, variant: Variant, dump: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a dumped step's objective by logical name, everything in float64."""
    config = make_config(folder, REFERENCE, variant)
    units = [unit.name for unit in list_units(config)]
    model = LanguageModel(config, set(units)).double()
    for name, router in routers(model):
        router.e_score_correction_bias.copy_(dump[f"bias/{name}"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for logical in logical_tensors(name, tuple(parameter.shape)):
                logical.view(flat).copy_(dump[f"param/{logical.name}"])

    input_ids, document_ids = dump["batch/input_ids"], dump["batch/document_ids"]
    seq_len, depth = config.train.seq_len, config.mtp.depth
    counts = [int(count) for count in count_targets(document_ids, seq_len, depth)]
    coefficients = loss_coefficients(counts, config.mtp, config.mtp.loss_weight, config.tokens_per_step)
    context = AttentionContext.of(document_ids[:, :seq_len], config.model)
    batch = MicroBatch(input_ids, document_ids, context, coefficients)

    hidden = None
    for unit in units:
        if unit != HEAD:
            hidden = model.run_unit(unit, hidden, batch)
    assert hidden is not None
    loss, _ = model.run_head(hidden, batch)
    loss.backward()

    gradients = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for logical in logical_tensors(name, tuple(parameter.shape)):
            gradients[logical.name] = logical.view(grad.reshape(-1))
    return gradients


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'placement':<9}  {'schedule':<16}  pp  dp  ep  {'loss':>8}  {'clip norm':>9}  {'gradient':>8}"]
    for row in rows:
        lines.append(
            f"{row['placement']:<9}  {row['schedule']:<16}  {row['pp']:>2}  {row['dp']:>2}  {row['ep']:>2}  {row['loss']:8.1e}  "
            f"{row['grad_norm']:9.1e}  {row['gradient']:8.1e}{'' if row['within_bounds'] else '  OUT OF BOUNDS'}"
        )
    lines.append(f"{'bound':<39}  {LOSS_BOUND:8.1e}  {NORM_BOUND:9.1e}  {GRADIENT_BOUND:8.1e}")
    return lines


def floor_lines(floor: dict[str, Any]) -> list[str]:
    return [
        f"fp32 rounding floor, one process against float64 over {floor['tensors']:,} gradient tensors:",
        f"  worst {floor['worst']:.1e} ({floor['worst_tensor']}), median {floor['median']:.1e}",
    ]


if __name__ == "__main__":
    sys.exit(main())
