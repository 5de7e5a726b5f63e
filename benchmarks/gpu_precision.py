"""FP8 against bf16 on a GPU at the sizes of DeepSeek-V3: matrix products, and training a slice of the model.

    python benchmarks/gpu_precision.py                # one GPU with FP8 and 80 GB, less than 8 minutes; or make gpu-check
    python benchmarks/gpu_precision.py --cpu-smoke    # tiny sizes and emulated FP8 on the CPU: shows that this file runs

1. Each linear layer of DeepSeek-V3, and its experts with 4 and 32 of them on a GPU, for one microbatch of 4096 tokens: forward,
   input gradient and weight gradient in bf16 and FP8, as a share of what a bf16 product of 8192 x 8192 x 8192 reaches on the
   same GPU in the same run. With quantisation of inputs and gradients, and without.
2. Four MoE layers, one MTP module and the whole head, in the widths of DeepSeek-V3, with 4 of the 256 experts, as each GPU has
   under parallel.ep=64: every choice of an expert counts as one of the 4 that are there, so they get as many rows as from 64
   balanced GPUs, and nothing travels. A step is 4 microbatches with fp32 accumulation of gradients; there is no optimizer, whose
   state would not fit beside, but weights are quantised anew in each step. bf16 and FP8 use the same weights, in turns.
   Tokens per second of the whole and of the four layers alone, of which FP8 has all linear layers (the head is always bf16),
   and the memory that one microbatch takes.

Everything goes to ``benchmarks/results/gpu_precision_DEVICE.json``. Exit code 1 when FP8 trains less than 1.25 times as fast as
bf16, 2 without such a GPU.
"""

# ruff: noqa: E402 - imports below need the path of the package
from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dist_mtp.bench.layers import Shape, layer_shapes, random_operands
from dist_mtp.bench.model_slice import ModelSlice
from dist_mtp.bench.precision import FormatResult, measure_formats
from dist_mtp.bench.products import PRODUCTS
from dist_mtp.bench.timing import device_name, interleaved_medians
from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, PrecisionConfig, resolve
from dist_mtp.pipeline.costs import flops_per_token, total_cost, unit_costs
from dist_mtp.pipeline.devices import PROFILES
from dist_mtp.pipeline.memory import rank_memory
from dist_mtp.precision.fp8 import scaled_mm
from dist_mtp.precision.fp8.backend import Fp8Backend, make_backend

SEED = 1
PRECISIONS = ("bf16", "fp8")
TARGET = 1.25
"""Tokens per second in FP8 over those in bf16."""
USABLE_MEMORY = 0.85
"""Share of the free GPU memory that is planned for."""


@dataclass(frozen=True)
class Setup:
    """What is measured on one kind of device."""

    overrides: tuple[str, ...]
    """Of the slice; ``parallel.ep`` leaves the experts of one rank."""
    more_experts: str
    """Override for the second number of experts."""
    backend: str
    micro_batches: int
    """Of a step of the slice."""
    reference_size: int
    seconds_per_shape: float
    seconds_for_model: float


GPU = Setup(
    overrides=(
        "model=deepseek_v3",
        "model.num_layers=4",
        "model.first_k_dense_replace=0",
        "mtp=d1",
        "parallel.pp=1",
        "parallel.dp=64",
        "parallel.ep=64",
        "train.micro_batch_size=1",
        "train.seq_len=4096",
        "precision=fp8",
    ),
    more_experts="parallel.ep=8",
    backend="torch",
    micro_batches=4,
    reference_size=8192,
    seconds_per_shape=4.0,
    seconds_for_model=90.0,
)
CPU_SMOKE = Setup(
    overrides=(
        "model=tiny",
        "model.num_layers=2",
        "model.first_k_dense_replace=0",
        "mtp=d1",
        "parallel.pp=1",
        "parallel.dp=4",
        "parallel.ep=4",
        "train.micro_batch_size=1",
        "train.seq_len=64",
        "precision=fp8",
    ),
    more_experts="parallel.ep=2",
    backend="emulated",
    micro_batches=1,
    reference_size=64,
    seconds_per_shape=0.0,
    seconds_for_model=0.0,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/gpu_precision_DEVICE.json")
    options = parser.parse_args(arguments)
    setup, device = (CPU_SMOKE, torch.device("cpu")) if options.cpu_smoke else (GPU, torch.device("cuda", 0))
    if not options.cpu_smoke and (reason := scaled_mm.problem(device)):
        print(f"not run: no GPU with FP8 here ({reason}); --cpu-smoke tries this file out without", file=sys.stderr)
        return 2

    started = time.monotonic()
    backend = make_backend(setup.backend, device)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "driver": driver_version(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": installed("triton")},
        "backend": backend.name,
        "seed": SEED,
    }
    print(f"{result['device']}, driver {result['driver']}, {result['versions']}, FP8 by {backend.name}\n", flush=True)
    result |= measure_layers(setup, backend, device)
    print("\n".join(layer_table(result)), flush=True)
    result["slice"] = measure_slice(setup, backend, device, result["reference_flops_per_s"])
    print("\n".join(["", *slice_table(result["slice"])]))
    result["seconds"] = round(time.monotonic() - started)
    path = options.output or ROOT / "benchmarks" / "results" / f"gpu_precision_{file_name(result['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")
    return 0 if options.cpu_smoke or result["slice"]["model"]["ratio"] >= TARGET else 1


