"""Cross-entropy of D+1 output heads without their logits.

One head's fp32 logits over DeepSeek-V3's vocabulary take 2.1 GB for a row of 4096 tokens, and MTP multiplies that by
D+1. Here all heads walk over the positions together in chunks, one chunk's logits existing at a time, and the gradients
are taken while they exist: three matrix products in the forward and none in the backward, the least possible. They add
into a single weight gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_mtp.model.norm import at_least_fp32
from dist_mtp.precision.weight_grads import accumulate

IGNORE = -100
"""Target id of a position without a target."""


@dataclass(frozen=True)
class HeadStats:
    """Detached results of D+1 heads on one microbatch; index 0 is the main head, k is MTP depth k.

    ``loss_sums``: float64 [D+1], summed negative log likelihoods (nats) over valid targets. ``counts``: int64 [D+1],
    valid targets. ``agreements``: int64 [D+1], targets for which depth k's argmax equals the main head's argmax k
    positions later (0 at index 0).  ``comparable``: int64 [D+1], targets for which that comparison exists.
    """

    loss_sums: Tensor
    counts: Tensor
    agreements: Tensor
    comparable: Tensor


def linear_cross_entropy(
    hiddens: list[Tensor],
    weight: Tensor,
    targets: Tensor,
    coefficients: list[float],
    *,
    chunk: int,
    accumulate_in_forward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_d coefficients[d] * sum_n cross_entropy(hiddens[d] @ weight^T, targets[d])``.

    Args:
        hiddens: D+1 tensors [N, D], inputs of the heads.
        weight: [V, D], the shared output head.
        targets: int64 [D+1, N], ``IGNORE`` where there is none.
        coefficients: one factor per head: its loss weight over the number of targets that the loss is averaged over.
        chunk: positions whose logits exist at a time.
        accumulate_in_forward: add the weight gradient to the parameter during the forward instead of holding one
            [V, D] tensor per microbatch in flight. Only right when the backward starts from this loss with gradient 1.

    Returns:
        The scalar loss; negative log likelihoods [D+1, N] (0 where ignored); argmax ids int64 [D+1, N].
    """
    result: tuple[Tensor, Tensor, Tensor] = _LinearCrossEntropy.apply(
        weight, targets, tuple(coefficients), chunk, accumulate_in_forward, torch.is_grad_enabled(), *hiddens
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        targets: Tensor,
        coefficients: tuple[float, ...],
        chunk: int,
        accumulate_in_forward: bool,
        grad_enabled: bool,
        *hiddens: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        losses = torch.zeros(targets.shape, dtype=wide, device=weight.device)
        argmaxes = torch.empty_like(targets)
        # An evaluation's no_grad shows neither in needs_input_grad nor here, where gradients are always off.
        needs_grad = grad_enabled and any(ctx.needs_input_grad)
        hidden_grads = [torch.empty_like(h) for h in hiddens] if needs_grad else []
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_grad and not accumulate_in_forward else None
        for start in range(0, targets.shape[1], chunk):
            span = slice(start, start + chunk)
            for head, hidden in enumerate(hiddens):
                # One product per head, not one over all heads: a head with coefficient 0 then adds exact zeros, and the
                # trunk's gradients keep the bits of a run without that head.
                dlogits, losses[head, span], argmaxes[head, span] = _cross_entropy_chunk(
                    hidden[span] @ weight.t(), targets[head, span], coefficients[head], needs_grad
                )
                if dlogits is None:
                    continue
                dlogits = dlogits.to(weight.dtype)
                hidden_grads[head][span] = dlogits @ weight
                if weight_grad is None:
                    accumulate(weight, dlogits.t() @ hidden[span])
                else:
                    weight_grad += dlogits.t() @ hidden[span]
                del dlogits  # else it lives on while the next logits are made
        loss = sum(c * losses[head].sum() for head, c in enumerate(coefficients))
        ctx.weight_grad, ctx.weight_dtype = weight_grad, weight.dtype
        ctx.save_for_backward(*hidden_grads)
        ctx.mark_non_differentiable(losses, argmaxes)
        assert isinstance(loss, Tensor)
        return loss, losses, argmaxes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        weight_grad = None if ctx.weight_grad is None else (ctx.weight_grad * grad_loss).to(ctx.weight_dtype)
        ctx.weight_grad = None
        return weight_grad, None, None, None, None, None, *(g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)


def _cross_entropy_chunk(
    logits: Tensor, targets: Tensor, coefficient: float, needs_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradient of the logits (scaled), losses and argmax of one head on one chunk; logits: [n, V], targets: [n]."""
    logits = at_least_fp32(logits)
    valid = targets != IGNORE
    index = targets.clamp_min(0).unsqueeze(1)
    argmax = logits.argmax(dim=1)
    log_sum = logits.logsumexp(dim=1)
    losses = torch.where(valid, log_sum - logits.gather(1, index).squeeze(1), 0.0)
    if not needs_grad:
        return None, losses, argmax
    dlogits = logits.sub_(log_sum.unsqueeze(1)).exp_()
    dlogits.scatter_add_(1, index, torch.full_like(index, -1, dtype=dlogits.dtype))
    return dlogits.mul_((valid.to(dlogits.dtype) * coefficient).unsqueeze(1)), losses, argmax


def head_stats(losses: Tensor, argmaxes: Tensor, targets: Tensor) -> HeadStats:
    """Sums and counts per head.

    Args:
        losses, argmaxes, targets: [D+1, B, T].
    """
    valid = targets != IGNORE
    zero = valid.new_zeros((), dtype=torch.int64)
    agreements, comparable = [zero], [zero]
    for depth in range(1, targets.shape[0]):
        # Depth k at position i and the main head at position i+k predict the same token.
        both = valid[depth, :, :-depth]
        agreements.append((both & (argmaxes[depth, :, :-depth] == argmaxes[0, :, depth:])).sum())
        comparable.append(both.sum())
    return HeadStats(
        losses.double().sum(dim=(1, 2)), valid.sum(dim=(1, 2)), torch.stack(agreements), torch.stack(comparable)
    )
