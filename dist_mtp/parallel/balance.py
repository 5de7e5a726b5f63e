"""Loads of the experts over a step, and auxiliary-loss-free balancing (arXiv 2408.15664; DeepSeek-V3 report, 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.moe import MoE
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.mesh import Mesh


@dataclass(frozen=True)
class ExpertLoads:
    """One step's loads over the whole global batch; the same on all ranks.

    ``load_LE``: float64 [layers, E], rows that each expert was sent. ``layers``: their layers' indices, MTP modules after the
    trunk. ``dropped_share``: rows that experts did not compute. ``aux_losses``: unweighted auxiliary losses by name, the mean
    over the layers.
    """

    layers: tuple[int, ...]
    load_LE: Tensor
    dropped_share: float
    aux_losses: dict[str, float]

    def violations(self) -> dict[int, float]:
        """Largest load over the mean load, minus 1, by layer: 0 in balance, E/K - 1 if all tokens choose the same K."""
        worst_L = self.load_LE.max(dim=1).values / self.load_LE.mean(dim=1).clamp_min(1) - 1
        return dict(zip(self.layers, worst_L.tolist(), strict=True))


@torch.no_grad()
def gather_loads(model: LanguageModel, config: Config, mesh: Mesh) -> ExpertLoads:
    """Sum what routers and experts have counted over all microbatches and ranks, and let them count anew. Collective.

    Raises:
        RuntimeError: on all ranks, an expert computed another number of rows than it was sent.
    """
    layers, experts, names = config.moe_layers, config.model.n_routed_experts, list(config.moe.aux_loss_coeffs)
    # Counts in float64 are exact, so that one collective carries everything: sent, processed, auxiliary losses.
    parts = (experts, experts, len(names))
    counted = torch.zeros(len(layers), sum(parts), dtype=torch.float64, device=mesh.device)
    held = slice(model.first_expert, model.first_expert + config.experts_per_rank)
    for layer, moe in _moe_layers(model):
        sent, processed, aux = counted[layers.index(layer)].split(parts)
        sent.copy_(moe.gate.load)
        processed[held] = moe.experts.processed.double()
        aux.copy_(moe.gate.aux_means / mesh.dp)
        for counter in (moe.gate.load, moe.experts.processed, moe.gate.aux_means):
            counter.zero_()
    dist.all_reduce(counted)
    sent_LE, processed_LE, aux_LA = counted.split(parts, dim=1)
    missing_LE = sent_LE - processed_LE
    # A module that several MTP depths share has run once for each.
    runs_L = sent_LE.sum(dim=1) / (config.tokens_per_step * config.model.num_experts_per_tok)
    aux_A = (aux_LA / runs_L[:, None]).mean(dim=0)
    lost, dropped, *aux_losses = torch.cat((missing_LE.abs().sum()[None], missing_LE.sum()[None], aux_A)).tolist()
    if lost:
        row, expert = missing_LE.nonzero()[0].tolist()
        raise RuntimeError(
            f"layer {layers[row]}: expert {expert} was sent {sent_LE[row, expert]:.0f} rows and computed "
            f"{processed_LE[row, expert]:.0f}: moe.dispatcher={config.moe.dispatcher} lost or doubled tokens"
        )
    return ExpertLoads(layers, sent_LE, dropped / float(sent_LE.sum()), dict(zip(names, aux_losses, strict=True)))


@torch.no_grad()
def move_router_biases(model: nn.Module, loads: ExpertLoads, speed: float) -> float:
    """Move every router's bias by ``speed`` (gamma) towards balance: overloaded experts go down, the others up.

    Once per optimizer step, from the loads of the global batch.

    Returns:
        The squared L2 norm of this rank's biases after the move.
    """
    square_sum = loads.load_LE.new_zeros(())
    for layer, moe in _moe_layers(model):
        load_E = loads.load_LE[loads.layers.index(layer)]
        mean = load_E.mean()
        bias = moe.gate.e_score_correction_bias
        bias += speed * (mean - load_E).sign().to(bias.dtype)
        moe.gate.load_share.copy_(load_E / mean)
        square_sum += bias.double().square().sum()
    return float(square_sum)


def _moe_layers(model: nn.Module) -> list[tuple[int, MoE]]:
    """This rank's MoE layers with their indices: the number in ``model.layers.3.mlp``."""
    return [(int(name.split(".")[-2]), module) for name, module in model.named_modules() if isinstance(module, MoE)]
