"""What the ranks of the layout tests do, one function per number of ranks; see ``tests/parallel/test_layouts.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from support.parity import (
    ALL_VARIANTS,
    REFERENCE,
    ROWS,
    SEQ_LEN,
    Layout,
    Variant,
    enough_rows,
    expert_layouts,
    layouts,
    make_config,
    matrix_variants,
    run_steps,
)

from dist_mtp.model.init import initialize
from dist_mtp.model.transformer import LanguageModel

FOUR_RANK_VARIANTS = (Variant(1), Variant(2, tied=True), Variant(3))
EVALUATED = Variant(2)
"""Evaluated before each step."""
EVALUATED_LAYOUTS = (*layouts(2), Layout("v", "zbv", 1, 2, 2))
ODD_MICROBATCHES = {
    Layout("v", "zbv", 2): (1, 2, 5),
    Layout("v", "gpipe", 2): (1, 5),
    Layout("last", "1f1b", 2): (1, 5),
    Layout("last", "gpipe", 2): (1, 3),
    Layout("last", "interleaved_1f1b", 2): (1, 6),
}
"""Numbers of microbatches below, and no multiple of, the number of ranks."""
SPECIAL_VARIANTS = (
    Variant(3, extra=(("mtp.share_depths", True),)),
    Variant(2, extra=(("mtp.hidden", "pre_norm"),)),
    Variant(2, extra=(("mtp.normalize", "paper"),)),
    Variant(1, extra=(("mtp.block", "dense"),)),
    Variant(1, extra=(("model.n_routed_experts", 0),)),
    Variant(1, extra=(("pipeline.layout", "uniform"),)),
)
RECOMPUTED = tuple(Variant(2, extra=(("pipeline.recompute", kind),)) for kind in ("norms+mla_up+swiglu", "full"))
RECOMPUTED_LAYOUTS = (Layout("v", "zbv", 2), Layout("v", "zbv", 1, 2, 2))
"""In the second one, whole layers with experts send their tokens once more."""
SPECIAL_LAYOUTS = (Layout("v", "zbv", 2), Layout("last", "1f1b", 2))
EMPTY_STAGE = Variant(1, extra=(("pipeline.layout", "4,0,3,5"),))
"""One of four stages only passes hidden states on."""
EMPTY_STAGE_LAYOUTS = (Layout("v", "zbv", 2), Layout("last", "interleaved_1f1b", 2))
BF16 = (("precision.name", "bf16"),)
BF16_VARIANTS = (Variant(2, extra=BF16), Variant(2, tied=True, extra=BF16))
BF16_EXPERT_LAYOUTS = (Layout("v", "zbv", 1, 4, 2), Layout("last", "1f1b", 2, 2, 2))
TINY_STEPS = Variant(2, extra=(*BF16, ("optim.lr", 1e-7)))
"""Every update is far below the spacing of the bf16 weights."""
MASTER_LAYOUTS = (Layout("v", "zbv", 2), Layout("v", "zbv", 1, 2))
"""In the second one, masters are divided between the ranks."""
BALANCED = Variant(
    2,
    extra=(
        ("moe.seq_aux_loss_coeff", 0.02),
        ("moe.global_aux_loss_coeff", 0.05),
        ("moe.z_loss_coeff", 1e-3),
        ("moe.bias_update_speed", 0.01),
        ("moe.bias_update_speed_steps", ((2 * ROWS * SEQ_LEN, 0.0),)),
    ),
)
"""All ways to balance experts at once, and biases that are frozen before the third step."""
EXPERT_VARIANTS = (Variant(2), BALANCED)
DENSE_RANK = Variant(1, extra=(("model.first_k_dense_replace", 4), ("pipeline.layout", "uniform")))
"""Only the last trunk layer and MTP have experts: one of two pipeline ranks has none."""
DENSE_RANK_VARIANTS = (DENSE_RANK, dataclasses.replace(DENSE_RANK, extra=(*DENSE_RANK.extra, *BF16)))
DENSE_RANK_LAYOUTS = (Layout("v", "zbv", 2, 2, 2), Layout("last", "1f1b", 2, 2, 2))
FOUR_RANK_EXPERT_LAYOUTS = [
    layout
    for layout in expert_layouts(4)
    if layout.pp == 2 or (layout.placement, layout.schedule) in (("v", "zbv"), ("last", "1f1b"))
]
TRAFFIC_FUNCTIONS = (
    "send",
    "isend",
    "recv",
    "irecv",
    "broadcast",
    "reduce",
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "gather",
    "scatter",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
)
"""Everything in ``torch.distributed`` that moves tensors."""


@dataclass
class Observed:
    """What a rank was seen to do while :func:`observe` was watching.

    ``traffic``: messages by (function, dtype, shape of the largest tensor), groups of one rank left out, as those send
    nothing. ``embedding_weights``: ``id`` and ``data_ptr`` of the weight of every embedding look-up.
    """

    traffic: Counter[tuple[str, str, tuple[int, ...]]] = field(default_factory=Counter)
    embedding_weights: list[tuple[int, int]] = field(default_factory=list)


def evaluated(layout: Layout) -> Variant:
    """A variant of its own, so that its run folder is, too."""
    return dataclasses.replace(EVALUATED, extra=(("eval.batches", 2), ("run.name", f"evaluated-{layout}")))


def world_of_1(folder: Path) -> None:
    odd = [dataclasses.replace(Variant(1), micro_batches=m) for ms in ODD_MICROBATCHES.values() for m in ms]
    for variant in dict.fromkeys(
        [*ALL_VARIANTS, *odd, *SPECIAL_VARIANTS, *BF16_VARIANTS, *EXPERT_VARIANTS, *DENSE_RANK_VARIANTS]
    ):
        run_steps(make_config(folder, REFERENCE, variant))


def world_of_2(folder: Path) -> None:
    for layout in layouts(2):
        for variant in ALL_VARIANTS:
            _run_observed(folder, layout, variant)
    for layout in EVALUATED_LAYOUTS:
        run_steps(make_config(folder, layout, evaluated(layout)), evaluate_between=True)
    for layout, counts in ODD_MICROBATCHES.items():
        for count in counts:
            run_steps(make_config(folder, layout, dataclasses.replace(Variant(1), micro_batches=count)))
    for layout in SPECIAL_LAYOUTS:
        for variant in SPECIAL_VARIANTS:
            run_steps(make_config(folder, layout, variant))
        for variant in BF16_VARIANTS:
            _run_observed(folder, layout, variant)
    for layout in EMPTY_STAGE_LAYOUTS:
        run_steps(make_config(folder, layout, EMPTY_STAGE))
    for layout in RECOMPUTED_LAYOUTS:
        for variant in RECOMPUTED:
            run_steps(make_config(folder, layout, variant))
    for layout in MASTER_LAYOUTS:
        _run_masters(folder, layout)

    for layout in expert_layouts(2):
        for variant in EXPERT_VARIANTS:
            run_steps(make_config(folder, layout, variant))


def world_of_4(folder: Path) -> None:
    for layout in layouts(4):
        for variant in FOUR_RANK_VARIANTS:
            run_steps(make_config(folder, layout, variant))
    for layout in FOUR_RANK_EXPERT_LAYOUTS:
        for variant in EXPERT_VARIANTS:
            run_steps(make_config(folder, layout, variant))
    for layout in DENSE_RANK_LAYOUTS:
        for variant in DENSE_RANK_VARIANTS:
            trainer = run_steps(make_config(folder, layout, variant))
            held = [name for name, _ in trainer.engine.named_parameters() if ".experts." in name]
            _write_facts(folder, layout, variant, {"experts": held})
    for layout in BF16_EXPERT_LAYOUTS:
        for variant in BF16_VARIANTS:
            run_steps(make_config(folder, layout, variant))


def whole_matrix(folder: Path) -> None:
    """Every variant in every layout of this world; ``benchmarks/parity.py``."""
    size = int(os.environ["WORLD_SIZE"])
    runs = matrix(size) if size > 1 else [(REFERENCE, variant) for world in (2, 8) for _, variant in matrix(world)]
    for layout, variant in dict.fromkeys(runs):
        run_steps(make_config(folder, layout, variant))


def matrix(world_size: int) -> list[tuple[Layout, Variant]]:
    """All depths, tied and untied, in all layouts; where ranks share experts, fewer variants in every layout."""
    shared = [enough_rows(variant, world_size) for variant in (Variant(1), Variant(3, tied=True), BALANCED)]
    return [
        *itertools.product(layouts(world_size), matrix_variants(world_size)),
        *itertools.product(expert_layouts(world_size), shared),
    ]


@contextlib.contextmanager
def observe() -> Iterator[Observed]:
    """Record communication and embedding look-ups underneath the trainer, where its own counters have no say."""
    observed = Observed()

    def watch_traffic(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs.get("group")) > 1:
                largest = max(_tensors([*args, *kwargs.values()]), key=torch.Tensor.numel)
                observed.traffic[name, str(largest.dtype), tuple(largest.shape)] += 1
            return function(*args, **kwargs)

        return watched

    def watch_embedding(weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        observed.embedding_weights.append((id(weight), weight.data_ptr()))
        return embedding(weight, *args, **kwargs)

    embedding = torch.embedding
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "embedding", watch_embedding))
        for name in TRAFFIC_FUNCTIONS:
            stack.enter_context(mock.patch.object(dist, name, watch_traffic(name, getattr(dist, name))))
        yield observed


def _tensors(values: list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(list(value))


def _run_observed(folder: Path, layout: Layout, variant: Variant) -> None:
    """Train and write down what this rank sent, looked up and optimizes."""
    with observe() as observed:
        trainer = run_steps(make_config(folder, layout, variant))
    engine = trainer.engine
    # BF16_Optimizer and the fp32 ZeRO-1 optimizer name their groups of model parameters differently.
    groups = getattr(engine.optimizer, "bf16_groups", None) or engine.optimizer.bit16_groups
    optimized = [id(parameter) for group in groups for parameter in group]
    facts = {
        "traffic": [[*message, count] for message, count in observed.traffic.items()],
        "embedding_weights": observed.embedding_weights,
        "optimized_ids": optimized,
        "ids_by_name": {name: id(parameter) for name, parameter in engine.named_parameters()},
    }
    _write_facts(folder, layout, variant, facts)


def _run_masters(folder: Path, layout: Layout) -> None:
    """Train with steps far below the spacing of bf16, and write down where masters, weights and fp32 copies stand."""
    drawn: dict[str, torch.Tensor] = {}
    before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_start(trainer: Any) -> None:
        before.update(_weights(trainer.engine))
        in_fp32 = LanguageModel(trainer.config, {unit for stage in trainer.stages.values() for unit in stage.units})
        initialize(in_fp32, seed=trainer.config.train.seed, std=trainer.config.model.initializer_range)
        drawn.update((name, parameter.detach().flatten()) for name, parameter in in_fp32.named_parameters())

    trainer = run_steps(make_config(folder, layout, TINY_STEPS), on_start=on_start)
    starts = {fragment.parameter: fragment.start for fragment in trainer.engine.all_fragments()}
    parameters: dict[str, Any] = dict(trainer.engine.named_parameters())
    facts = {}
    for name, (master, weight) in _weights(trainer.engine).items():
        old_master, _ = before[name]
        mine = slice(starts[name], starts[name] + len(master))
        copy = getattr(parameters[name], "fp32_copy", None)
        facts[name] = {
            "dtypes": [str(master.dtype), str(weight.dtype)],
            "not_drawn": int((old_master != drawn[name][mine]).sum()),
            "masters_moved": int((master != old_master).sum()),
            "out_of_step": int((master.to(weight.dtype) != weight).sum()),
            "has_copy": copy is not None,
            "copies_off": 0
            if copy is None
            else int((copy[mine] != master).sum() + (copy.to(weight.dtype) != parameters[name]).sum()),
        }
    _write_facts(folder, layout, TINY_STEPS, facts)


def _weights(engine: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of this rank's (masters, model weights) by parameter name, flat."""
    parameters = dict(engine.named_parameters())
    return {
        fragment.parameter: (
            fragment.tensors["param"].clone(),
            parameters[fragment.parameter]
            .detach()
            .flatten()[fragment.start :][: len(fragment.tensors["param"])]
            .clone(),
        )
        for fragment in engine.all_fragments()
    }


def _write_facts(folder: Path, layout: Layout, variant: Variant, facts: dict[str, Any]) -> None:
    path = folder / "facts" / f"{variant}-{layout}.rank{dist.get_rank()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))
    dist.barrier()
