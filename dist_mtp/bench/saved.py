"""Bytes that autograd keeps from the forward to the backward, measured on layers of the configured sizes.

``dist_mtp.pipeline.saved`` has the formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.init import initialize
from dist_mtp.model.layer import DecoderLayer
from dist_mtp.precision.fp8.backend import Fp8Backend
from dist_mtp.precision.fp8.layer import attach_fp8

HALVES = ("attention", "dense feed-forward", "MoE feed-forward")
_SEED = 1


def saved_bytes(compute: Callable[[], Any], excluded: Iterable[Tensor]) -> int:
    """Size of the storages that functions called by ``compute`` keep, each counted once.

    Args:
        excluded: tensors whose storages do not count: parameters, and what exists anyway.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in storages.items() if address not in ignored)


def halves_of(config: Config) -> list[str]:
    """Those of :data:`HALVES` that the trunk has."""
    kinds = {config.model.is_moe_layer(layer) for layer in range(config.model.num_layers)}
    return [half for half, found in zip(HALVES, (True, False in kinds, True in kinds), strict=True) if found]


def half_saved_bytes(
    config: Config,
    half: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: Fp8Backend | None = None,
) -> float:
    """Of one token in one half of a layer, for a microbatch of the configured size. All experts are in the layer.

    Args:
        half: one of :data:`HALVES`.
        fp8: backend of all linear layers and experts; None for products in ``dtype``.
    """
    layer = DecoderLayer(config, is_moe=half == HALVES[2], attention=half == HALVES[0], feed_forward=half != HALVES[0])
    layer.to(device)
    initialize(layer, seed=_SEED, std=config.model.initializer_range)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    if fp8 is not None:
        attach_fp8(layer, fp8, power_of_two=config.precision.fp8_power_of_two_scales)
    rows, length = config.train.micro_batch_size, config.train.seq_len
    context = AttentionContext.of(torch.zeros(rows, length, dtype=torch.int64, device=device), config.model)
    generator = torch.Generator(device).manual_seed(_SEED)
    x = (
        torch.randn(rows, length, config.model.hidden_size, generator=generator, device=device)
        .to(dtype)
        .requires_grad_()
    )
    size = saved_bytes(
        lambda: layer.attention_half(x, context) if half == HALVES[0] else layer.feed_forward_half(x),
        [*layer.parameters(), context.mask, context.cos, context.sin],
    )
    return size / (rows * length)


def with_local_experts(config: Config, max_weights: float) -> Config:
    """The configuration with no more experts than one rank holds, and than ``max_weights`` allow, but enough for a token."""
    model = config.model
    of_one = 3 * model.hidden_size * model.moe_intermediate_size
    num = max(min(config.experts_per_rank, int(max_weights // of_one)), model.num_experts_per_tok)
    if num == model.n_routed_experts or model.n_routed_experts == 0:
        return config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, n_routed_experts=num, n_group=1, topk_group=1),
        parallel=dataclasses.replace(config.parallel, ep=1),
    )
