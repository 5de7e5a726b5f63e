"""DeepSeekMoE (arXiv 2412.19437, section 2.1.2): a router, routed experts and shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.dispatch import Dispatcher, LocalDispatcher
from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.model.router import Router, count_in_backward
from dist_mtp.precision.fp8.linear import fp8_linear, fp8_swiglu_linear
from dist_mtp.precision.fp8.tiles import RowTiles
from dist_mtp.precision.grouped import grouped_linear
from dist_mtp.precision.recomputation import recomputed
from dist_mtp.precision.swiglu import fused_swiglu
from dist_mtp.precision.weight_grads import DeferrableLayer
from dist_mtp.recompute import KEEP_ALL, Recompute


class Experts(DeferrableLayer):
    """The routed experts of a layer that this rank holds, each a SwiGLU layer; gate and up projections are one fused weight.

    ``processed`` counts the rows that each expert has computed in training, once per backward; the router's ``load`` says
    how many were sent.
    """

    processed: Tensor
    recompute: Recompute = KEEP_ALL

    def __init__(self, config: Config) -> None:
        super().__init__()
        num, width, inner = config.experts_per_rank, config.model.hidden_size, config.model.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num, width, inner))
        self.register_buffer("processed", torch.zeros(num, dtype=torch.int64), persistent=False)

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """x_ND: rows sorted by expert; ends_E: int32, end row of each local expert. -> [N, D]."""
        if self.fp8 is not None:
            tiles = RowTiles.of(ends_E, len(x_ND))
            gate_up = fp8_linear(x_ND, self.gate_up_proj, self, tiles)
            y_ND = fp8_swiglu_linear((gate_up,), self.down_proj, self, tiles)
        else:
            gate_up = grouped_linear(x_ND, self.gate_up_proj, ends_E, self)
            with recomputed(self.recompute.swiglu, fused_swiglu, gate_up) as product:
                y_ND = grouped_linear(product, self.down_proj, ends_E, self)
        if self.training:
            y_ND = count_in_backward(y_ND, self.processed, ends_E.diff(prepend=ends_E.new_zeros(1)))
        return y_ND


class MoE(nn.Module):
    """Routed experts, weighted, plus the shared experts that every token visits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.gate = Router(config)
        self.experts = Experts(config)
        self.has_shared = model.n_shared_experts > 0
        if self.has_shared:
            self.shared_experts = FeedForward(model.hidden_size, model.moe_intermediate_size * model.n_shared_experts)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        dispatch = self.dispatcher.dispatch(x_TD, self.gate(x_BTD))
        shared_TD = self.shared_experts(x_TD) if self.has_shared else None  # while tokens travel
        y_TD = dispatch.combine(self.experts(*dispatch.receive()))
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD)


def attach_dispatcher(model: nn.Module, dispatcher: Dispatcher) -> None:
    """Make every MoE layer below ``model`` send its tokens through ``dispatcher``."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = dispatcher
