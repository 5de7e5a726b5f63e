"""Expert parallelism in the plan: which data-parallel ranks hold which experts, and how much travels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_mtp.config import Config
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.devices import DeviceProfile


@dataclass(frozen=True)
class ExpertPlan:
    """Where the experts of a MoE layer live among the data-parallel ranks of the pipeline rank that holds the layer.

    With 8 experts, dp=4 and ep=2::

        data rank 0   experts 0-3   data rank 2   experts 0-3
        data rank 1   experts 4-7   data rank 3   experts 4-7

    the groups are ranks 0-1 and 2-3, and there are two copies of each expert.
    """

    num_experts: int
    """Routed experts of one layer."""
    dp: int
    ep: int
    within_node: bool
    """Whether no group spans two nodes of the device profile."""
    all_to_all_bytes: tuple[int, ...]
    """Per pipeline rank: what leaves each of its data-parallel ranks in a step, if experts get equally many tokens."""

    @property
    def per_rank(self) -> int:
        """Experts of one layer that a rank holds."""
        return self.num_experts // self.ep

    @property
    def copies(self) -> int:
        """Ranks that hold the same experts: they average their gradients and share the optimizer state."""
        return self.dp // self.ep

    @property
    def groups(self) -> tuple[range, ...]:
        """Data-parallel ranks that together hold all experts of a layer, and among which its tokens travel."""
        return tuple(range(first, first + self.ep) for first in range(0, self.dp, self.ep))

    def held_by(self, data_rank: int) -> range:
        """Experts of each layer on a data-parallel rank."""
        first = data_rank % self.ep * self.per_rank
        return range(first, first + self.per_rank)

    def to_json(self) -> dict[str, Any]:
        """``groups`` as first and last data-parallel rank; ``all_to_all_bytes_per_step`` by pipeline rank."""
        return {
            "per_rank": self.per_rank,
            "copies": self.copies,
            "groups": [[group[0], group[-1]] for group in self.groups],
            "within_node": self.within_node,
            "all_to_all_bytes_per_step": list(self.all_to_all_bytes),
        }


def place_experts(config: Config, profile: DeviceProfile, rank_costs: Sequence[UnitCost]) -> ExpertPlan | None:
    """The experts' places, or None when ``parallel.ep`` is 1.

    Args:
        rank_costs: of one microbatch, per pipeline rank.
    """
    ep = config.parallel.ep
    if ep == 1:
        return None
    return ExpertPlan(
        num_experts=config.model.n_routed_experts,
        dp=config.dp,
        ep=ep,
        within_node=profile.within_node(ep, config.world_size),
        all_to_all_bytes=tuple(config.train.micro_batches * cost.all_to_all_bytes for cost in rank_costs),
    )
