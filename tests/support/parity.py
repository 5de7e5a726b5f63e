"""Train the same few steps in many layouts and compare what they dumped."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_mtp.config import Config, from_mapping, resolve
from dist_mtp.config_checks import LAST_SCHEDULES, V_SCHEDULES

STEPS = 3
ROWS = 8
"""Microbatches of one row in a global batch, over all data replicas."""
SEQ_LEN = 24
ADAM_EPS = 1e-5
"""Far below the gradients (about 2e-3 an element) and far above their rounding: with 1e-8 Adam makes whole updates of elements
whose gradient is rounding only, and by the third step layouts differ by up to 3e-5, whatever is right or wrong."""
LOSS_BOUND, NORM_BOUND, GRADIENT_BOUND = 1e-6, 1e-6, 5e-6
"""Relative differences that fp32 rounding may cause between layouts."""


@dataclass(frozen=True)
class Layout:
    placement: str
    schedule: str
    pp: int
    dp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        return f"{self.placement}-{self.schedule}-pp{self.pp}-dp{self.dp}-ep{self.ep}"


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


def enough_rows(variant: Variant, world_size: int) -> Variant:
    """With microbatches for ``dualpipev`` on the most replicas or pipeline ranks that eight ranks can make."""
    return variant if world_size < 8 else dataclasses.replace(variant, micro_batches=2 * ROWS)


def matrix_variants(world_size: int) -> tuple[Variant, ...]:
    """Every depth, tied and untied."""
    return tuple(enough_rows(variant, world_size) for variant in ALL_VARIANTS)


def run_dir(folder: Path, layout: Layout, variant: Variant) -> Path:
    return folder / "runs" / f"{variant}" / f"{layout}"


def layouts(world_size: int) -> list[Layout]:
    """Every placement and schedule on ``world_size`` ranks, with one and with two data replicas of 2 or 4 stages' ranks."""
    return [
        Layout(placement, schedule, world_size // dp, dp)
        for dp in (1, 2)
        if world_size // dp in (2, 4)
        for placement, schedules in (("v", V_SCHEDULES), ("last", LAST_SCHEDULES))
        for schedule in schedules
    ]


def expert_layouts(world_size: int) -> list[Layout]:
    """Layouts whose data replicas share experts: every degree above 1, with 2 and with 4 replicas."""
    return [
        Layout(placement, schedule, world_size // dp, dp, ep)
        for dp in (2, 4)
        if world_size // dp in (1, 2)
        for ep in (2, 4)
        if dp % ep == 0
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
        "moe": {},
        "mtp": {"depth": variant.depth},
        "parallel": {"pp": layout.pp, "dp": layout.dp, "ep": layout.ep},
        "pipeline": {"placement": layout.placement, "schedule": layout.schedule},
        "train": {
            "steps": STEPS,
            "seq_len": SEQ_LEN,
            "micro_batch_size": 1,
            "micro_batches": variant.micro_batches // layout.dp,
            "loss_chunk": 16,
        },
        "optim": {"lr": 2e-3, "warmup_steps": 2, "clip_norm": 0.5, "eps": ADAM_EPS},
        "data": {
            "name": "short",
            "source": "text",
            "path": str(folder.parent / "text"),
            "cache_dir": str(folder.parent / "cache"),
        },
        "eval": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "precision": {},
        "debug": {"dump_steps": list(range(1, STEPS + 1))},
        "run": {"dir": str(run_dir(folder, layout, variant))},
    }
    for key, value in variant.extra:
        section, _, name = key.partition(".")
        values[section][name] = value
    return resolve(from_mapping(values), vocab_size=257)


_trainers: list[Any] = []


def make_trainer(config: Config) -> Any:
    """A trainer of this rank; the process group is set up on first use."""
    from dist_mtp.data.corpus import prepare
    from dist_mtp.monitor.monitor import Monitor
    from dist_mtp.parallel.mesh import init_process_group, make_mesh
    from dist_mtp.pipeline.plan import make_plan
    from dist_mtp.trainer import Trainer

    device = init_process_group(timeout_s=120)
    end_trainers()
    corpus = prepare(config.data, config.tokenizer)
    trainer = Trainer(config, make_mesh(config, device), make_plan(config), corpus, Monitor())
    _trainers.append(trainer)
    return trainer


def end_trainers() -> None:
    """End the trainers before this one, with their process groups: each of gloo's has threads that wake up a hundred times a
    second, and after a hundred trainers nothing else would run."""
    from deepspeed.utils import groups

    while _trainers:
        _trainers.pop().engine.engine.destroy()  # its hooks would keep it, and its groups, alive
    kept = (dist.group.WORLD, groups._WORLD_GROUP)
    for group in [g for g in dist.distributed_c10d._world.pg_map if g not in kept]:
        dist.destroy_process_group(group)
    gc.collect()


def run_steps(
    config: Config, *, evaluate_between: bool = False, on_start: Callable[[Any], None] = lambda trainer: None
) -> Any:
    """Train ``STEPS`` steps; rank 0 writes dumps and ``rows.json`` (metrics of each step) into the run folder.

    Args:
        evaluate_between: evaluate before every step; must change nothing.
        on_start: given the trainer before the first step.
    """
    torch.manual_seed(int(os.environ["RANK"]))  # nothing may depend on the global generator
    trainer = make_trainer(config)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    on_start(trainer)
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
    """Worst relative differences between two runs: of losses, of the clip norm, of any gradient tensor (2-norm).
    Infinite where any value of either run is not finite."""

    loss: float
    grad_norm: float
    gradient: float
    tensor: str
    """Name of the gradient that differs most."""

    def within_bounds(self) -> bool:
        return self.loss <= LOSS_BOUND and self.grad_norm <= NORM_BOUND and self.gradient <= GRADIENT_BOUND


def compare(run: Path, reference: Path, steps: Iterable[int] = range(1, STEPS + 1)) -> Difference:
    """Compare dumps and metrics of two run folders.

    Raises:
        AssertionError: the runs have other rows, losses or tensors, trained on other batches or router biases, or sent
            another number of tokens to some expert.
    """
    loss, norm, gradient, tensor = 0.0, 0.0, 0.0, ""
    ours, theirs = (json.loads((folder / "rows.json").read_text()) for folder in (run, reference))
    assert len(ours) == len(theirs), f"{len(ours)} and {len(theirs)} steps"
    for step in steps:
        row, other = ours[step - 1], theirs[step - 1]
        losses = {key for key in other if key.startswith("loss")}
        assert losses == {key for key in row if key.startswith("loss")}, f"{sorted(row)} and {sorted(other)}"
        for key in other:
            if key.startswith(("load_", "router_bias")):
                assert math.isclose(row[key], other[key], rel_tol=1e-9), (
                    f"step {step} {key}: {row[key]} and {other[key]}"
                )
        loss = max(loss, *(_relative_number(row[key], other[key]) for key in losses))
        norm = max(norm, _relative_number(row["grad_norm"], other["grad_norm"]))
        tensors, others = (load_file(p / "dumps" / f"step_{step}.safetensors") for p in (run, reference))
        assert tensors.keys() == others.keys(), f"tensors of only one run: {sorted(tensors.keys() ^ others.keys())}"
        for name in others:
            if name.startswith(("batch/", "bias/")):
                assert torch.equal(tensors[name], others[name]), f"{name}: {tensors[name]} and {others[name]}"
            if name.startswith("grad/"):
                distance = relative(tensors[name], others[name])
                if distance > gradient:
                    gradient, tensor = distance, f"step {step} {name}"
    return Difference(loss, norm, gradient, tensor)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` in the 2-norm, computed in fp64; ``|a|`` when b is zero; infinite unless all of a and b is finite."""
    difference, size = (a.double() - b.double()).norm(), b.double().norm()
    distance = float(difference / size) if size > 0 else float(difference)
    return distance if math.isfinite(distance) else math.inf  # max(0, nan) is 0: a nan must not get out of here


def _relative_number(a: float, b: float) -> float:
    return relative(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
