"""The plan: who computes what in which order, and how long that should take. Made once, read by everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_mtp.config import Config
from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.bounds import Bound, balance_bound, balanced_ranks, ramp_bound
from dist_mtp.pipeline.costs import UnitCost, list_units, message_bytes, total_cost, unit_costs, unit_parameters
from dist_mtp.pipeline.devices import DeviceProfile, resolve_profile
from dist_mtp.pipeline.experts import ExpertPlan, place_experts
from dist_mtp.pipeline.lowering import lower
from dist_mtp.pipeline.memory import GRADIENT_BYTES, RankMemory, rank_memory
from dist_mtp.pipeline.node_traffic import Traffic, data_traffic, embedding_traffic, expert_traffic, pipeline_traffic
from dist_mtp.pipeline.nodes import NodePlan, on_nodes, place_on_nodes, placement_warnings, ranks_per_node
from dist_mtp.pipeline.partition import Partition, partition
from dist_mtp.pipeline.placement import stage_ranks
from dist_mtp.pipeline.simulate import Timeline, simulate
from dist_mtp.pipeline.table import Table, check_complete

_SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1)
"""How much slower than the least possible the slowest rank may be in the partitions that ``layout=auto`` compares."""


@dataclass(frozen=True)
class StagePlan:
    """One virtual stage."""

    index: int
    rank: int
    units: tuple[int, ...]
    """Indices into :func:`~dist_mtp.pipeline.costs.list_units`, contiguous."""
    unit_names: tuple[str, ...]
    cost: UnitCost
    """Of all its units; ``params`` includes the embedding's replica under ``last`` placement."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run's pipeline that ranks, monitors and people need to know."""

    pp: int
    dp: int
    ep: int
    placement: str
    schedule: str
    micro_batches: int
    stage_to_rank: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    table: Table
    """Computation of each rank."""
    lowered: Table
    """Computation and communication of each rank: what the runtime executes."""
    timeline: Timeline
    """Prediction for one step."""
    bound: Bound
    balanced_ranks: int
    """The largest ``parallel.pp`` at which the rank of the head need not be slower than the others."""
    profile: DeviceProfile
    """With this run's ranks in a node."""
    experts: ExpertPlan | None
    """None when ``parallel.ep`` is 1: every rank holds all experts of its layers."""
    ranks: tuple[RankMemory, ...]
    """Of each pipeline rank; its data-parallel ranks all hold as much."""
    nodes: NodePlan
    traffic: tuple[Traffic, ...]
    """Between nodes: of the pipeline, of the embedding's two copies if there are two, of gradients, and of experts unless
    ``parallel.ep`` is 1."""
    node_warnings: tuple[str, ...]
    """What crosses nodes and need not, with the values that would fit."""

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def stages_of(self, rank: int) -> tuple[StagePlan, ...]:
        """The rank's stages, in pipeline order."""
        return tuple(stage for stage in self.stages if stage.rank == rank)

    def forward_only(self, micro_batches: int) -> Table:
        """Lowered table of an evaluation with any number of microbatches."""
        table = schedules.forward_only(self.pp, self.stage_to_rank, micro_batches)
        return lower(table, self.stage_to_rank, self.num_stages)

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``; times in seconds of the device profile.

        ``params`` of a stage are those on one data-parallel rank. ``experts`` is null when ``parallel.ep`` is 1. ``nodes`` has
        first and last rank of each node, and the traffic that leaves nodes in a step.
        """
        return {
            "pp": self.pp,
            "dp": self.dp,
            "ep": self.ep,
            "placement": self.placement,
            "schedule": self.schedule,
            "micro_batches": self.micro_batches,
            "stages": [
                {
                    "index": stage.index,
                    "rank": stage.rank,
                    "units": list(stage.unit_names),
                    "time_f": stage.cost.time_f,
                    "time_i": stage.cost.time_i,
                    "time_w": stage.cost.time_w,
                    "params": stage.cost.params,
                }
                for stage in self.stages
            ],
            "predicted": {
                "step_time": self.timeline.step_time,
                "bubble": self.timeline.bubble,
                "peak_activation_bytes": list(self.timeline.peak_activation_bytes),
            },
            "bound": {"balance": self.bound.balance, "ramp": self.bound.ramp},
            "experts": None if self.experts is None else self.experts.to_json(),
            "ranks": [asdict(rank) for rank in self.ranks],
            "nodes": {
                **self.nodes.to_json(),
                "traffic": {traffic.kind: traffic.to_json() for traffic in self.traffic},
                "warnings": list(self.node_warnings),
            },
        }


def make_plan(config: Config, cuda_device_name: str | None = None) -> Plan:
    """Plan a run. A pure function: all ranks compute the same plan from the same configuration.

    With ``pipeline.layout=auto`` a few partitions, from the one with the fastest slowest rank to ones with more even
    stages, are simulated under the schedule, and the one with the shortest step wins.

    Args:
        config: with ``model.vocab_size`` resolved.
        cuda_device_name: GPU name for ``pipeline.device_profile=auto``; None plans for the CPU.

    Raises:
        ConfigError: unknown device profile, too few units, or a layout that does not fit.
    """
    profile = on_nodes(resolve_profile(config.pipeline.device_profile, cuda_device_name), config)
    stage_to_rank = stage_ranks(config)
    table = schedules.build(config.pipeline.schedule, config.parallel.pp, stage_to_rank, config.train.micro_batches)
    check_complete(table, len(stage_to_rank), config.train.micro_batches, stage_to_rank)

    costs = unit_costs(config, profile)
    message_seconds = profile.message_seconds(message_bytes(config))
    layout = config.pipeline.layout
    slacks = _SLACKS if layout == "auto" else (0.0,)
    # A dict, as several slacks often lead to one partition; ordered, so that ties go to the smallest slack.
    candidates = dict.fromkeys(partition(costs, stage_to_rank, layout, slack) for slack in slacks)
    simulated = [(simulate(table, _stage_costs(costs, cut), stage_to_rank, message_seconds), cut) for cut in candidates]
    timeline, chosen = min(simulated, key=lambda pair: pair[0].step_time)
    stages = _stage_plans(config, costs, stage_to_rank, chosen)
    rank_costs = [
        total_cost(stage.cost for stage in stages if stage.rank == rank) for rank in range(config.parallel.pp)
    ]

    ranks = tuple(
        rank_memory(config, rank, cost, timeline.peak_activation_bytes[rank]) for rank, cost in enumerate(rank_costs)
    )
    experts = place_experts(config, profile, rank_costs)
    nodes = place_on_nodes(config.parallel.pp, config.dp, config.parallel.ep, ranks_per_node(config, profile))

    return Plan(
        pp=config.parallel.pp,
        dp=config.dp,
        ep=config.parallel.ep,
        placement=config.pipeline.placement,
        schedule=config.pipeline.schedule,
        micro_batches=config.train.micro_batches,
        stage_to_rank=stage_to_rank,
        stages=stages,
        table=table,
        lowered=lower(table, stage_to_rank, len(stage_to_rank)),
        timeline=timeline,
        bound=Bound(
            balance=balance_bound(costs, config.parallel.pp, config.pipeline.placement),
            ramp=ramp_bound(table, _stage_costs(costs, chosen), stage_to_rank, message_seconds),
        ),
        balanced_ranks=balanced_ranks(costs, config.pipeline.placement),
        profile=profile,
        experts=experts,
        ranks=ranks,
        nodes=nodes,
        traffic=_traffic(config, nodes, stage_to_rank, ranks, experts),
        node_warnings=tuple(placement_warnings(nodes, config.model.n_routed_experts)),
    )


def _traffic(
    config: Config,
    nodes: NodePlan,
    stage_to_rank: Sequence[int],
    ranks: Sequence[RankMemory],
    experts: ExpertPlan | None,
) -> tuple[Traffic, ...]:
    hidden_bytes = config.train.micro_batches * message_bytes(config)
    kinds = [pipeline_traffic(nodes, stage_to_rank, hidden_bytes)]
    if _embedding_has_two_copies(config, stage_to_rank):
        kinds.append(embedding_traffic(nodes, GRADIENT_BYTES * unit_parameters(config)[0]))
    kinds.append(data_traffic(nodes, ranks))
    if experts is not None:
        kinds.append(expert_traffic(nodes, experts.all_to_all_bytes))
    return tuple(kinds)


def _embedding_has_two_copies(config: Config, stage_to_rank: Sequence[int]) -> bool:
    """MTP modules and a tied head need it where the last stage is; a rank that holds both stages has one copy for both."""
    return (config.mtp.depth > 0 or config.model.tie_word_embeddings) and stage_to_rank[-1] != stage_to_rank[0]


def _stage_costs(costs: Sequence[UnitCost], cut: Partition) -> list[UnitCost]:
    return [total_cost(costs[unit] for unit in units) for units in cut]


def _stage_plans(
    config: Config, costs: Sequence[UnitCost], stage_to_rank: Sequence[int], cut: Partition
) -> tuple[StagePlan, ...]:
    units = list_units(config)
    stage_costs = _stage_costs(costs, cut)
    if _embedding_has_two_copies(config, stage_to_rank):
        stage_costs[-1] = total_cost([stage_costs[-1], UnitCost(params=costs[0].params)])
    return tuple(
        StagePlan(
            index=index,
            rank=stage_to_rank[index],
            units=indices,
            unit_names=tuple(units[unit].name for unit in indices),
            cost=stage_costs[index],
        )
        for index, indices in enumerate(cut)
    )
