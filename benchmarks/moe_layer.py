"""One MoE layer: grouped GEMMs against a loop over experts, growth of its cost, and where its time goes.

    OMP_NUM_THREADS=1 python benchmarks/moe_layer.py     # about a minute on an idle core
    python benchmarks/moe_layer.py --device cuda         # bf16 and larger sizes

Three tables, all of forward plus backward:

1. The layer's experts (``dist_mtp.model.moe.Experts``) against a list of SwiGLU modules that are called one after another on
   slices of the rows, with the same weights and uneven loads. Results and gradients are compared before anything is timed.
   With 8 experts of 256 rows each, products are nine tenths of both on CPU: expect no more than a tie at the larger widths.
   On CPU this is done twice. Weight gradients of 256 experts are one allocation of 67 MB and one of 33 MB; glibc returns
   them to Linux when they are freed, and getting them back page by page costs more than computing them. The small gradients
   of single modules are not returned. The second time, and below, glibc keeps what it has (``KEEP_MEMORY``).
2. Time of ``dist_mtp.model.moe.MoE`` by tokens, experts and choices per token, with fits ``a + b * size``.
3. Shares of the router, the sort and gather, the experts, the weighted sum and the shared experts.

Repetitions of all cases are interleaved and medians taken. CPU times are those of this process, so that other programs on the
machine do not count; GPU times are between CUDA events. Everything goes to ``benchmarks/results/moe_layer.json``. Exit code 1
when the two implementations differ.
"""

# ruff: noqa: E402 - imports below need the path of the package
from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.config import Config, ModelConfig
from dist_mtp.model.dispatch import LocalDispatcher
from dist_mtp.model.moe import Experts, MoE

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # read by glibc when a process starts


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device. Growth varies one of ``tokens``, ``experts``, ``top_k`` and keeps the others."""

    dtype: torch.dtype
    tolerance: float
    """Largest accepted difference between loop and grouped GEMMs, relative to the largest element."""
    hidden: int
    inner: int
    tokens: int
    experts: int
    top_k: int
    compared_experts: tuple[int, ...]
    compared_widths: tuple[tuple[int, int], ...]
    """Pairs of ``hidden`` and ``inner``."""
    compared_rows: int
    growth: dict[str, tuple[int, ...]]
    repetitions: int


CPU = Sizes(
    dtype=torch.float32,
    tolerance=1e-5,
    hidden=256,
    inner=128,
    tokens=1024,
    experts=64,
    top_k=4,
    compared_experts=(8, 64, 256),
    compared_widths=((128, 96), (256, 128)),
    compared_rows=2048,
    growth={
        "tokens": (256, 512, 1024, 1536, 2048, 3072, 4096),
        "experts": (16, 32, 64, 96, 128, 192, 256),
        "top_k": (1, 2, 3, 4, 5, 6, 7, 8),
    },
    repetitions=25,
)
CUDA = replace(
    CPU,
    dtype=torch.bfloat16,
    tolerance=2e-2,
    hidden=2048,
    inner=512,
    tokens=8192,
    compared_widths=((2048, 512), (2048, 1408)),
    compared_rows=32768,
    growth=CPU.growth | {"tokens": (2048, 4096, 8192, 12288, 16384, 24576, 32768)},
    repetitions=50,
)
GROWS = {
    "tokens": "rows of every product, the gathers and the shared experts; the constant is mostly the experts' weight gradients",
    "experts": "weight gradients [E, 2I, D] and [E, D, I], which are written however few rows an expert has, and router scores",
    "top_k": "rows of the routed products and the gathers; the constant is router, shared experts and weight gradients",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "moe_layer.json")
    arguments = parser.parse_args()

    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = torch.device(arguments.device)
    sizes = CUDA if device.type == "cuda" else CPU
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "device": device_name(device),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "sizes": {name: getattr(sizes, name) for name in ("hidden", "inner", "tokens", "experts", "top_k")},
    }
    print(f"{result['device']}, torch {torch.__version__}, {result['dtype']}, D={sizes.hidden}, I={sizes.inner}\n")
    result["comparison"] = [
        {"memory_kept": kept} | row
        for kept in ((False, True) if device.type == "cpu" else (True,))
        for row in in_fresh_process(kept, compare_all, sizes, device)
    ]
    equal = all(row["difference"] <= sizes.tolerance for row in result["comparison"])
    print("\n".join(comparison_table(result["comparison"], sizes)), flush=True)
    result["growth"] = in_fresh_process(True, measure_growth, sizes, device)
    print("\n".join(["", *growth_table(result["growth"], sizes)]), flush=True)
    result["shares"] = in_fresh_process(True, measure_shares, sizes, device)
    print("\n".join(["", *shares_table(result["shares"], sizes)]))
    result |= {"within_tolerance": equal, "seconds": round(time.monotonic() - started)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    return 0 if equal else 1


def in_fresh_process(keep_memory: bool, function: Callable[[Sizes, torch.device], Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process whose allocator keeps freed memory, or has its defaults."""
    if keep_memory:
        os.environ.update(KEEP_MEMORY)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class SwiGLU(nn.Module):
    """One expert as an ordinary module, with its own copy of the weights."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(half.detach().clone()) for half in gate_up.chunk(2))
        self.down = nn.Parameter(down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def compare_all(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Loop and grouped GEMMs at a fixed number of rows, for each width and number of experts."""
    return [
        compare(replace(sizes, hidden=hidden, inner=inner), device, experts)
        for hidden, inner in sizes.compared_widths
        for experts in sizes.compared_experts
    ]


