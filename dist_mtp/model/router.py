"""Choice of experts: scores, group limit, balancing bias and auxiliary losses (arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.dispatch import Routing
from dist_mtp.model.norm import at_least_fp32
from dist_mtp.precision.weight_grads import hand_over


class Router(nn.Module):
    """Chooses K experts per token, scores in fp32.

    ``e_score_correction_bias`` steers the choice but not the weights; it is moved once per optimizer step by the sign of
    the load error (arXiv 2408.15664).

    What a step leaves behind is counted in the backward, which happens once per microbatch however often its forward is
    recomputed, and not in evaluation: ``load``, the slots that each expert got since the last optimizer step, and
    ``aux_means``, the unweighted auxiliary losses in the order of ``MoeConfig.aux_loss_coeffs``. ``load_share`` is the previous step's load over its mean.
    """

    e_score_correction_bias: Tensor
    load: Tensor
    load_share: Tensor
    aux_means: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.num_micro_batches = config.model, config.train.micro_batches
        experts = config.model.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.model.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("load_share", torch.ones(experts), persistent=False)
        self.register_buffer(
            "aux_means", torch.zeros(len(config.moe.aux_loss_coeffs), dtype=torch.float64), persistent=False
        )
        self.aux_coeffs = config.moe.aux_loss_coeffs

    def forward(self, x_BTD: Tensor) -> Routing:
        """Route B * T tokens; the result counts them as one dimension."""
        settings = self.settings
        logits_BTE: Tensor = _WideLinear.apply(x_BTD, self.weight)
        scores_BTE = logits_BTE.sigmoid() if settings.scoring_func == "sigmoid" else logits_BTE.softmax(dim=-1)
        scores_TE = scores_BTE.flatten(0, 1)
        with torch.no_grad():
            choice_TE = self._limit_to_groups(scores_TE + self.e_score_correction_bias)
            ids_TK = choice_TE.topk(settings.num_experts_per_tok, dim=-1, sorted=False).indices
            # scatter_add_ rather than bincount, which makes the host wait for the device.
            slots = ids_TK.flatten()
            counts_E = torch.zeros_like(self.load).scatter_add_(0, slots, torch.ones_like(slots))
        weights_TK = scores_TE.gather(1, ids_TK)
        if settings.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * settings.routed_scaling_factor
        if self.training:
            weights_TK = count_in_backward(weights_TK, self.load, counts_E)
            if any(self.aux_coeffs.values()):
                weights_TK = self._add_auxiliary_losses(weights_TK, logits_BTE, scores_BTE)
        return Routing(ids_TK, weights_TK, counts_E)

    def _limit_to_groups(self, choice_TE: Tensor) -> Tensor:
        """Shut out experts beyond the best groups; a group's score is that of its best expert or its two best."""
        settings = self.settings
        if settings.topk_group == settings.n_group:
            return choice_TE
        grouped_TGe = choice_TE.unflatten(-1, (settings.n_group, -1))
        best = 2 if settings.group_score == "top2_sum" else 1
        group_scores_TG = grouped_TGe.topk(best, dim=-1).values.sum(dim=-1)
        best_groups = group_scores_TG.topk(settings.topk_group, dim=-1, sorted=False).indices
        shut_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_groups, False)
        return grouped_TGe.masked_fill(shut_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def _add_auxiliary_losses(self, weights_TK: Tensor, logits_BTE: Tensor, scores_BTE: Tensor) -> Tensor:
        """Give the routed weights the auxiliary losses' gradients.

        Each loss is a mean over the rows (or positions) of the global batch; a microbatch adds its share. The engine
        averages gradients over the data replicas, so that share is one in the M microbatches of its own replica.
        """
        means, total = torch.zeros_like(self.aux_means), logits_BTE.new_zeros(())
        for index, (name, coeff) in enumerate(self.aux_coeffs.items()):
            if coeff:
                loss = self._auxiliary_loss(name, logits_BTE, scores_BTE) / self.num_micro_batches
                means[index] = loss.detach()
                total = total + coeff * loss
        result: Tensor = _AddLoss.apply(count_in_backward(weights_TK, self.aux_means, means), total)
        return result

    def _auxiliary_loss(self, name: str, logits_BTE: Tensor, scores_BTE: Tensor) -> Tensor:
        """Unweighted mean over this microbatch; the balance losses are 1 in balance.

        The sequence-wise loss is equations 17 to 20 of the report: the K best by the scores alone, without bias and group
        limit. The global loss takes the loads of the step before, as those of this step are only known at its end.
        """
        if name == "z":
            return logits_BTE.logsumexp(dim=-1).square().mean()
        # P_i of each row: mean of the scores, normalised per token (softmax scores are already).
        shares_BE = (scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)).mean(dim=1)
        if name == "global_aux":
            return (self.load_share * shares_BE).sum(dim=-1).mean()
        num_experts, top_k = scores_BTE.shape[-1], self.settings.num_experts_per_tok
        with torch.no_grad():
            best = scores_BTE.topk(top_k, dim=-1, sorted=False).indices
            chosen_BE = torch.zeros_like(scores_BTE).scatter_(-1, best, 1.0).mean(dim=1)
            frequencies_BE = chosen_BE * (num_experts / top_k)
        return (frequencies_BE * shares_BE).sum(dim=-1).mean()


class _WideLinear(torch.autograd.Function):
    """``x @ weight^T`` in fp32 from inputs that may be narrower, and are kept as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the Parameter itself: it carries main_grad
        return F.linear(at_least_fp32(x), at_least_fp32(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad_x = (grads[0] @ at_least_fp32(weight)).to(x.dtype)
        grad_weight = grads[0].flatten(0, -2).t() @ at_least_fp32(x).flatten(0, -2)
        return grad_x, hand_over(weight, grad_weight)


def count_in_backward(x: Tensor, total: Tensor, amount: Tensor) -> Tensor:
    """``x``; when its gradient is computed, ``amount`` is added to the buffer ``total``."""
    result: Tensor = _CountInBackward.apply(x, total, amount)
    return result


class _CountInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, amount: Tensor) -> Tensor:
        ctx.total, ctx.amount = total, amount
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.total.add_(ctx.amount)
        return grads[0], None, None


class _AddLoss(torch.autograd.Function):
    """``x``, with a loss added to the objective wherever the pipeline has cut it: its gradient starts here, from 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)
