"""What makes DeepSpeed reduce, partition and clip expert weights as such, on every rank of the pipeline.

Import only after the accelerator is chosen: it imports deepspeed.
"""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from torch import nn

from dist_mtp.parallel.mesh import expert_group_name


class ExpertAnchor(MoE):
    """One inert expert weight, outside every forward, on every rank.

    DeepSpeed 0.19.8 handles experts only if the model has a ``deepspeed.moe.layer.MoE`` (``engine._configure_distributed_model``),
    and reduces the gradient norm of expert weights over the pipeline only on ranks that own some
    (``runtime.utils.get_norm_with_moe_layers``): a rank with dense layers alone would leave the others waiting forever. So every
    rank has the anchor, and its gradient is set to zero in every step, as one without any hangs in bf16.

    Our own layers stay free of DeepSpeed: their weights only get the marks of :func:`mark_expert`.
    """

    def __init__(self, ep: int, device: torch.device) -> None:
        nn.Module.__init__(self)  # not MoE's, which would build experts of its own
        self.num_experts, self.num_local_experts, self.ep_size = ep, 1, ep
        self.expert_group_name = expert_group_name(ep)
        self.weight = nn.Parameter(torch.zeros(1, device=device))
        mark_expert(self.weight, ep)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already: :func:`dist_mtp.parallel.mesh.make_mesh` made them on all ranks."""


def mark_expert(weight: nn.Parameter, ep: int) -> None:
    """Reduce this weight's gradient over the ranks with the same experts only (``deepspeed.moe.utils.is_moe_param``)."""
    weight.allreduce = False  # type: ignore[attr-defined]
    weight.group_name = expert_group_name(ep)  # type: ignore[attr-defined]
