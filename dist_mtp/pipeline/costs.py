"""Costs of pipeline units: what the planner knows about the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_mtp.config import Config
from dist_mtp.pipeline import sizes
from dist_mtp.pipeline.devices import DeviceProfile
from dist_mtp.pipeline.saved import TILE, bytes_per_element
from dist_mtp.pipeline.sizes import BlockSize
from dist_mtp.recompute import KEEP_ALL, Recompute

UnitKind = Literal["embedding", "attention", "dense_ffn", "moe_ffn", "head"]


@dataclass(frozen=True)
class Unit:
    """The smallest piece of the model that a stage can hold."""

    name: str
    """``embed``, ``layers.3.attention``, ``layers.3.feed_forward`` or ``head``."""
    kind: UnitKind
    layer: int | None = None
    """Trunk layer, 0-based; None for ``embed`` and ``head``."""


@dataclass(frozen=True)
class UnitCost:
    """Cost of a unit, or of all units of a stage."""

    time_f: float = 0.0
    """Forward of one microbatch, seconds."""
    time_i: float = 0.0
    """Input gradient of one microbatch, with what is computed again for it, seconds."""
    time_w: float = 0.0
    """Weight gradient of one microbatch, seconds."""
    params: int = 0
    """Parameters on the owning rank, exact: of routed experts its own part only."""
    activation_bytes: int = 0
    """Held per microbatch from the start of its forward to the end of its input gradient, or of its full backward."""
    expert_params: int = 0
    """Those of ``params`` that belong to routed experts."""
    all_to_all_bytes: int = 0
    """Leave the rank for experts on other ranks, or on the way back from its own, per microbatch, forward and backward."""
    fp8_params: int = 0
    """Those of ``params`` that belong to linear layers and experts."""
    deferred_bytes: int = 0
    """Held per microbatch from the end of its input gradient until its weight gradient; no part of ``activation_bytes``."""
    recompute_bytes: int = 0
    """Beside ``activation_bytes`` while one unit (of the head one MTP module) recomputes what it did not keep; an upper bound."""

    @property
    def time(self) -> float:
        """Forward and backward of one microbatch, seconds."""
        return self.time_f + self.time_i + self.time_w


def list_units(config: Config) -> tuple[Unit, ...]:
    """All units in the order of computation: embedding, two halves per layer, final norm + head + MTP."""
    units = [Unit("embed", "embedding")]
    for layer in range(config.model.num_layers):
        units.append(Unit(f"layers.{layer}.attention", "attention", layer))
        kind: UnitKind = "moe_ffn" if config.model.is_moe_layer(layer) else "dense_ffn"
        units.append(Unit(f"layers.{layer}.feed_forward", kind, layer))
    units.append(Unit("head", "head"))
    return tuple(units)


def unit_costs(config: Config, profile: DeviceProfile, recompute: Recompute | None = None) -> tuple[UnitCost, ...]:
    """Cost of each unit of :func:`list_units`, for microbatches of ``train.micro_batch_size`` rows of T positions.

    Experts are taken to get equally many tokens. A MoE layer waits for two all-to-alls in the forward, dispatch and combine,
    and for their reverse in the input gradient: in both one towards the experts and one back. Nothing is taken to overlap
    with them. Under ``precision=fp8`` all linear layers and experts multiply at the device's FP8 speed, those of
    ``precision.fp8_keep_bf16`` included; attention's core, routers and the heads do not.

    Recomputation takes place in the input gradient. That of norms and SwiGLU multiplies no matrices and is taken to be free;
    whole units take their forward once more, with its all-to-alls.

    Args:
        recompute: None takes what ``pipeline.recompute`` names.
    """
    recompute = config.recompute if recompute is None else recompute
    tokens, ep = config.train.micro_batch_size * config.train.seq_len, config.parallel.ep
    seconds_per_flop = tokens / profile.flops_per_s
    fp8_seconds_per_flop = tokens / profile.fp8_flops_per_s if config.precision.name == "fp8" else seconds_per_flop
    exchanged = exchange_bytes(config)
    exchange_seconds = sum(profile.all_to_all_seconds(num_bytes, ep, config.world_size) for num_bytes in exchanged)
    costs = []
    for unit, size, whole in zip(list_units(config), _unit_sizes(config, recompute), _unit_sizes(config), strict=True):
        weights = (size.weight_flops - size.fp8_flops) * seconds_per_flop + size.fp8_flops * fp8_seconds_per_flop
        core = size.core_flops * seconds_per_flop
        exchanges = size.moe_layers * exchange_seconds
        elsewhere = size.expert_params - size.expert_params // ep
        repeats = recompute.units and unit.kind != "embedding"
        again = size.up_flops * fp8_seconds_per_flop if recompute.mla_up else 0.0
        if repeats:
            again = weights + core + exchanges
        regions = config.mtp.depth if unit.kind == "head" else 1
        costs.append(
            UnitCost(
                time_f=weights + core + 3 * size.loss_flops * seconds_per_flop + exchanges,
                time_i=weights + 2 * core + exchanges + again,
                time_w=weights,
                params=size.params - elsewhere,
                activation_bytes=int(size.saved_bytes * tokens),
                expert_params=size.expert_params // ep,
                all_to_all_bytes=(3 if repeats else 2) * size.moe_layers * sum(exchanged),
                fp8_params=size.fp8_params - elsewhere,
                deferred_bytes=int(size.deferred_bytes * tokens),
                recompute_bytes=int((whole.saved_bytes - size.saved_bytes) * tokens / max(regions, 1)),
            )
        )
    return tuple(costs)


def total_cost(costs: Iterable[UnitCost]) -> UnitCost:
    """Sum of units that run one after the other on one rank; they recompute one at a time."""
    total = UnitCost()
    for cost in costs:
        total = UnitCost(
            total.time_f + cost.time_f,
            total.time_i + cost.time_i,
            total.time_w + cost.time_w,
            total.params + cost.params,
            total.activation_bytes + cost.activation_bytes,
            total.expert_params + cost.expert_params,
            total.all_to_all_bytes + cost.all_to_all_bytes,
            total.fp8_params + cost.fp8_params,
            total.deferred_bytes + cost.deferred_bytes,
            max(total.recompute_bytes, cost.recompute_bytes),
        )
    return total


def stage_costs(costs: Sequence[UnitCost], cut: Sequence[Sequence[int]]) -> list[UnitCost]:
    """Cost of each stage, from its units."""
    return [total_cost(costs[unit] for unit in units) for units in cut]


def message_bytes(config: Config) -> int:
    """Size of one microbatch's hidden states, or of their gradient, between two stages: [rows, T, H]."""
    tokens = config.train.micro_batch_size * config.train.seq_len
    return tokens * config.model.hidden_size * bytes_per_element(config)


