"""Loads of the experts over a step, and auxiliary-loss-free balancing (arXiv 2408.15664; DeepSeek-V3 report, 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.moe import MoE
from dist_mtp.model.router import AUX_LOSSES
from dist_mtp.parallel.mesh import Mesh


@dataclass(frozen=True)
class ExpertLoads:
    """One step's loads over the whole global batch; the same on all ranks.

    ``load_LE``: float64 [layers, E], slots that each expert got. ``layers``: their layers' indices, MTP modules after the
    trunk. ``aux_losses``: unweighted auxiliary losses by name, the mean over the layers.
    """

    layers: tuple[int, ...]
    load_LE: Tensor
    aux_losses: dict[str, float]

    def violations(self) -> dict[int, float]:
        """Largest load over the mean load, minus 1, by layer: 0 in balance, E/K - 1 if all tokens choose the same K."""
        worst_L = self.load_LE.max(dim=1).values / self.load_LE.mean(dim=1).clamp_min(1) - 1
        return dict(zip(self.layers, worst_L.tolist(), strict=True))


@torch.no_grad()
def gather_loads(model: nn.Module, config: Config, mesh: Mesh) -> ExpertLoads:
    """Sum what routers and experts have counted over all microbatches and ranks, and let them count anew. Collective.

    Raises:
        RuntimeError: on all ranks, some experts computed another number of rows than tokens were sent to them.
    """
    layers, experts = config.moe_layers, config.model.n_routed_experts
    # Counts in float64 are exact, so that one collective carries everything: sent, processed, auxiliary losses.
    counted = torch.zeros(len(layers), 2 * experts + len(AUX_LOSSES), dtype=torch.float64, device=mesh.device)
    held = slice(mesh.expert_rank * config.experts_per_rank, (mesh.expert_rank + 1) * config.experts_per_rank)
    for layer, moe in _moe_layers(model):
        sent, processed, aux = counted[layers.index(layer)].split((experts, experts, len(AUX_LOSSES)))
        sent.copy_(moe.gate.load)
        processed[held] = moe.experts.processed.double()
        aux.copy_(moe.gate.aux_means / mesh.dp)
        for counter in (moe.gate.load, moe.experts.processed, moe.gate.aux_means):
            counter.zero_()
    dist.all_reduce(counted)
    sent_LE, processed_LE, aux_LA = counted.split((experts, experts, len(AUX_LOSSES)), dim=1)
    if not torch.equal(sent_LE, processed_LE):
        row = int((sent_LE != processed_LE).any(dim=1).nonzero()[0])
        raise RuntimeError(
            f"layer {layers[row]}: {sent_LE[row].sum():.0f} rows were sent to experts, which computed "
            f"{processed_LE[row].sum():.0f}: a dispatcher lost or doubled tokens"
        )
    return ExpertLoads(layers, sent_LE, dict(zip(AUX_LOSSES, aux_LA.mean(dim=0).tolist(), strict=True)))


@torch.no_grad()
def move_router_biases(model: nn.Module, loads: ExpertLoads, speed: float) -> float:
    """Move every router's bias by ``speed`` (gamma) towards balance: overloaded experts go down, the others up.

    Once per optimizer step, from the loads of the global batch.

    Returns:
        The squared L2 norm of this rank's biases after the move.
    """
    square_sum = 0.0
    for layer, moe in _moe_layers(model):
        load_E = loads.load_LE[loads.layers.index(layer)]
        mean = load_E.mean()
        bias = moe.gate.e_score_correction_bias
        bias += speed * (mean - load_E).sign().to(bias.dtype)
        moe.gate.load_share.copy_(load_E / mean)
        square_sum += float(bias.double().square().sum())
    return square_sum


def _moe_layers(model: nn.Module) -> list[tuple[int, MoE]]:
    """This rank's MoE layers with their indices: the number in ``model.layers.3.mlp``."""
    return [(int(name.split(".")[-2]), module) for name, module in model.named_modules() if isinstance(module, MoE)]
