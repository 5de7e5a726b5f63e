"""``debug.dump_steps``: everything an independent computation needs to check a step, whatever the layout."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from dist_mtp.checkpoint.files import write_tensors
from dist_mtp.data.batch import Batch
from dist_mtp.model.naming import routers
from dist_mtp.parallel.engine import Engine
from dist_mtp.parallel.mesh import Mesh


class StepDump:
    """Collects one step and writes ``dumps/step_K.safetensors``.

    Keys: ``param/NAME`` before the step, ``grad/NAME`` (full, reduced, unclipped), ``bias/NAME`` of router biases before
    the step, ``batch/input_ids`` and ``batch/document_ids`` (int64 [rows, T+1+D], the whole global batch in order),
    ``loss/main`` and ``loss/mtp_K`` (float64 scalars). Experts appear one by one under their Hugging Face names.
    """

    def __init__(self, run_dir: Path, step: int, engine: Engine, mesh: Mesh) -> None:
        self._path = run_dir / "dumps" / f"step_{step}.safetensors"
        self._engine, self._mesh = engine, mesh
        self._tensors: dict[str, Tensor] = {}
        for name, parameter in engine.owned_parameters():
            self._add("param", name, parameter, getattr(parameter, "fp32_copy", parameter.detach()))
        for name, router in routers(engine.model):
            self._tensors[f"bias/{name}"] = router.e_score_correction_bias.detach().cpu().clone()

    def add_gradients(self) -> None:
        """Between reduction and update; collective over the data replicas."""
        for name, parameter in self._engine.owned_parameters():
            self._add("grad", name, parameter, self._engine.gradient(parameter))

    def write(self, batch: Batch, losses: list[float]) -> None:
        """Gather the ranks' parts on rank 0 through the run folder, and write the file. Collective.

        Args:
            batch: the global batch.
            losses: nats per target of the main head and of each MTP depth.
        """
        self._path.parent.mkdir(exist_ok=True)
        # Of ranks that share experts, all but the first have nothing to add to a pipeline rank without experts.
        if self._tensors and self._mesh.dp_rank < self._mesh.ep:
            write_tensors(self._part(self._mesh.pp_rank, self._mesh.expert_rank), self._tensors, {})
        dist.barrier()
        if self._mesh.rank == 0:
            merged = {"batch/input_ids": batch.input_ids, "batch/document_ids": batch.document_ids}
            for depth, loss in enumerate(losses):
                merged["loss/main" if depth == 0 else f"loss/mtp_{depth}"] = torch.tensor(loss, dtype=torch.float64)
            for part in itertools.starmap(self._part, itertools.product(range(self._mesh.pp), range(self._mesh.ep))):
                if not part.exists():
                    continue
                with safe_open(part, framework="pt") as tensors:
                    merged |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
                part.unlink()
            write_tensors(self._path, merged, {})
        dist.barrier()

    def _add(self, kind: str, name: str, parameter: nn.Parameter, values: Tensor) -> None:
        if self._mesh.expert_rank > 0 and ".experts." not in name:
            return  # the first of the ranks that share experts writes all that they have in common
        flat = values.reshape(-1)
        for logical in self._engine.logical_tensors(name, parameter):
            self._tensors[f"{kind}/{logical.name}"] = logical.view(flat).cpu().clone()

    def _part(self, pp_rank: int, expert_rank: int) -> Path:
        return self._path.with_suffix(f".part_{pp_rank}_{expert_rank}.safetensors")
