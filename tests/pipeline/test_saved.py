"""What autograd keeps from forward to backward is what the planner counts."""

from __future__ import annotations

import pytest
import torch
from model.model_cases import config_of
from torch import Tensor, nn

from dist_mtp.model.feed_forward import FeedForward
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import MoE
from dist_mtp.pipeline.sizes import dense_half, moe_half

TOKENS, WIDTH = 256, 128
CONFIG = config_of(
    hidden_size=WIDTH,
    moe_intermediate_size=64,
    intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
)


def saved_bytes(layer: nn.Module) -> int:
    """Storage that a forward keeps, weights left out, for ``TOKENS`` tokens."""
    initialize(layer, seed=1, std=0.02)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_saved_activations(kind: str) -> None:
    """Within 5 %: indices and the fp32 of scores are a little more than counted. An intermediate that is kept without need,
    as ``silu(gate)`` would be, adds 10 % and more."""
    layer, size = (
        (FeedForward(WIDTH, 256), dense_half(CONFIG.model))
        if kind == "dense"
        else (MoE(CONFIG), moe_half(CONFIG.model))
    )
    planned = 2 * TOKENS * (size.saved_elements - WIDTH)  # the norm before the layer keeps its input, too
    found = saved_bytes(layer)
    assert planned <= found <= 1.05 * planned, f"{found} bytes are kept, {planned:.0f} planned"
