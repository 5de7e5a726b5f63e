"""DeepSeekMoE (arXiv 2412.19437, section 2.1.2): group-limited routing with a balancing bias, routed and shared experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.config import ModelConfig
from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.model.norm import at_least_fp32
from dist_mtp.precision.grouped import grouped_linear
from dist_mtp.precision.weight_grads import DeferrableLayer


class Router(nn.Module):
    """Chooses K experts per token, scores in fp32.

    ``e_score_correction_bias`` steers the choice but not the weights; it is moved once per optimizer step by the sign of
    the load error (arXiv 2408.15664), from ``load``, the tokens that each expert got since the last step.
    """

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.settings = model
        self.weight = nn.Parameter(torch.empty(model.n_routed_experts, model.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(model.n_routed_experts))
        self.register_buffer("load", torch.zeros(model.n_routed_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> expert ids int64 [T, K] and their weights, fp32 [T, K]."""
        settings = self.settings
        logits_TE = F.linear(at_least_fp32(x_TD), at_least_fp32(self.weight))
        scores_TE = logits_TE.sigmoid() if settings.scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)
        with torch.no_grad():
            choice_TE = self._limit_to_groups(scores_TE + self.e_score_correction_bias)
            ids_TK = choice_TE.topk(settings.num_experts_per_tok, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if settings.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return ids_TK, weights_TK * settings.routed_scaling_factor

    def _limit_to_groups(self, choice_TE: Tensor) -> Tensor:
        """Shut out experts beyond the best groups; a group's score is the sum of its two best experts."""
        settings = self.settings
        if settings.topk_group == settings.n_group:
            return choice_TE
        grouped_TGe = choice_TE.unflatten(-1, (settings.n_group, -1))
        group_scores_TG = grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)
        best_groups = group_scores_TG.topk(settings.topk_group, dim=-1, sorted=False).indices
        shut_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_groups, False)
        return grouped_TGe.masked_fill(shut_TG.unsqueeze(-1), float("-inf")).flatten(1)

    @torch.no_grad()
    def count(self, ids_TK: Tensor) -> Tensor:
        """Tokens per expert, int64 [E]; added to ``load`` in training."""
        ids = ids_TK.flatten()
        # scatter_add_ rather than bincount, which makes the host wait for the device.
        counts_E = torch.zeros_like(self.load).scatter_add_(0, ids, torch.ones_like(ids))
        if self.training:
            self.load += counts_E
        return counts_E


class Experts(DeferrableLayer):
    """All routed experts of a layer, each a SwiGLU layer. Gate and up projections are one fused weight."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        num, width, inner = model.n_routed_experts, model.hidden_size, model.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num, width, inner))

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """x_ND: rows sorted by expert; ends_E: int32, end row of each expert. -> [N, D]."""
        gate, up = grouped_linear(x_ND, self.gate_up_proj, ends_E, self).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends_E, self)


class MoE(nn.Module):
    """Routed experts, weighted, plus the shared experts that every token visits."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(model)
        self.experts = Experts(model)
        self.has_shared = model.n_shared_experts > 0
        if self.has_shared:
            self.shared_experts = FeedForward(model.hidden_size, model.moe_intermediate_size * model.n_shared_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        ids_TK, weights_TK = self.gate(x_TD)
        ends_E = self.gate.count(ids_TK).cumsum(0).to(torch.int32)
        top_k = ids_TK.shape[1]
        # Slot t*K+k is token t's k-th expert; sorting slots by expert makes each expert's rows contiguous.
        order = ids_TK.flatten().argsort(stable=True)
        slots_TKD = x_TD[:, None].expand(-1, top_k, -1).reshape(-1, x_TD.shape[1])
        routed = self.experts(_permute(slots_TKD, order), ends_E)
        routed_TKD = _permute(routed, order.argsort()).unflatten(0, (-1, top_k))
        y_TD = (routed_TKD * weights_TK[..., None].to(routed.dtype)).sum(dim=1)
        if self.has_shared:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BTD)


def _permute(rows: Tensor, order: Tensor) -> Tensor:
    result: Tensor = _Permute.apply(rows, order)
    return result


class _Permute(torch.autograd.Function):
    """``rows[order]`` for a permutation; the backward gathers too, where autograd would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order.argsort()], None