def config_of(*overrides: str) -> Config:
    return resolve(compose(overrides), vocab_size=257)


def measure_layers(setup: Setup, backend: Fp8Backend, device: torch.device) -> dict[str, Any]:
    """Reference and products of every shape; the reference is measured again beside each, as clocks of GPUs change."""
    config = config_of(*setup.overrides, "model.first_k_dense_replace=1")  # the slice has no dense layer
    more = layer_shapes(config_of(*setup.overrides, setup.more_experts))
    shapes = [*layer_shapes(config), *(shape for shape in more if shape.num_experts)]
    tokens = config.train.micro_batch_size * config.train.seq_len
    torch.manual_seed(SEED)
    square = torch.randn(setup.reference_size, setup.reference_size, device=device).bfloat16()
    references, layers = [], []
    for shape in shapes:
        budget = 0.1 * setup.seconds_per_shape
        references.append(interleaved_medians({"square": lambda: square @ square}, device, budget_s=budget)["square"])
        rows = tokens * config.model.num_experts_per_tok if shape.num_experts else tokens
        layers.append(measure_shape(shape, rows, setup, backend, device))
    return {
        "reference_size": setup.reference_size,
        "reference_flops_per_s": 2.0 * setup.reference_size**3 / statistics.median(references),
        "layers": layers,
    }


def measure_shape(shape: Shape, rows: int, setup: Setup, backend: Fp8Backend, device: torch.device) -> dict[str, Any]:
    operands = random_operands(shape, rows, seed=SEED, device=device)
    formats = measure_formats(
        operands, {"bf16": torch.bfloat16}, {"fp8": backend}, power_of_two=False, budget_s=setup.seconds_per_shape
    )
    return {
        "shape": dataclasses.asdict(shape),
        "rows": rows,
        "flops": operands.flops,
        "formats": {
            name: dataclasses.asdict(found) | {"flops_per_s": speeds(found, operands.flops)}
            for name, found in formats.items()
        },
    }


def speeds(found: FormatResult, flops: float) -> dict[str, dict[str, float]]:
    """FLOP/s of each product and of all three, with quantisation and without."""
    return {
        kind: {
            **{p: flops / found.product_seconds(p, quantization=included) for p in PRODUCTS},
            "all": len(PRODUCTS) * flops / found.total_seconds(quantization=included),
        }
        for kind, included in (("with_quantization", True), ("without_quantization", False))
    }


def measure_slice(setup: Setup, backend: Fp8Backend, device: torch.device, reference: float) -> dict[str, Any]:
    """bf16 and FP8 in turns, the whole slice and its layers alone."""
    config = fitting_config(setup, device)
    part = ModelSlice(config, backend, device)
    on_gpu = device.type == "cuda"
    memory = {precision: part.microbatch_bytes(precision) for precision in PRECISIONS} if on_gpu else {}
    cases = {
        (name, precision): functools.partial(part.step, precision, setup.micro_batches, whole=name == "model")
        for name in ("model", "layers")
        for precision in PRECISIONS
    }
    seconds = interleaved_medians(cases, device, budget_s=setup.seconds_for_model, max_rounds=20)
    tokens = setup.micro_batches * part.tokens
    flops = tokens * flops_per_token(config)
    result: dict[str, Any] = {
        "overrides": list(setup.overrides),
        "seq_len": config.train.seq_len,
        "micro_batches": setup.micro_batches,
        "experts": config.experts_per_rank,
        "planned_bytes": planned_bytes(config),
        "microbatch_bytes": memory,
        "model_flops_share": {precision: flops / seconds["model", precision] / reference for precision in PRECISIONS},
    }
    for name in ("model", "layers"):
        result[name] = {f"{precision}_tokens_per_s": tokens / seconds[name, precision] for precision in PRECISIONS}
        result[name]["ratio"] = seconds[name, "bf16"] / seconds[name, "fp8"]
    return result