def compare(sizes: Sizes, device: torch.device, num_experts: int) -> dict[str, Any]:
    torch.manual_seed(1)
    grouped = Experts(layer_config(sizes, experts=num_experts))
    initialise(grouped, sizes, device)
    loop = nn.ModuleList(SwiGLU(*weights) for weights in zip(grouped.gate_up_proj, grouped.down_proj, strict=True))
    popularity = torch.randn(num_experts).softmax(0)
    chosen = torch.multinomial(popularity, sizes.compared_rows, replacement=True)
    counts = torch.bincount(chosen, minlength=num_experts)
    ends, host_counts = counts.cumsum(0).to(device, torch.int32), counts.tolist()
    x, grad_y = (random_rows(sizes.compared_rows, sizes, device) for _ in range(2))
    x.requires_grad_()

    def call_experts_in_turn() -> Tensor:
        slices = zip(loop, x.split(host_counts), strict=True)
        return torch.cat([expert(rows) for expert, rows in slices if rows.shape[0]])

    cases = {
        "loop": Case(call_experts_in_turn, grad_y, [x, *loop.parameters()]),
        "grouped": Case(lambda: grouped(x, ends), grad_y, [x, *grouped.parameters()]),
    }
    difference = largest_difference(cases["loop"], cases["grouped"], loop, grouped, x)
    seconds = medians(cases, sizes.repetitions, device)
    return {
        "hidden": sizes.hidden,
        "inner": sizes.inner,
        "experts": num_experts,
        "rows": sizes.compared_rows,
        "largest_load": max(host_counts),
        "experts_without_rows": host_counts.count(0),
        "loop_ms": 1e3 * seconds["loop"],
        "grouped_ms": 1e3 * seconds["grouped"],
        "ratio": seconds["loop"] / seconds["grouped"],
        "difference": difference,
    }


def largest_difference(loop_case: Case, case: Case, loop: nn.ModuleList, grouped: Experts, x: Tensor) -> float:
    """Over output and gradients: the largest difference relative to the largest element."""
    case()
    found = [case.y, x.grad, grouped.gate_up_proj.grad, grouped.down_proj.grad]
    loop_case()
    gate, up, down = (
        torch.stack([zeros_if_none(getattr(expert, name)) for expert in loop]) for name in ("gate", "up", "down")
    )
    expected = [loop_case.y, x.grad, torch.cat([gate, up], dim=1), down]
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))


