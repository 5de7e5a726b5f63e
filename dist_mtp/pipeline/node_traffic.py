"""How much of a step's traffic crosses nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from dist_mtp.pipeline.memory import RankMemory
from dist_mtp.pipeline.nodes import NodePlan

TrafficKind = Literal["pipeline", "embedding", "data", "experts"]


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic, over all ranks of a run. A link is a rank that sends to another one."""

    kind: TrafficKind
    links: int
    crossing_links: int
    """Those between ranks of different nodes."""
    crossing_bytes: int
    """Sent from one node to another in a step, summed over nodes."""
    busiest_node_bytes: int
    """Most that one node sends to others in a step."""

    @property
    def crossing(self) -> str:
        """``none``, ``some`` or ``all``."""
        if self.crossing_links == 0:
            return "none"
        return "all" if self.crossing_links == self.links else "some"

    def to_json(self) -> dict[str, Any]:
        return {
            "links": self.links,
            "crossing_links": self.crossing_links,
            "crossing_bytes_per_step": self.crossing_bytes,
            "busiest_node_bytes_per_step": self.busiest_node_bytes,
        }


@dataclass(frozen=True)
class _Sends:
    """``links`` links from ranks of one node to ranks of another, or of the same one."""

    sender: int
    receiver: int
    links: int
    bytes_per_link: float
    """In a step."""


def pipeline_traffic(plan: NodePlan, stage_to_rank: Sequence[int], bytes_per_link: int) -> Traffic:
    """Hidden states towards the next stage, and their gradients back.

    Args:
        stage_to_rank: pipeline rank of each virtual stage.
        bytes_per_link: of all microbatches of a step, one way.
    """

    def sends() -> Iterable[_Sends]:
        for here, there in pairwise(stage_to_rank):
            if here == there:
                continue
            for data_rank in range(plan.dp):
                a, b = plan.node_of(here * plan.dp + data_rank), plan.node_of(there * plan.dp + data_rank)
                yield _Sends(a, b, 1, bytes_per_link)
                yield _Sends(b, a, 1, bytes_per_link)

    return _total("pipeline", sends())


def embedding_traffic(plan: NodePlan, gradient_bytes: int) -> Traffic:
    """Gradients of the embedding's two copies, on the first and the last pipeline rank, to be summed.

    Args:
        gradient_bytes: of one copy, which each of two ranks sends to the other.
    """
    last = plan.pp - 1

    def sends() -> Iterable[_Sends]:
        for data_rank in range(plan.dp):
            a, b = plan.node_of(data_rank), plan.node_of(last * plan.dp + data_rank)
            yield _Sends(a, b, 1, gradient_bytes)
            yield _Sends(b, a, 1, gradient_bytes)

    return _total("embedding", sends())


def data_traffic(plan: NodePlan, ranks: Sequence[RankMemory]) -> Traffic:
    """Gradients, all-reduced in rings of consecutive ranks: each of n ranks sends 2 (n - 1) / n of them to the next.

    Those of experts go round the dp / ep ranks that hold the same ones. Gathering the updated weights again, which ZeRO-1
    does after the step, is not counted.
    """

    def sends() -> Iterable[_Sends]:
        for rank in ranks:
            expert_share = rank.expert_params / (rank.dense_params + rank.expert_params) if plan.ep > 1 else 0.0
            rings = [(range(plan.dp), rank.gradient_bytes * (1 - expert_share))]
            if expert_share:
                expert_bytes = rank.gradient_bytes * expert_share
                rings += [(range(first, plan.dp, plan.ep), expert_bytes) for first in range(plan.ep)]
            for ring, num_bytes in rings:
                nodes = [plan.node_of(rank.rank * plan.dp + data_rank) for data_rank in ring]
                if len(nodes) > 1:
                    sent = 2 * num_bytes * (len(nodes) - 1) / len(nodes)
                    yield from (_Sends(a, b, 1, sent) for a, b in pairwise([*nodes, nodes[0]]))

    return _total("data", sends())


def expert_traffic(plan: NodePlan, all_to_all_bytes: Sequence[int]) -> Traffic:
    """Tokens to experts on other ranks of a group and back, as many to each.

    Args:
        all_to_all_bytes: what leaves each rank in a step, per pipeline rank; empty without expert parallelism.
    """

    def sends() -> Iterable[_Sends]:
        for pp_rank, num_bytes in enumerate(all_to_all_bytes):
            for first in range(pp_rank * plan.dp, (pp_rank + 1) * plan.dp, plan.ep):
                # Counted by node, as a group has ep * (ep - 1) links.
                members = Counter(plan.node_of(rank) for rank in range(first, first + plan.ep))
                for a, here in members.items():
                    for b, there in members.items():
                        yield _Sends(a, b, here * (there - (a == b)), num_bytes / (plan.ep - 1))

    return _total("experts", sends())


def _total(kind: TrafficKind, sends: Iterable[_Sends]) -> Traffic:
    links, crossing = 0, 0
    sent_by_node: dict[int, float] = {}
    for send in sends:
        links += send.links
        if send.sender != send.receiver:
            crossing += send.links
            sent_by_node[send.sender] = sent_by_node.get(send.sender, 0.0) + send.links * send.bytes_per_link
    return Traffic(
        kind,
        links,
        crossing,
        crossing_bytes=round(sum(sent_by_node.values())),
        busiest_node_bytes=round(max(sent_by_node.values(), default=0.0)),
    )