def fitting_config(setup: Setup, device: torch.device) -> Config:
    """The slice, with rows as long as memory allows."""
    config = config_of(*setup.overrides)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        while config.train.seq_len > 256 and sum(planned_bytes(config).values()) > USABLE_MEMORY * free:
            shorter = dataclasses.replace(config.train, seq_len=config.train.seq_len // 2)
            config = dataclasses.replace(config, train=shorter)
    return config


def planned_bytes(config: Config) -> dict[str, int]:
    """The planner's memory of the slice: weights with their FP8 copies, fp32 gradients, a microbatch in bf16, and chunks of fp32
    logits. Master weights and moments, 12 bytes per parameter more, are not allocated."""
    in_bf16 = dataclasses.replace(config, precision=PrecisionConfig(name="bf16"))
    cost, cost_in_bf16 = (total_cost(unit_costs(c, PROFILES["h100"])) for c in (config, in_bf16))
    memory = rank_memory(config, 0, cost, cost_in_bf16.activation_bytes)
    return {
        "weights": memory.weight_bytes,
        "gradients": memory.gradient_bytes,
        "activations": memory.activation_bytes,
        "logits": 3 * 4 * config.vocab_size * min(config.train.loss_chunk, config.train.seq_len),
    }


def layer_table(result: dict[str, Any]) -> list[str]:
    reference = result["reference_flops_per_s"]
    lines = [
        f"reference: bf16, {result['reference_size']}^3: {reference / 1e12:.3g} TFLOP/s. Shares of it:",
        f"{'':<8}{'forward':>9}{'input':>9}{'weight':>9}{'all':>9}{'all, without':>14}{'times':>7}{'error':>9}",
        f"{'':<8}{'':>9}{'grad':>9}{'grad':>9}{'three':>9}{'quantisation':>14}{'bf16':>7}{'forward':>9}",
    ]
    for layer in result["layers"]:
        shape, formats = layer["shape"], layer["formats"]
        experts = f"{shape['num_experts']} x " if shape["num_experts"] else ""
        size = f"{experts}{shape['in_features']} -> {shape['out_features']}"
        lines.append(f"{', '.join(shape['names'])}: {size}, {layer['rows']:,} rows")
        for name, found in formats.items():
            shares = {p: speed / reference for p, speed in found["flops_per_s"]["with_quantization"].items()}
            without = found["flops_per_s"]["without_quantization"]["all"] / reference
            times = shares["all"] * reference / formats["bf16"]["flops_per_s"]["with_quantization"]["all"]
            lines.append(
                f"  {name:<6}"
                + "".join(f"{shares[p]:9.1%}" for p in (*PRODUCTS, "all"))
                + f"{without:14.1%}{times:7.2f}{found['errors']['forward']:9.1e}"
            )
    return lines


def slice_table(found: dict[str, Any]) -> list[str]:
    planned = {name: f"{size / 1e9:.1f} GB" for name, size in found["planned_bytes"].items()}
    lines = [
        f"slice of the model, {found['experts']} experts, {found['micro_batches']} microbatches of {found['seq_len']} tokens",
        f"planned memory: {', '.join(f'{name} {size}' for name, size in planned.items())}; no optimizer state",
    ]
    for name in ("model", "layers"):
        speeds_of = found[name]
        lines.append(
            f"  {name:<7} bf16 {speeds_of['bf16_tokens_per_s']:10,.0f} tokens/s, fp8 {speeds_of['fp8_tokens_per_s']:10,.0f}, "
            f"ratio {speeds_of['ratio']:.2f}{f' (target {TARGET})' if name == 'model' else ''}"
        )
    shares = ", ".join(f"{precision} {share:.1%}" for precision, share in found["model_flops_share"].items())
    lines.append(f"  model FLOPs as a share of the reference: {shares}")
    for precision, memory in found["microbatch_bytes"].items():
        lines.append(
            f"  one microbatch in {precision}: {memory['kept'] / 1e9:.2f} GB kept, {memory['peak'] / 1e9:.2f} GB at most"
        )
    return lines


def driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_name(device: str) -> str:
    """``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
