"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) inside document boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.config import ModelConfig
from dist_mtp.model.norm import RMSNorm
from dist_mtp.model.rope import attention_scale, rope_tables, rotate
from dist_mtp.precision.linear import Linear, project
from dist_mtp.precision.recomputation import recomputed
from dist_mtp.recompute import KEEP_ALL, Recompute

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on compressed queries and keys; fixed in the reference implementation, whatever rms_norm_eps is."""


@dataclass(frozen=True)
class AttentionContext:
    """What every attention layer of a microbatch shares.

    ``mask``: bool [B, 1, T, T], true where position i may read position j. ``cos``, ``sin``: [T, R / 2].
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(document_ids: Tensor, model: ModelConfig) -> AttentionContext:
        """document_ids: int64 [B, T]. A position reads itself and earlier positions of its own document."""
        length = document_ids.shape[1]
        same_document = document_ids[:, :, None] == document_ids[:, None, :]
        earlier = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
        cos, sin = rope_tables(model, length, document_ids.device)
        return AttentionContext((same_document & earlier)[:, None], cos, sin)


class LatentAttention(nn.Module):
    """Queries and keys/values are compressed to low rank; a small rotary part carries positions."""

    recompute: Recompute = KEEP_ALL

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_attention_heads
        self.nope, self.rope, self.value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.latent = model.kv_lora_rank
        self.scale = attention_scale(model)
        width, query_width = model.hidden_size, self.num_heads * (self.nope + self.rope)
        self.compresses_queries = model.q_lora_rank is not None
        if model.q_lora_rank is not None:
            self.q_a_proj = Linear(width, model.q_lora_rank)
            self.q_a_layernorm = RMSNorm(model.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(model.q_lora_rank, query_width)
        else:
            self.q_proj = Linear(width, query_width)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.num_heads * (self.nope + self.value))
        self.o_proj = Linear(self.num_heads * self.value, width)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        queries_from = self.q_a_proj if self.compresses_queries else self.q_proj
        q, compressed = project(x_BTD, queries_from, self.kv_a_proj_with_mqa)
        again = self.recompute.mla_up
        with (
            # Queries that come straight from x have no latent, and cost as much to keep as what they are made of.
            recomputed(again and self.compresses_queries, self._queries, q, context) as query,
            recomputed(again, self._keys_and_values, compressed, context) as (key, value),
        ):
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=context.mask, scale=self.scale)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _queries(self, q: Tensor, context: AttentionContext) -> Tensor:
        """From q_a_proj's (or q_proj's) output to [B, H, T, N + R]."""
        if self.compresses_queries:
            with recomputed(self.recompute.norms, self.q_a_layernorm, q) as normed:
                q = self.q_b_proj(normed)
        q_nope, q_rope = self._heads(q).split((self.nope, self.rope), dim=-1)  # [B, H, T, N], [B, H, T, R]
        return torch.cat((q_nope, rotate(q_rope, context.cos, context.sin)), dim=-1)

    def _keys_and_values(self, compressed: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """From kv_a_proj_with_mqa's output to [B, H, T, N + R] and [B, H, T, value width]."""
        latent, k_rope = compressed.split((self.latent, self.rope), dim=-1)
        with recomputed(self.recompute.norms, self.kv_a_layernorm, latent) as normed:
            k_nope, value = self._heads(self.kv_b_proj(normed)).split((self.nope, self.value), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), context.cos, context.sin)  # one rotary key for all heads: [B, 1, T, R]
        return torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H * width] -> [B, H, T, width]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