def zeros_if_none(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def measure_growth(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a layer by size, and the fits, for each thing that grows."""
    found = {}
    for varied, values in sizes.growth.items():
        cases = {value: layer_case(replace(sizes, **{varied: value}), device) for value in values}
        seconds = medians(cases, sizes.repetitions, device)
        found[varied] = fit(values, [1e3 * seconds[value] for value in values])
    return found


def fit(values: tuple[int, ...], milliseconds: list[float]) -> dict[str, Any]:
    """Least squares of ``milliseconds = a + b * value``, and the slope of the logarithms."""
    x, y = np.array(values, dtype=float), np.array(milliseconds)
    b, a = np.polyfit(x, y, 1)
    residual = float(((y - a - b * x) ** 2).sum())
    return {
        "values": list(values),
        "milliseconds": milliseconds,
        "constant_ms": float(a),
        "ms_per_unit": float(b),
        "r_squared": 1 - residual / float(((y - y.mean()) ** 2).sum()),
        "log_log_slope": float(np.polyfit(np.log(x), np.log(y), 1)[0]),
    }


def measure_shares(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part of the layer by itself, each with inputs of its own, and of the layer as a whole."""
    layer = make_layer(sizes, device)
    x = random_rows(sizes.tokens, sizes, device).requires_grad_()
    grad_y = random_rows(sizes.tokens, sizes, device)
    routing = layer.gate(x[None])
    routing = replace(routing, weights_TK=routing.weights_TK.detach().requires_grad_())
    grad_weights = torch.randn_like(routing.weights_TK)
    rows, ends = (tensor.detach() for tensor in LocalDispatcher().dispatch(x, routing).receive())
    grad_rows = torch.randn_like(rows)
    rows.requires_grad_()
    sorted_tokens = LocalDispatcher().dispatch(x, routing)

    cases = {
        "router": Case(lambda: layer.gate(x[None]).weights_TK, grad_weights, [x, *layer.gate.parameters()]),
        "sort and gather": Case(lambda: LocalDispatcher().dispatch(x, routing).receive()[0], grad_rows, [x]),
        "routed experts": Case(lambda: layer.experts(rows, ends), grad_rows, [rows, *layer.experts.parameters()]),
        "weighted sum": Case(lambda: sorted_tokens.combine(rows), grad_y, [rows, routing.weights_TK]),
        "shared experts": Case(lambda: layer.shared_experts(x), grad_y, [x, *layer.shared_experts.parameters()]),
        "whole layer": Case(lambda: layer(x[None])[0], grad_y, [x, *layer.parameters()]),
    }
    return {name: 1e3 * seconds for name, seconds in medians(cases, sizes.repetitions, device).items()}


class Case:
    """Forward and backward of something, from gradients that do not exist yet."""

    def __init__(self, forward: Callable[[], Tensor], grad_y: Tensor, leaves: list[Tensor]) -> None:
        self.forward, self.grad_y, self.leaves = forward, grad_y, leaves
        self.y: Tensor | None = None

    def reset(self) -> None:
        """Not timed: frees what the last call left."""
        self.y = None
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        self.reset()
        self.run()

    def run(self) -> None:
        self.y = self.forward()
        self.y.backward(self.grad_y)


def medians(cases: dict[Any, Case], repetitions: int, device: torch.device) -> dict[Any, float]:
    """Seconds of each case; every repetition runs all of them, so that a slow spell of the machine hits all alike."""
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
    for repetition in range(repetitions + 2):
        for name, case in cases.items():
            case.reset()
            elapsed = timed(case.run, device)
            case.reset()
            if repetition >= 2:  # the first two warm up
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def layer_case(sizes: Sizes, device: torch.device) -> Case:
    layer = make_layer(sizes, device)
    x = random_rows(sizes.tokens, sizes, device)[None].requires_grad_()
    return Case(lambda: layer(x), torch.randn_like(x), [x, *layer.parameters()])


def make_layer(sizes: Sizes, device: torch.device) -> MoE:
    torch.manual_seed(2)
    layer = MoE(layer_config(sizes, sizes.experts))
    initialise(layer, sizes, device)
    return layer


def layer_config(sizes: Sizes, experts: int) -> Config:
    return Config(
        model=ModelConfig(
            hidden_size=sizes.hidden,
            moe_intermediate_size=sizes.inner,
            n_routed_experts=experts,
            num_experts_per_tok=sizes.top_k,
            n_group=1,
            topk_group=1,
        )
    )


def initialise(module: nn.Module, sizes: Sizes, device: torch.device) -> None:
    """Random weights in the training precision; buffers keep theirs."""
    module.to(device)
    for parameter in module.parameters():
        parameter.data = (torch.randn_like(parameter) * parameter.shape[-1] ** -0.5).to(sizes.dtype)


def random_rows(rows: int, sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randn(rows, sizes.hidden, device=device, dtype=sizes.dtype)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def comparison_table(rows: list[dict[str, Any]], sizes: Sizes) -> list[str]:
    lines = [
        f"loop over experts against grouped GEMMs, {sizes.compared_rows} rows, forward + backward",
        f"{'memory':<8}  {'D':>4}  {'I':>4}  experts  largest load   loop ms  grouped ms  ratio  difference",
    ]
    for row in rows:
        memory = "kept" if row["memory_kept"] else "returned"
        lines.append(
            f"{memory:<8}  {row['hidden']:>4}  {row['inner']:>4}  {row['experts']:>7}  {row['largest_load']:>12}  {row['loop_ms']:8.2f}  {row['grouped_ms']:10.2f}  "
            f"{row['ratio']:5.2f}  {row['difference']:10.1e}"
        )
    return lines


def growth_table(growth: dict[str, Any], sizes: Sizes) -> list[str]:
    lines = [f"one MoE layer, T={sizes.tokens}, E={sizes.experts}, K={sizes.top_k} unless varied, forward + backward"]
    for varied, found in growth.items():
        points = ", ".join(f"{v}: {ms:.1f}" for v, ms in zip(found["values"], found["milliseconds"], strict=True))
        lines += [
            f"{varied} {found['values'][0]} to {found['values'][-1]}: "
            f"{found['constant_ms']:.2f} ms + {found['ms_per_unit']:.4g} ms each, R^2 {found['r_squared']:.4f}, "
            f"log-log slope {found['log_log_slope']:.2f}",
            f"  ms by size  {points}",
            f"  what grows  {GROWS[varied]}",
        ]
    return lines


def shares_table(shares: dict[str, float], sizes: Sizes) -> list[str]:
    whole = shares["whole layer"]
    lines = [
        f"parts of the layer by themselves, T={sizes.tokens}, E={sizes.experts}, K={sizes.top_k}, forward + backward"
    ]
    lines += [f"  {name:<16}  {ms:7.2f} ms  {ms / whole:6.1%}" for name, ms in shares.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
