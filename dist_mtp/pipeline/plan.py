"""The plan: who computes what in which order, and how long that should take. Made once, read by everything else."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_mtp.config import Config
from dist_mtp.pipeline import schedules
from dist_mtp.pipeline.bounds import Bound, balance_bound, balanced_ranks, ramp_bound
from dist_mtp.pipeline.choice import Choice, choose, costs_with_replica, what_helps
from dist_mtp.pipeline.costs import UnitCost, list_units, message_bytes, stage_costs, total_cost, unit_parameters
from dist_mtp.pipeline.devices import DeviceProfile, resolve_profile
from dist_mtp.pipeline.experts import ExpertPlan, place_experts
from dist_mtp.pipeline.lowering import lower
from dist_mtp.pipeline.memory import GRADIENT_BYTES, RankMemory, rank_memory
from dist_mtp.pipeline.node_traffic import Traffic, data_traffic, embedding_traffic, expert_traffic, pipeline_traffic
from dist_mtp.pipeline.nodes import NodePlan, on_nodes, place_on_nodes, placement_warnings, ranks_per_node
from dist_mtp.pipeline.placement import embedding_has_two_copies, stage_ranks
from dist_mtp.pipeline.simulate import Timeline
from dist_mtp.pipeline.table import Table, check_complete
from dist_mtp.recompute import Recompute


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
    origin: str
    """Of the table: the registered schedule, or how ``planned`` made it (``planned.py``)."""
    recompute: Recompute
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
    message_bytes: int
    """Of one microbatch between two stages on different ranks, in each direction."""
    memory_limit: float | None
    """Bytes of a rank; None where memory is not limited."""
    warnings: tuple[str, ...]
    """What the user should know about memory, balance and layout, with what would help."""

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def stages_of(self, rank: int) -> tuple[StagePlan, ...]:
        """The rank's stages, in pipeline order."""
        return tuple(stage for stage in self.stages if stage.rank == rank)

    def edge_bytes(self) -> dict[tuple[int, int], int]:
        """Bytes that a step sends between each pair of neighbouring ranks (lower, higher), both ways together."""
        edges: dict[tuple[int, int], int] = {}
        for left, right in itertools.pairwise(self.stage_to_rank):
            if left != right:
                edge = (min(left, right), max(left, right))
                edges[edge] = edges.get(edge, 0) + 2 * self.micro_batches * self.message_bytes
        return edges

    def forward_only(self, micro_batches: int) -> Table:
        """Lowered table of an evaluation with any number of microbatches."""
        table = schedules.forward_only(self.pp, self.stage_to_rank, micro_batches)
        return lower(table, self.stage_to_rank, self.num_stages)

    def digest(self) -> str:
        """SHA-256 of what ranks must agree on: who holds which units, the order of actions, and what is recomputed."""
        cut = [stage.units for stage in self.stages]
        return hashlib.sha256(repr((cut, self.lowered, str(self.recompute))).encode()).hexdigest()

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
            "origin": self.origin,
            "recompute": str(self.recompute),
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
                "busy": list(self.timeline.busy),
            },
            "bound": {"balance": self.bound.balance, "ramp": self.bound.ramp},
            "experts": None if self.experts is None else self.experts.to_json(),
            "ranks": [asdict(rank) for rank in self.ranks],
            "edges": [{"ranks": list(edge), "bytes_per_step": sent} for edge, sent in self.edge_bytes().items()],
            "memory_limit": self.memory_limit,
            "warnings": list(self.warnings),
            "nodes": {
                **self.nodes.to_json(),
                "traffic": {traffic.kind: traffic.to_json() for traffic in self.traffic},
                "warnings": list(self.node_warnings),
            },
        }


def make_plan(config: Config, cuda_device_name: str | None = None) -> Plan:
    """Plan a run. A pure function: all ranks compute the same plan from the same configuration.

    What is open in the configuration (order of actions, partition, recomputation) is decided by
    :func:`~dist_mtp.pipeline.choice.choose`.

    Args:
        config: with ``model.vocab_size`` resolved.
        cuda_device_name: GPU name for ``pipeline.device_profile=auto``; None plans for the CPU.

    Raises:
        ConfigError: unknown device profile, too few units, a layout that does not fit, or more than ``pipeline.memory_gb``.
    """
    profile = on_nodes(resolve_profile(config.pipeline.device_profile, cuda_device_name), config)
    stage_to_rank = stage_ranks(config)
    message_seconds = profile.message_seconds(message_bytes(config))
    choice = choose(config, profile, message_seconds)
    table, costs, timeline = choice.table, choice.costs, choice.timeline
    check_complete(table, len(stage_to_rank), config.train.micro_batches, stage_to_rank)
    stages = _stage_plans(config, choice, stage_to_rank)
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
        origin=choice.origin,
        recompute=choice.recompute,
        micro_batches=config.train.micro_batches,
        stage_to_rank=stage_to_rank,
        stages=stages,
        table=table,
        lowered=lower(table, stage_to_rank, len(stage_to_rank)),
        timeline=timeline,
        bound=Bound(
            balance=balance_bound(costs, config.parallel.pp, config.pipeline.placement),
            ramp=ramp_bound(table, stage_costs(costs, choice.cut), stage_to_rank, message_seconds),
        ),
        balanced_ranks=balanced_ranks(costs, config.pipeline.placement),
        profile=profile,
        experts=experts,
        ranks=ranks,
        nodes=nodes,
        traffic=_traffic(config, nodes, stage_to_rank, ranks, experts),
        node_warnings=tuple(placement_warnings(nodes, config.model.n_routed_experts)),
        message_bytes=message_bytes(config),
        memory_limit=choice.memory_limit,
        warnings=tuple(_warnings(config, choice, ranks)),
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
    if embedding_has_two_copies(config, stage_to_rank):
        kinds.append(embedding_traffic(nodes, GRADIENT_BYTES * unit_parameters(config)[0]))
    kinds.append(data_traffic(nodes, ranks))
    if experts is not None:
        kinds.append(expert_traffic(nodes, experts.all_to_all_bytes))
    return tuple(kinds)


def _warnings(config: Config, choice: Choice, ranks: Sequence[RankMemory]) -> list[str]:
    warnings = list(choice.notes)
    pp, suits = config.parallel.pp, balanced_ranks(choice.costs, config.pipeline.placement)
    if pp > suits:
        warnings.append(
            f"the rank with the head is slower than the mean from parallel.pp={suits + 1} on: parallel.pp={suits} with more "
            "data parallelism suits this model better"
        )
    if choice.is_squeezed and config.pipeline.recompute != "auto":
        warnings.append(
            "memory keeps ranks from holding as many microbatches as the schedule could use: pipeline.recompute=auto compares what "
            "recomputation would make of it"
        )
    if not choice.fits:
        assert choice.memory_limit is not None
        fullest = max(ranks, key=lambda rank: rank.total_bytes)
        warnings.append(
            f"rank {fullest.rank} needs {fullest.total_bytes / 1e9:.4g} GB, more than the {choice.memory_limit / 1e9:.4g} GB "
            f"that a plan should leave of the device: {what_helps(config)}; pipeline.memory_gb makes it an error"
        )
    return warnings


def _stage_plans(config: Config, choice: Choice, stage_to_rank: Sequence[int]) -> tuple[StagePlan, ...]:
    units, costs = list_units(config), costs_with_replica(config, choice)
    return tuple(
        StagePlan(
            index=index,
            rank=stage_to_rank[index],
            units=indices,
            unit_names=tuple(units[unit].name for unit in indices),
            cost=costs[index],
        )
        for index, indices in enumerate(choice.cut)
    )
