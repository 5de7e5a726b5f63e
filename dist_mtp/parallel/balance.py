"""Auxiliary-loss-free load balancing (arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_mtp.config import ModelConfig
from dist_mtp.model.naming import routers
from dist_mtp.parallel.mesh import Mesh


@dataclass(frozen=True)
class Balance:
    """What this rank's routers saw in a step; zeros where a rank has none.

    ``max_violation``: largest expert load over the mean load, minus 1, over the layers. ``bias_square_sum``: squared L2
    norm of all biases after the move.
    """

    max_violation: float
    bias_square_sum: float


@torch.no_grad()
def move_router_biases(model: nn.Module, settings: ModelConfig, mesh: Mesh) -> Balance:
    """Move every router's bias by ``router_bias_update_speed`` towards balance, and start counting anew.

    Once per optimizer step, from the loads of all microbatches and data replicas: overloaded experts go down, the others
    up. Collective over the data replicas.
    """
    gates = [router for _, router in routers(model)]
    if not gates:
        return Balance(0.0, 0.0)
    load_LE = torch.stack([gate.load for gate in gates])
    dist.all_reduce(load_LE, group=mesh.data_group)
    load_LE = load_LE.float()
    mean_L1 = load_LE.mean(dim=1, keepdim=True)
    biases = []
    for gate, error_E in zip(gates, mean_L1 - load_LE, strict=True):
        bias = gate.e_score_correction_bias
        bias += settings.router_bias_update_speed * error_E.sign()
        gate.load.zero_()
        biases.append(bias)
    violation = (load_LE / mean_L1).max() - 1
    return Balance(float(violation), float(torch.stack(biases).double().square().sum()))
