"""A model that sleeps: units take the time that a plan says, and pass real tensors on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dist_mtp.model.transformer import EMBED, HEAD
from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.precision.weight_grads import DeferrableLayer
from peers.cuts import Borders, stage_costs
from peers.measuring import sleep_until

HIDDEN_SHAPE = (1, 64, 256)
"""[B, T, D] of what travels between stages, fp32."""


class SleepingUnit(DeferrableLayer):
    """Sleeps ``time_f`` in its forward, ``time_i`` in its backward, and ``time_w`` when its weight gradient is computed.

    That is during the backward unless the queue defers it, as with dist_mtp's real layers. Without a cost it is not there.
    """

    def __init__(self, cost: UnitCost) -> None:
        super().__init__()
        self.cost = cost
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.cost.time == 0:
            return x
        result: Tensor = _Sleep.apply(x, self.weight, self)
        return result


class SleepingEmbedding(SleepingUnit):
    """The first unit: its output is its table, whatever the ids."""

    def __init__(self, cost: UnitCost) -> None:
        super().__init__(cost)
        self.table = nn.Parameter(torch.zeros(HIDDEN_SHAPE))

    def forward(self, ids: object = None) -> Tensor:
        return super().forward(self.table)


class SleepingHead(SleepingUnit):
    """The last unit: a scalar. What MTP does with the embedding, :func:`add_embedding` does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean()


def add_embedding(embedding: SleepingEmbedding, x: Tensor) -> Tensor:
    """The second use of the embedding, which gives its parameter a gradient on the last stage, too."""
    return x + embedding.table


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, unit: SleepingUnit) -> Tensor:
        ctx.unit = unit
        _work(unit.cost.time_f)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        unit = ctx.unit
        _work(unit.cost.time_i)

        def weight_grad() -> Tensor:
            _work(unit.cost.time_w)
            return torch.ones(1)

        return grads[0], unit.deliver(unit.weight, weight_grad), None


class SleepingModel(nn.Module):
    """What :class:`dist_mtp.pipeline.stage.Stage` asks of a rank's units.

    Args:
        costs: of this rank's units, by name.
    """

    def __init__(self, costs: Mapping[str, UnitCost]) -> None:
        super().__init__()
        kinds = {EMBED: SleepingEmbedding, HEAD: SleepingHead}
        self.units = {name: kinds.get(name, SleepingUnit)(cost) for name, cost in costs.items()}

    def unit_modules(self, unit: str) -> list[nn.Module]:
        return [self.units[unit]]

    def run_unit(self, unit: str, hidden: Tensor | None, batch: object) -> Tensor:
        result: Tensor = self.units[unit](hidden)
        return result

    def run_head(self, hidden: Tensor, batch: object, *, accumulate_in_forward: bool) -> tuple[Tensor, None]:
        embedding = self.units[EMBED]
        assert isinstance(embedding, SleepingEmbedding)
        return self.units[HEAD](add_embedding(embedding, hidden)), None


def at_stage_ends(costs: Sequence[UnitCost], borders: Borders) -> list[UnitCost]:
    """The same costs per stage, all of it at the stage's last unit: one sleep is more exact than a dozen short ones."""
    moved = [UnitCost()] * len(costs)
    for (_, stop), cost in zip(pairwise(borders), stage_costs(costs, borders), strict=True):
        moved[stop - 1] = cost
    return moved


def layer_modules(costs: Sequence[UnitCost], start: int, stop: int) -> list[tuple[Callable[..., nn.Module], UnitCost]]:
    """Class and cost of whole layers ``start`` to ``stop - 1`` of embedding, layers, head."""
    kinds: list[Callable[..., nn.Module]] = [SleepingEmbedding, *[SleepingUnit] * (len(costs) - 2), SleepingHead]
    return list(zip(kinds[start:stop], costs[start:stop], strict=True))


def _work(seconds: float) -> None:
    sleep_until(time.perf_counter() + seconds)
