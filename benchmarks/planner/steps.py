"""Simulated steps of every schedule, at the sizes of DeepSeek-V3, beside those of 1F1B over whole layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peers.cuts import line, whole_layers

from dist_mtp.config import Config
from dist_mtp.config_checks import micro_batch_problem
from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.bounds import Bound, balance_bound, ramp_bound
from dist_mtp.pipeline.choice import SLACKS, stage_costs
from dist_mtp.pipeline.costs import UnitCost, message_bytes
from dist_mtp.pipeline.devices import resolve_profile
from dist_mtp.pipeline.nodes import on_nodes
from dist_mtp.pipeline.partition import Partition, partition_candidates
from dist_mtp.pipeline.placement import stage_ranks
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.planned import Problem, search
from dist_mtp.pipeline.simulate import Timeline, simulate
from dist_mtp.pipeline.table import Table
from dist_mtp.pipeline.unit_times import planned_costs
from planner.configs import v3_config

ACTIVATIONS = 1.1
"""What ``planned`` may hold, relative to the fullest rank of 1F1B over whole layers."""
BASELINE = "1f1b, whole layers"
CAPPED = f"planned, capped at {ACTIVATIONS} x {BASELINE}"
TARGETS = {(8, 32): 0.06, (16, 120): 0.10}
"""Bubbles that ``planned`` must not exceed with one MTP module and all experts on each rank, by ranks and microbatches."""


@dataclass(frozen=True)
class Setting:
    """What is planned: the sizes that the schedules are compared at."""

    num_ranks: int
    micro_batches: int
    depth: int
    """MTP modules."""
    dp: int = 1
    ep: int = 1
    """With more than 1, MoE layers wait for all-to-alls that overlap with nothing."""

    def config(self, schedule: str, placement: str) -> Config:
        return v3_config(
            self.num_ranks,
            self.micro_batches,
            f"mtp.depth={self.depth}",
            f"parallel.ep={self.ep}",
            f"pipeline.schedule={schedule}",
            f"pipeline.placement={placement}",
            dp=self.dp,
        )


@dataclass(frozen=True)
class Row:
    """One schedule's simulated step."""

    name: str
    timeline: Timeline
    bound: Bound
    stages: tuple[int, ...]
    """Units of each; layers where they are whole, embedding and head counted as one each."""
    origin: str

    @property
    def peak_bytes(self) -> int:
        """Activations of the fullest rank."""
        return max(self.timeline.peak_activation_bytes)

    def to_json(self, baseline: Row) -> dict[str, Any]:
        return {
            "name": self.name,
            "bubble": self.timeline.bubble,
            "step_time": self.timeline.step_time,
            "speedup": baseline.timeline.step_time / self.timeline.step_time,
            "peak_activation_bytes": self.peak_bytes,
            "activations_ratio": self.peak_bytes / baseline.peak_bytes,
            "bound": {"balance": self.bound.balance, "ramp": self.bound.ramp},
            "origin": self.origin,
            "stages": list(self.stages),
        }


def compare(setting: Setting) -> list[dict[str, Any]]:
    """Rows of all schedules that take so many microbatches, the baseline first."""
    baseline = whole_layer_1f1b(setting)
    return [row.to_json(baseline) for row in (baseline, *_others(setting, baseline))]


def meets_target(setting: Setting, rows: Sequence[dict[str, Any]]) -> bool | None:
    """Whether a plan keeps both the bubble and the activations of :data:`TARGETS`; None where there is no target."""
    target = TARGETS.get((setting.num_ranks, setting.micro_batches))
    if target is None or setting.depth != 1 or setting.ep != 1:
        return None
    planned = [row for row in rows if row["name"].startswith("planned")]
    return any(row["bubble"] <= target and row["activations_ratio"] <= ACTIVATIONS for row in planned)


def whole_layer_1f1b(setting: Setting) -> Row:
    """1F1B with the head and the MTP modules on the last rank and the best cut into whole layers, found as the planner would."""
    costs = _Costs.of(setting.config("1f1b", "last"))
    layers = whole_layers(costs.units)
    table = schedules.build("1f1b", setting.num_ranks, line(setting.num_ranks), setting.micro_batches)
    rows = [
        _simulated(BASELINE, table, layers, cut, costs, "last", "1f1b")
        for cut in partition_candidates(layers, costs.stage_to_rank, "auto", SLACKS)
    ]
    return min(rows, key=lambda row: row.timeline.step_time)


def _others(setting: Setting, baseline: Row) -> Iterator[Row]:
    for schedule, placement in (
        ("1f1b", "last"),
        ("interleaved_1f1b", "last"),
        ("zbv", "v"),
        ("dualpipev", "v"),
        ("planned", "v"),
    ):
        if micro_batch_problem(schedule, setting.num_ranks, setting.micro_batches) is None:
            plan = make_plan(setting.config(schedule, placement))
            yield Row(schedule, plan.timeline, plan.bound, tuple(len(s.units) for s in plan.stages), plan.origin)
    yield _capped(setting, ACTIVATIONS * baseline.peak_bytes)


def _capped(setting: Setting, cap: float) -> Row:
    """``planned`` with no more than ``cap`` bytes of activations on any rank."""
    costs = _Costs.of(setting.config("planned", "v"))
    problem = Problem(
        costs=costs.units,
        stage_to_rank=costs.stage_to_rank,
        micro_batches=setting.micro_batches,
        message_seconds=costs.message_seconds,
        activation_caps=lambda cut: [cap] * setting.num_ranks,
        patterns=[
            pattern
            for pattern in ("zbv", "dualpipev")
            if micro_batch_problem(pattern, setting.num_ranks, setting.micro_batches) is None
        ],
    )
    found = search(problem, partition_candidates(costs.units, costs.stage_to_rank, "auto", SLACKS))
    if found is None:
        raise SystemExit(f"{setting}: one microbatch exceeds {cap / 1e9:.1f} GB")
    return _simulated(CAPPED, found.table, costs.units, found.partition, costs, "v", found.origin)


@dataclass(frozen=True)
class _Costs:
    """What a simulation needs to know of a configuration, as :func:`~dist_mtp.pipeline.plan.make_plan` finds it."""

    units: tuple[UnitCost, ...]
    stage_to_rank: tuple[int, ...]
    message_seconds: float

    @staticmethod
    def of(config: Config) -> _Costs:
        profile = on_nodes(resolve_profile(config.pipeline.device_profile), config)
        return _Costs(
            planned_costs(config, profile, config.recompute),
            stage_ranks(config),
            profile.message_seconds(message_bytes(config)),
        )


def _simulated(
    name: str, table: Table, units: Sequence[UnitCost], cut: Partition, costs: _Costs, placement: str, origin: str
) -> Row:
    """A row of a cut of ``units``, which may be whole layers."""
    stages, num_ranks = stage_costs(units, cut), max(costs.stage_to_rank) + 1
    return Row(
        name,
        simulate(table, stages, costs.stage_to_rank, costs.message_seconds),
        Bound(
            balance=balance_bound(units, num_ranks, placement),
            ramp=ramp_bound(table, stages, costs.stage_to_rank, costs.message_seconds),
        ),
        tuple(len(run) for run in cut),
        origin,
    )
