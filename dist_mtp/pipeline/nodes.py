"""Which ranks share a node, and what fits badly there.

Nodes hold consecutive ranks and ``rank = pp_rank * dp + dp_rank``, so data- and expert-parallel groups stay together and the
pipeline, which sends least, is what crosses nodes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_mtp.config import Config
from dist_mtp.pipeline.devices import DeviceProfile


@dataclass(frozen=True)
class Node:
    """One machine."""

    ranks: range
    pipeline_ranks: range
    data_ranks: tuple[range, ...]
    """Of each of its pipeline ranks."""


@dataclass(frozen=True)
class NodePlan:
    """With pp=4, dp=4 and 8 ranks in a node::

        node 0   ranks 0-7    pipeline ranks 0-1   data ranks 0-3 of each
        node 1   ranks 8-15   pipeline ranks 2-3   data ranks 0-3 of each

    Reductions and all-to-alls stay inside, and one of three messages along the pipeline crosses.
    """

    pp: int
    dp: int
    ep: int
    ranks_per_node: int
    nodes: tuple[Node, ...]

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def to_json(self) -> dict[str, Any]:
        """First and last of each range; ``data_ranks`` by pipeline rank of the node."""
        return {
            "ranks_per_node": self.ranks_per_node,
            "places": [
                {
                    "ranks": _ends(node.ranks),
                    "pipeline_ranks": _ends(node.pipeline_ranks),
                    "data_ranks": [_ends(ranks) for ranks in node.data_ranks],
                }
                for node in self.nodes
            ],
        }


def place_on_nodes(pp: int, dp: int, ep: int, ranks_per_node: int) -> NodePlan:
    """Fill one node after the other; the last one may have ranks to spare."""
    nodes = []
    for first in range(0, pp * dp, ranks_per_node):
        ranks = range(first, min(first + ranks_per_node, pp * dp))
        pipeline_ranks = range(ranks[0] // dp, ranks[-1] // dp + 1)
        data_ranks = tuple(
            range(max(ranks.start - pp_rank * dp, 0), min(ranks.stop - pp_rank * dp, dp)) for pp_rank in pipeline_ranks
        )
        nodes.append(Node(ranks, pipeline_ranks, data_ranks))
    return NodePlan(pp, dp, ep, ranks_per_node, tuple(nodes))


def ranks_per_node(config: Config, profile: DeviceProfile) -> int:
    """Ranks that share a node: as the launcher is told, else one for each GPU of the profile's machines.

    Without ``launcher.ranks_per_node`` the ranks are divided evenly among ``launcher.nodes`` or ``launcher.hosts``. A
    hostfile is not read here: the same plan is made on nodes that may not have it.
    """
    launcher, world = config.launcher, config.world_size
    if launcher.ranks_per_node is not None:
        return launcher.ranks_per_node
    count = len(launcher.hosts) or launcher.nodes
    if count > 1:
        return math.ceil(world / count)
    return min(world, profile.node_ranks or world)


def on_nodes(profile: DeviceProfile, config: Config) -> DeviceProfile:
    """The profile with the number of ranks that this run has in a node: the one rule of what stays inside."""
    return dataclasses.replace(profile, node_ranks=ranks_per_node(config, profile))


def placement_warnings(plan: NodePlan, num_experts: int) -> list[str]:
    """What crosses nodes although other degrees would keep it inside, and the degrees that would.

    Args:
        num_experts: routed experts of a layer.
    """
    if len(plan.nodes) == 1:
        return []
    size, warnings = plan.ranks_per_node, []
    if size % plan.ep:
        fitting = [
            ep for ep in range(plan.ep - 1, 1, -1) if size % ep == 0 and plan.dp % ep == 0 and num_experts % ep == 0
        ]
        if fitting:
            warnings.append(
                f"groups of parallel.ep={plan.ep} ranks that share experts span nodes of {size} ranks: "
                f"parallel.ep={_either(fitting)} would keep their tokens inside, with more experts on each rank"
            )
    if not _fits(plan.dp, size):
        warnings.append(
            f"groups of parallel.dp={plan.dp} data ranks begin and end inside nodes of {size} ranks: "
            f"parallel.dp={_either(_neighbours(plan.dp, lambda dp: _fits(dp, size) and dp % plan.ep == 0))} would fit"
        )
    if spare := -(plan.pp * plan.dp) % size:
        warnings.append(
            f"{plan.pp * plan.dp} ranks leave {spare} of {size} places on the last of {len(plan.nodes)} nodes empty: "
            "launchers start equally many ranks on each node, so set launcher.ranks_per_node to a divisor of parallel.pp x "
            "parallel.dp, or change these"
        )
    return warnings


def _fits(group: int, node: int) -> bool:
    """Whether groups of consecutive ranks fill whole nodes, or nodes whole groups."""
    return group % node == 0 or node % group == 0


def _neighbours(value: int, is_good: Callable[[int], bool]) -> list[int]:
    """The nearest good values below, if any, and above."""
    below = next((candidate for candidate in range(value - 1, 0, -1) if is_good(candidate)), None)
    above = value + 1
    while not is_good(above):
        above += 1
    return [above] if below is None else [below, above]


def _either(values: list[int]) -> str:
    """``8, 4 or 2``."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _ends(numbers: range) -> list[int]:
    return [numbers[0], numbers[-1]]
