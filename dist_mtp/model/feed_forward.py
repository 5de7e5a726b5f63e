"""SwiGLU feed-forward layer (arXiv 2002.05202): dense layers and shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from dist_mtp.precision.fp8.linear import fp8_swiglu_linear
from dist_mtp.precision.linear import Linear, project
from dist_mtp.precision.recomputation import recomputed
from dist_mtp.precision.swiglu import swiglu
from dist_mtp.recompute import KEEP_ALL, Recompute


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    recompute: Recompute = KEEP_ALL

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if self.down_proj.fp8 is not None:
            return fp8_swiglu_linear((gate, up), self.down_proj.weight, self.down_proj)
        with recomputed(self.recompute.swiglu, swiglu, gate, up) as product:
            output: Tensor = self.down_proj(product)
        return output
