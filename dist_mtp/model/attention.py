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
        if self.compresses_queries:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_rope = self._heads(q).split((self.nope, self.rope), dim=-1)  # [B, H, T, N], [B, H, T, R]
        latent, k_rope = compressed.split((self.latent, self.rope), dim=-1)
        k_nope, value = self._heads(self.kv_b_proj(self.kv_a_layernorm(latent))).split((self.nope, self.value), dim=-1)
        q_rope = rotate(q_rope, context.cos, context.sin)
        k_rope = rotate(k_rope.unsqueeze(1), context.cos, context.sin)  # one rotary key for all heads: [B, 1, T, R]
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=context.mask, scale=self.scale)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H * width] -> [B, H, T, width]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
