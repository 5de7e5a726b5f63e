"""Small models and microbatches that the tests of this folder share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dist_mtp.config import Config, ModelConfig, MtpConfig, RopeScalingConfig, TrainConfig
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.init import initialize
from dist_mtp.model.loss import linear_cross_entropy
from dist_mtp.model.naming import logical_tensors, routers
from dist_mtp.model.targets import count_targets, loss_coefficients, shifted_targets
from dist_mtp.model.transformer import EMBED, HEAD, LanguageModel, MicroBatch
from dist_mtp.recompute import KEEP_ALL, Recompute

SIZES = ModelConfig(
    name="test",
    vocab_size=61,
    hidden_size=32,
    num_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=12,
    intermediate_size=48,
    first_k_dense_replace=1,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
)
YARN = RopeScalingConfig(factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.9)


def config_of(depth: int = 1, seq_len: int = 12, mtp: dict[str, Any] | None = None, **model: Any) -> Config:
    """A configuration like ``SIZES`` with the given differences."""
    return Config(
        model=dataclasses.replace(SIZES, **model),
        mtp=MtpConfig(depth=depth, **(mtp or {})),
        train=TrainConfig(seq_len=seq_len, loss_chunk=7),
    )


def unit_names(config: Config) -> list[str]:
    halves = [f"layers.{i}.{half}" for i in range(config.model.num_layers) for half in ("attention", "feed_forward")]
    return [EMBED, *halves, HEAD]


def build(
    config: Config, seed: int = 1, units: list[str] | None = None, recompute: Recompute = KEEP_ALL
) -> LanguageModel:
    """A model of all units (or of ``units``) with initial weights."""
    model = LanguageModel(config, set(units or unit_names(config)), recompute=recompute)
    initialize(model, seed=seed, std=config.model.initializer_range)
    return model


@torch.no_grad()
def scramble(model: LanguageModel, seed: int = 2) -> None:
    """Norm weights other than one and router biases other than zero: equal ones hide swapped names."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for _, router in routers(model):
        router.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)


def random_ids(config: Config, rows: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, config.row_length), generator=generator)


def batch_of(config: Config, ids: Tensor, documents: Tensor | None = None, mtp_weight: float = 0.3) -> MicroBatch:
    """The only microbatch of its global batch; by default one document per row."""
    documents = torch.zeros_like(ids) if documents is None else documents
    seq_len, depth = config.train.seq_len, config.mtp.depth
    counts = count_targets(documents, seq_len, depth).tolist()
    coefficients = loss_coefficients(counts, config.mtp, mtp_weight, ids.shape[0] * seq_len)
    return MicroBatch(ids, documents, AttentionContext.of(documents[:, :seq_len], config.model), coefficients)


def trunk(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """Output of the last trunk layer, before the final norm."""
    hidden: Tensor | None = None
    for unit in unit_names(model.config)[:-1]:
        hidden = model.run_unit(unit, hidden, batch)
    assert hidden is not None
    return hidden


def position_losses(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """Negative log likelihood of every target, 0 where there is none: [D+1, B, T]."""
    config = model.config
    targets = shifted_targets(batch.input_ids, batch.document_ids, config.train.seq_len, config.mtp.depth)
    inputs = [x.flatten(0, 1) for x in model.head_inputs(trunk(model, batch), batch)]
    _, losses, _ = linear_cross_entropy(inputs, model.head_weight, targets.flatten(1), batch.coefficients, chunk=7)
    return losses.view_as(targets)


def gradients(model: LanguageModel, batch: MicroBatch) -> dict[str, Tensor]:
    """Gradient of the loss for every parameter that has one, by name."""
    model.zero_grad()
    loss, _ = model.run_head(trunk(model, batch), batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logical_parameters(model: LanguageModel) -> dict[str, Tensor]:
    """Every parameter under its Hugging Face names, expert by expert."""
    return {
        logical.name: logical.view(parameter.detach().reshape(-1))
        for name, parameter in model.named_parameters()
        for logical in logical_tensors(name, tuple(parameter.shape))
    }


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.detach().double()).abs().max())
