"""The token embedding, with its gradient summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mtp.model.norm import at_least_fp32


class Embedding(nn.Embedding):
    """Looks rows up. A frequent token's gradient is the sum of hundreds of rows, which bf16 would stop following."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [...] -> [..., D]."""
        result: Tensor = _Embedding.apply(ids, self.weight)
        return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight  # the Parameter itself: it carries main_grad
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (ids,) = ctx.saved_tensors
        weight, rows = ctx.weight, at_least_fp32(grads[0]).flatten(0, -2)
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if not weight.requires_grad:
            return None, None
        if main_grad is None:
            dense = torch.ops.aten.embedding_dense_backward(rows, ids.flatten(), len(weight), -1, False)
            return None, dense.to(weight.dtype)
        # Into the accumulator itself, which spares a second one, and in an order that does not change from run to run: of
        # these two the first is sorted on GPUs, the second a loop on CPUs; each the other way round is not.
        if main_grad.is_cuda:
            main_grad.index_put_((ids.flatten(),), rows, accumulate=True)
        else:
            main_grad.index_add_(0, ids.flatten(), rows)
        return None, None
