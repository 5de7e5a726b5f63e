"""A transformer layer as two halves, which are separate pipeline units, and the MTP module built from one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext, LatentAttention
from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.model.moe import Experts, MoE
from dist_mtp.model.norm import RMSNorm
from dist_mtp.precision.linear import Linear
from dist_mtp.precision.recomputation import recomputed
from dist_mtp.recompute import KEEP_ALL, Recompute


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; a rank may hold either half alone."""

    recompute: Recompute = KEEP_ALL

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
        with recomputed(self.recompute.norms, self.input_layernorm, x_BTD) as normed:
            return x_BTD + self.self_attn(normed, context)

    def feed_forward_half(self, x_BTD: Tensor) -> Tensor:
        with recomputed(self.recompute.norms, self.post_attention_layernorm, x_BTD) as normed:
            return x_BTD + self.mlp(normed)


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
        with recomputed(self.recompute.norms, self._joint, hidden_BTD, embedded_BTD) as joint:
            x = self.eh_proj(joint)
        normed: Tensor = self.shared_head["norm"](self.feed_forward_half(self.attention_half(x, context)))
        return normed

    def _joint(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1)


def attach_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Make every layer below ``model`` keep less. ``recompute.units`` is not for layers: it is up to who calls them."""
    for module in model.modules():
        if isinstance(module, DecoderLayer | LatentAttention | FeedForward | Experts):
            module.recompute = recompute
