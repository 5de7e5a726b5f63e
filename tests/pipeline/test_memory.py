"""Memory of a rank against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest
from pipeline.pipeline_cases import tiny_config

from dist_mtp.config import Config, ParallelConfig, PrecisionConfig
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.memory import RankMemory, rank_memory
from dist_mtp.pipeline.plan import make_plan

COST = UnitCost(params=1000, expert_params=600)


def config_of(precision: str, dp: int, ep: int) -> Config:
    return dataclasses.replace(
        tiny_config(2),
        parallel=ParallelConfig(pp=2, dp=dp, ep=ep),
        precision=PrecisionConfig(name=precision),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("precision", "dp", "ep", "weights", "optimizer"),
    [
        ("fp32", 1, 1, 4, 12 * (400 + 600)),
        ("fp32", 4, 1, 4, 12 * (100 + 150)),
        ("bf16", 4, 1, 2, 12 * (100 + 150)),
        ("bf16", 4, 2, 2, 12 * (100 + 300)),
        ("bf16", 4, 4, 2, 12 * (100 + 600)),
        # 400 / 3 and 600 / 3: the rank with the largest share counts.
        ("bf16", 3, 1, 2, 12 * (134 + 200)),
    ],
)
def test_of_400_dense_and_600_expert_parameters(precision: str, dp: int, ep: int, weights: int, optimizer: int) -> None:
    """Weights and fp32 gradients are whole; optimizer state is shared by dp ranks, that of experts by dp / ep."""
    found = rank_memory(config_of(precision, dp, ep), 1, COST, activation_bytes=7)
    expected = RankMemory(
        rank=1,
        dense_params=400,
        expert_params=600,
        weight_bytes=1000 * weights,
        gradient_bytes=4000,
        optimizer_bytes=optimizer,
        activation_bytes=7,
    )
    assert found == expected, f"{found} != {expected}"
    assert found.total_bytes == 1000 * weights + 4000 + optimizer + 7


def test_activations_are_those_of_the_predicted_step() -> None:
    plan = make_plan(tiny_config(4))
    peaks = tuple(rank.activation_bytes for rank in plan.ranks)
    assert peaks == plan.timeline.peak_activation_bytes, f"{peaks} != {plan.timeline.peak_activation_bytes}"


def test_stages_of_a_rank_add_up() -> None:
    """Two stages on each rank of a V; the table's line is their sum."""
    plan = make_plan(tiny_config(2))
    for rank in plan.ranks:
        total = sum(stage.cost.params for stage in plan.stages_of(rank.rank))
        assert rank.dense_params + rank.expert_params == total, f"rank {rank.rank}: {rank} has not {total}"