def exchange_bytes(config: Config) -> tuple[int, int]:
    """What one all-to-all of a microbatch sends from a rank to others: K hidden states per token. Towards experts, and back.

    Of equally loaded experts a share of (ep - 1) / ep is on other ranks. The ``deepep`` dispatcher sends less: a token goes
    once to a rank, however many of its experts are there. With ``precision.fp8_dispatch`` rows towards experts are padded to
    whole tiles, each of 128 values and the exponent of their scale, a byte each.
    """
    rows = config.train.micro_batch_size * config.train.seq_len * config.model.num_experts_per_tok
    hidden, ep = config.model.hidden_size, config.parallel.ep
    back = hidden * bytes_per_element(config)
    towards = -(-hidden // TILE) * (TILE + 1) if config.precision.fp8_dispatch else back
    return rows * towards * (ep - 1) // ep, rows * back * (ep - 1) // ep


def flops_per_token(config: Config) -> float:
    """Model FLOPs of forward and backward per trained token, the numerator of MFU.

    Three times the forward's matrix multiplications, attention counted causally (PaLM, arXiv 2204.02311, appendix B,
    with half of its attention term). Recomputation is no part of it. DeepSeek-V3 at T=4096: 250.4e9 with D=0, 260.6e9 with D=1.
    """
    # The lookup stands in the sizes only to keep its stage's time above zero.
    return sum(3 * (size.weight_flops + size.core_flops + size.loss_flops) for size in _unit_sizes(config)[1:])


def num_parameters(config: Config) -> int:
    """Parameters of the whole model, MTP modules included, shared ones counted once."""
    return sum(unit_parameters(config))


def unit_parameters(config: Config) -> tuple[int, ...]:
    """Parameters of each unit of :func:`list_units` in the whole model, all ranks' experts included."""
    return tuple(size.params for size in _unit_sizes(config))


def _unit_sizes(config: Config, recompute: Recompute = KEEP_ALL) -> list[BlockSize]:
    """Size of each unit of :func:`list_units`."""
    halves = [
        half
        for layer in range(config.model.num_layers)
        for half in (sizes.attention_half(config, recompute), sizes.feed_forward_half(config, layer, recompute))
    ]
    return [sizes.embedding(config), *halves, sizes.head(config, recompute)]
