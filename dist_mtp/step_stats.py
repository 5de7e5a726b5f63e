"""From what single ranks saw in a step to metrics that all ranks agree on."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_mtp.config import MoeConfig
from dist_mtp.model.loss import HeadStats
from dist_mtp.parallel.balance import ExpertLoads
from dist_mtp.parallel.collectives import all_max, all_sum
from dist_mtp.parallel.mesh import Mesh

Metrics = dict[str, float]


@dataclass(frozen=True)
class HeadTotals:
    """Sums over the global batch, index 0 the main head, k MTP depth k; fields as in :class:`HeadStats`."""

    loss_sums: list[float]
    counts: list[float]
    agreements: list[float]
    comparable: list[float]

    def losses(self) -> list[float]:
        """Mean negative log likelihood per target of each head (nats)."""
        return [total / max(count, 1) for total, count in zip(self.loss_sums, self.counts, strict=True)]

    def metrics(self) -> Metrics:
        """``loss_main``, ``loss_mtp_K`` and ``accept_mtp_K``; one that nothing was counted for is left out."""
        result = {}
        for depth, (loss, count) in enumerate(zip(self.losses(), self.counts, strict=True)):
            if count:
                result["loss_main" if depth == 0 else f"loss_mtp_{depth}"] = loss
        for depth, comparable in enumerate(self.comparable):
            if comparable:
                result[f"accept_mtp_{depth}"] = self.agreements[depth] / comparable
        return result


def reduce_heads(
    stats: Sequence[HeadStats], num_heads: int, mesh: Mesh, extra: Sequence[float] = ()
) -> tuple[HeadTotals, list[float]]:
    """Sum the heads' statistics over microbatches and ranks; ranks without the last stage pass none. Collective.

    Args:
        extra: further numbers to sum over all ranks in the same message.
    """
    local = torch.zeros(4, num_heads, dtype=torch.float64, device=mesh.device)
    for one in stats:
        local += torch.stack([field.double() for field in (one.loss_sums, one.counts, one.agreements, one.comparable)])
    flat = all_sum([*local.flatten().tolist(), *extra], mesh.device)
    fields = [flat[i * num_heads : (i + 1) * num_heads] for i in range(4)]
    return HeadTotals(*fields), flat[4 * num_heads :]


def load_metrics(loads: ExpertLoads, moe: MoeConfig) -> Metrics:
    """``load_max_violation`` over all layers, ``load_violation_layer_K`` of each, and the auxiliary losses in use.

    ``dropped_share`` is that of all routed rows which experts did not compute: 0, as
    :func:`~dist_mtp.parallel.balance.gather_loads` raises otherwise.
    """
    violations = loads.violations()
    result = {"load_max_violation": max(violations.values()), "dropped_share": loads.dropped_share}
    result |= {f"load_violation_layer_{layer}": violation for layer, violation in violations.items()}
    return result | {f"loss_{name}": loads.aux_losses[name] for name, coeff in moe.aux_loss_coeffs.items() if coeff}


def reduce_health(waited_s: float | None, mesh: Mesh) -> Metrics:
    """Maxima: ``memory_gib`` and, unless it is None, ``all_to_all_wait_s`` over all ranks, ``memory_rank_K_gib`` over the
    data replicas of pipeline rank K. Collective."""
    own = _peak_memory_gib(mesh.device)
    by_rank = [own if rank == mesh.pp_rank else 0.0 for rank in range(mesh.pp)]
    waited, *by_rank = all_max([waited_s or 0.0, *by_rank], mesh.device)
    return {
        "memory_gib": max(by_rank),
        **{f"memory_rank_{rank}_gib": memory for rank, memory in enumerate(by_rank)},
        **({} if waited_s is None else {"all_to_all_wait_s": waited}),
    }


def _peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: the device's allocator on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
