"""A transformer layer as two halves, which are separate pipeline units, and the MTP module built from one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext, LatentAttention
from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.model.moe import MoE
from dist_mtp.model.norm import RMSNorm
from dist_mtp.precision.linear import Linear


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; a rank may hold either half alone."""

    def __init__(self, config: Config, *, is_moe: bool, attention: bool = True, feed_forward: bool = True) -> None:
        super().__init__()
        model = config.model
        if attention:
            self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
            self.self_attn = LatentAttention(model)
        if feed_forward:
            self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
            self.mlp = MoE(config) if is_moe else FeedForward(model.hidden_size, model.intermediate_size)

    def attention_half(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)

    def feed_forward_half(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class MtpModule(DecoderLayer):
    """One depth of Multi-Token Prediction (arXiv 2412.19437, equations 21 and 22).

    Concatenation order and norms follow the released weights and their servers: ``[enorm(embedding), hnorm(hidden)]``,
    and the next depth reads the hidden state after ``shared_head.norm``.
    """

    def __init__(self, config: Config, *, is_moe: bool) -> None:
        super().__init__(config, is_moe=is_moe)
        model = config.model
        self.enorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.hnorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.eh_proj = Linear(2 * model.hidden_size, model.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(model.hidden_size, model.rms_norm_eps)})

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Combine the previous depth's hidden state at i with the embedding of token i+depth.

        Returns:
            [B, T, D], normed: input of the output head and of the next depth.
        """
        x = self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1))
        normed: Tensor = self.shared_head["norm"](self.feed_forward_half(self.attention_half(x, context)))
        return normed
