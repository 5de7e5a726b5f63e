"""Train the same few steps in many layouts and compare what they dumped."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_mtp.config import LAST_SCHEDULES, V_SCHEDULES, Config, from_mapping, resolve

STEPS = 3
ROWS = 8
"""Microbatches of one row in a global batch, over all data replicas."""
LOSS_BOUND, NORM_BOUND, GRADIENT_BOUND = 1e-6, 1e-6, 5e-6
"""Relative differences that fp32 rounding may cause between layouts."""


@dataclass(frozen=True)
class Layout:
    placement: str
    schedule: str
    pp: int
    dp: int = 1

    def __str__(self) -> str:
        return f"{self.placement}-{self.schedule}-pp{self.pp}-dp{self.dp}"


@dataclass(frozen=True)
class Variant:
    """What is computed, whatever the layout. ``extra``: further ``section.key`` values."""

    depth: int
    tied: bool = False
    micro_batches: int = ROWS
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [f"depth{self.depth}", "tied" if self.tied else "untied", f"m{self.micro_batches}"]
        return "-".join([*parts, *(f"{key}={value}" for key, value in self.extra)])


REFERENCE = Layout("v", "gpipe", pp=1)
ALL_VARIANTS = tuple(Variant(depth, tied) for depth, tied in itertools.product(range(4), (False, True)))


def run_dir(folder: Path, layout: Layout, variant: Variant) -> Path:
    return folder / "runs" / f"{variant}" / f"{layout}"


def layouts(world_size: int) -> list[Layout]:
    """Every placement and schedule on ``world_size`` ranks, with one and with two data replicas."""
    return [
        Layout(placement, schedule, world_size // dp, dp)
        for dp in (1, 2)
        if world_size // dp >= 2
        for placement, schedules in (("v", V_SCHEDULES), ("last", LAST_SCHEDULES))
        for schedule in schedules
    ]


def write_corpus(folder: Path) -> None:
    """Short documents, so that boundaries fall inside rows, and a run of one-letter documents: rows of those have main
    targets but none for any MTP depth."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wise",
        "owls",
        "watch",
        "from",
        "old",
        "oak",
        "trees",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(40):
        text = " ".join(words[(index * 7 + i * i) % len(words)] for i in range(3 + index % 23))
        (folder / f"long_{index:02d}.txt").write_text(text)
    for index in range(80):
        (folder / f"tiny_{index:02d}.txt").write_text("abcdefghij"[index % 10])


def make_config(folder: Path, layout: Layout, variant: Variant) -> Config:
    """A model of 5 layers, which no number of stages here divides evenly, on the corpus beside ``folder``."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 5,
            "num_attention_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "initializer_range": 0.1,
            "tie_word_embeddings": variant.tied,
        },
        "mtp": {"depth": variant.depth},
        "parallel": {"pp": layout.pp, "dp": layout.dp},
        "pipeline": {"placement": layout.placement, "schedule": layout.schedule},
        "train": {
            "steps": STEPS,
            "seq_len": 24,
            "micro_batch_size": 1,
            "micro_batches": variant.micro_batches // layout.dp,
            "loss_chunk": 16,
        },
        "optim": {"lr": 2e-3, "warmup_steps": 2, "clip_norm": 0.5},
        "data": {
            "name": "short",
            "source": "text",
            "path": str(folder.parent / "text"),
            "cache_dir": str(folder.parent / "cache"),
        },
        "eval": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "debug": {"dump_steps": list(range(1, STEPS + 1))},
        "run": {"dir": str(run_dir(folder, layout, variant))},
    }
    for key, value in variant.extra:
        section, _, name = key.partition(".")
        values[section][name] = value
    return resolve(from_mapping(values), vocab_size=257)


def make_trainer(config: Config) -> Any:
    """A trainer of this rank; the process group is set up on first use."""
    from dist_mtp.data.corpus import prepare
    from dist_mtp.monitor.monitor import Monitor
    from dist_mtp.parallel.mesh import init_process_group, make_mesh
    from dist_mtp.pipeline.plan import make_plan
    from dist_mtp.trainer import Trainer

    device = init_process_group(timeout_s=120)
    corpus = prepare(config.data, config.tokenizer)
    return Trainer(config, make_mesh(config, device), make_plan(config), corpus, Monitor())


def run_steps(config: Config, *, evaluate_between: bool = False) -> Any:
    """Train ``STEPS`` steps; rank 0 writes dumps and ``rows.json`` (metrics of each step) into the run folder.

    Args:
        evaluate_between: evaluate before every step; must change nothing.
    """
    torch.manual_seed(int(os.environ["RANK"]))  # nothing may depend on the global generator
    trainer = make_trainer(config)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    rows = []
    for trainer.step in range(1, STEPS + 1):
        evaluated = trainer.evaluate() if evaluate_between else {}
        rows.append(trainer.train_step() | evaluated)
    if trainer.mesh.rank == 0:
        (Path(config.run_dir) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    return trainer


@dataclass(frozen=True)
class Difference:
    """Worst relative differences between two runs: of losses, of the clip norm, of any gradient tensor (2-norm)."""

    loss: float
    grad_norm: float
    gradient: float
    tensor: str
    """Name of the gradient that differs most."""

    def within_bounds(self) -> bool:
        return self.loss <= LOSS_BOUND and self.grad_norm <= NORM_BOUND and self.gradient <= GRADIENT_BOUND


def compare(run: Path, reference: Path) -> Difference:
    """Compare dumps and metrics of two run folders."""
    loss, norm, gradient, tensor = 0.0, 0.0, 0.0, ""
    for row, other in zip(*(json.loads((p / "rows.json").read_text()) for p in (run, reference)), strict=True):
        for key in (k for k in other if k.startswith("loss")):
            loss = max(loss, abs(row[key] - other[key]) / abs(other[key]))
        norm = max(norm, abs(row["grad_norm"] - other["grad_norm"]) / other["grad_norm"])
    for step in range(1, STEPS + 1):
        ours, theirs = (load_file(p / "dumps" / f"step_{step}.safetensors") for p in (run, reference))
        assert ours.keys() == theirs.keys(), f"tensors of only one run: {sorted(ours.keys() ^ theirs.keys())}"
        for name in theirs:
            if name.startswith(("batch/", "bias/")):
                assert torch.equal(ours[name], theirs[name]), f"{name} differs: {ours[name]} and {theirs[name]}"
            if name.startswith("grad/"):
                distance = relative(ours[name], theirs[name])
                if distance > gradient:
                    gradient, tensor = distance, f"step {step} {name}"
    return Difference(loss, norm, gradient, tensor)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` in the 2-norm, computed in fp64; 0 when both are zero."""
    size = b.double().norm()
    difference = (a.double() - b.double()).norm()
    return float(difference / size) if size > 0 else float(difference)
