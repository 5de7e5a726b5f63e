"""Comparison: the same run under every placement and schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dist_mtp.config import Config
from dist_mtp.config_checks import LAST_SCHEDULES, V_SCHEDULES, micro_batch_problem
from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.choice import choose, fullest_rank_bytes
from dist_mtp.pipeline.costs import message_bytes
from dist_mtp.pipeline.plan import Plan

_EFFORT = 0.3
"""Of ``planned``'s search, relative to that of a run: a comparison need not find the last percent."""


@dataclass(frozen=True)
class Alternative:
    """What a run would be under another placement or schedule, its partition balanced anew."""

    placement: str
    schedule: str
    step_time: float | None = None
    """Predicted seconds; None where ``problem`` says why there is no plan."""
    bubble: float | None = None
    peak_activation_bytes: int | None = None
    """Of the fullest rank."""
    memory_bytes: int | None = None
    """Of the fullest rank, weights, gradients and optimizer state included."""
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(config: Config, plan: Plan) -> list[Alternative]:
    """Every placement and schedule, fastest first, then those that do not run. That of ``plan`` is taken from it."""
    alternatives = []
    for placement, schedules in (("v", V_SCHEDULES), ("last", LAST_SCHEDULES)):
        for schedule in schedules:
            if (placement, schedule) == (plan.placement, plan.schedule):
                memory = max(rank.total_bytes for rank in plan.ranks)
                peak = max(plan.timeline.peak_activation_bytes)
                alternatives.append(
                    Alternative(placement, schedule, plan.timeline.step_time, plan.timeline.bubble, peak, memory)
                )
            else:
                alternatives.append(_alternative(config, plan, placement, schedule))
    return sorted(alternatives, key=lambda alternative: alternative.step_time or float("inf"))


def _alternative(config: Config, plan: Plan, placement: str, schedule: str) -> Alternative:
    problem = micro_batch_problem(schedule, plan.pp, plan.micro_batches)
    if problem is not None:
        return Alternative(placement, schedule, problem=problem)
    pipeline = dataclasses.replace(
        config.pipeline,
        placement=placement,  # type: ignore[arg-type]
        schedule=schedule,  # type: ignore[arg-type]
        layout="auto",
        recompute=str(plan.recompute),
    )
    changed = dataclasses.replace(config, pipeline=pipeline)
    try:
        choice = choose(changed, plan.profile, plan.profile.message_seconds(message_bytes(config)), effort=_EFFORT)
    except ConfigError as error:
        return Alternative(placement, schedule, problem=str(error))
    timeline = choice.timeline
    peak, memory = max(timeline.peak_activation_bytes), fullest_rank_bytes(changed, choice)
    return Alternative(placement, schedule, timeline.step_time, timeline.bubble, peak, memory)
