"""AdamW with moments in bf16 (DeepSeek-V3 report, arXiv 2412.19437, section 3.3.3): half of the memory of fp32 moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types of moments by the name in ``optim.moment_dtype``."""
_CHUNK = 2**24
"""Elements updated at a time: a partition may have hundreds of millions, and temporaries in fp32 must not be as many."""


def zero_state(parameter: Tensor, moment_dtype: torch.dtype) -> dict[str, Tensor]:
    """State of a parameter before the first update, under the names that ``torch.optim.AdamW`` uses, too."""
    moments = {
        kind: torch.zeros_like(parameter, dtype=moment_dtype, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")
    }
    return {"step": torch.tensor(0.0), **moments}


class AdamW(torch.optim.Optimizer):
    """The update of ``torch.optim.AdamW`` in fp32, operation by operation; only what is kept for the next step is rounded.

    A step uses its moments before they are rounded. Rounding to nearest undoes changes of a moment of up to 2^-9 to 2^-8 of
    itself, by its leading digits: ``dist_mtp.config_checks`` refuses betas with which no moment could decay.

    Args:
        params: contiguous fp32 parameters, or groups of them.
        moment_dtype: type of ``exp_avg`` and ``exp_avg_sq``.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        *,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moment_dtype = moment_dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(zero_state(parameter, self.moment_dtype))
                state["step"] += 1
                step = int(state["step"])
                flat = [t.view(-1) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
                for chunk in zip(*(t.split(_CHUNK) for t in flat), strict=True):
                    _update(*chunk, step=step, group=group)


def _update(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, group: dict[str, Any]
) -> None:
    """One AdamW update (arXiv 1711.05101, algorithm 2) of a chunk, in place; all tensors [n].

    Args:
        step: number of this update, 1-based.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m, v = (moment.to(parameter.dtype, copy=True) for moment in (exp_avg, exp_avg_sq))
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    parameter.mul_(1 - lr * group["weight_decay"])
    denominator = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    parameter.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
