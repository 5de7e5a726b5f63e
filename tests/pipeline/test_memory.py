"""Memory of a rank against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest
from pipeline.pipeline_cases import tiny_config

from dist_mtp.config import Config, OptimConfig, ParallelConfig, PrecisionConfig
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_moments(precision: str) -> None:
    """A master weight of 4 bytes and two moments of 2."""
    config = dataclasses.replace(config_of(precision, 4, 2), optim=OptimConfig(moment_dtype="bf16"))
    found = rank_memory(config, 1, COST, activation_bytes=7).optimizer_bytes
    assert found == 8 * (100 + 300), found


def test_fp8_copies_of_weights() -> None:
    """bf16 and two copies in FP8, the transposed one for the backward, of the 900 parameters of linear layers and experts."""
    cost = dataclasses.replace(COST, fp8_params=900)
    found = {name: rank_memory(config_of(name, 4, 2), 1, cost, 7).weight_bytes for name in ("fp32", "bf16", "fp8")}
    assert found == {"fp32": 4000, "bf16": 2000, "fp8": 2000 + 2 * 900}, found


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
