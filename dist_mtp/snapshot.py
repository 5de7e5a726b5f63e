"""Training state to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_mtp.checkpoint.folder import committed
from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.load import CheckpointReader, find_latest
from dist_mtp.checkpoint.save import save
from dist_mtp.config import Config, config_hash
from dist_mtp.errors import CheckpointError
from dist_mtp.model.naming import logical_tensors, routers
from dist_mtp.parallel.collectives import broadcast_text
from dist_mtp.parallel.engine import Engine
from dist_mtp.parallel.mesh import Mesh

CHECKPOINTS = "checkpoints"


def save_snapshot(config: Config, engine: Engine, mesh: Mesh, *, step: int, corpus: str) -> Path:
    """Write and commit the state after ``step``. Collective.

    The state beside the tensors is what decides the rest of the run: the step and the seed give the order of samples,
    the learning rate and lambda; nothing draws random numbers after initialisation.

    Args:
        corpus: fingerprint of the tokenised corpus.
    """
    state = {
        "order": {"seed": config.train.seed, "step": step, "rows_per_step": config.rows_per_step},
        "corpus": corpus,
        "tokens": step * config.tokens_per_step,
        "config_hash": config_hash(config),
    }
    return save(
        Path(config.run_dir) / CHECKPOINTS,
        step=step,
        run_id=config.run_name,
        rank=mesh.rank,
        world_size=mesh.world_size,
        slices=_slices(engine, mesh),
        state=state,
        barrier=dist.barrier,
        keep=config.checkpoint.keep,
    )


def restore_newest(config: Config, engine: Engine, mesh: Mesh, *, corpus: str, report: Callable[[str], None]) -> int:
    """Load the checkpoint that ``resume`` asks for, if there is one. Collective.

    Returns:
        The last trained step, 0 when training starts from scratch.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit the model, the corpus or the order of samples.
    """
    if config.resume == "never":
        return 0
    folder = Path(config.run_dir) / CHECKPOINTS
    # Rank 0 chooses and verifies for all: the others must not settle on another one when a file is just vanishing.
    chosen = broadcast_text(_choose(config.resume, folder, report) if mesh.rank == 0 else "", mesh.device)
    if not chosen:
        return 0
    reader = CheckpointReader(Path(chosen), verify=False)
    _check_state(reader, config, corpus)
    _load(reader, engine)
    return reader.step


def _choose(resume: str, folder: Path, report: Callable[[str], None]) -> str:
    """Path of the checkpoint to continue from, verified; empty to start from scratch.

    Args:
        resume: ``auto`` or a checkpoint's folder.
        folder: where this run's checkpoints are.

    Raises:
        CheckpointError: the named checkpoint is damaged, or every one of the run is; or the run holds later ones than
            the named checkpoint, which the next ``auto`` would take for its continuation.
    """
    present = committed(folder) if folder.exists() else []
    if resume == "auto":
        newest = find_latest(folder, report=report) if present else None
        if present and newest is None:
            raise CheckpointError(
                f"none of the {len(present)} checkpoints in {folder} is intact: restore one, or set resume=never to start "
                "anew and keep them aside"
            )
        return str(newest) if newest is not None else ""
    step = CheckpointReader(Path(resume)).step
    if present and present[0][0] > step:
        raise CheckpointError(
            f"{folder} holds checkpoints up to step {present[0][0]}, later than step {step} of resume={resume}: choose "
            "another run.name to branch off"
        )
    return resume


def _slices(engine: Engine, mesh: Mesh) -> Iterator[TensorSlice]:
    for fragment in engine.fragments():
        for logical, start, tensors in fragment.pieces():
            for kind, data in tensors.items():
                yield TensorSlice(kind, logical.name, logical.shape, start, data.cpu())
    if mesh.dp_rank == 0:
        for name, router in routers(engine.model):
            bias = router.e_score_correction_bias
            yield TensorSlice("buffer", name, tuple(bias.shape), 0, bias.detach().cpu())


@torch.no_grad()
def _load(reader: CheckpointReader, engine: Engine) -> None:
    for fragment in engine.all_fragments():
        for logical, start, tensors in fragment.pieces():
            for kind, target in tensors.items():
                target.copy_(reader.read(kind, logical.name, start, target.numel(), shape=logical.shape))
    # The working copy of every parameter is whole on each rank, in the run's precision.
    for name, parameter in engine.named_parameters():
        flat = parameter.view(-1)
        for logical in logical_tensors(name, tuple(parameter.shape)):
            logical.view(flat).copy_(reader.read_full("param", logical.name, shape=logical.shape))
    for name, router in routers(engine.model):
        bias = router.e_score_correction_bias
        bias.copy_(reader.read_full("buffer", name, shape=tuple(bias.shape)))
    engine.set_optimizer_step(reader.step)


def _check_state(reader: CheckpointReader, config: Config, corpus: str) -> None:
    order: dict[str, Any] = reader.state.get("order", {})
    for key, ours in (("seed", config.train.seed), ("rows_per_step", config.rows_per_step)):
        if order.get(key) != ours:
            raise CheckpointError(
                f"{reader.path} was trained with {key}={order.get(key)}, this run has {ours}: the order of samples would "
                "change; use the same train.seed and the same rows per step (micro_batch_size x micro_batches x dp)"
            )
    if reader.state.get("corpus") != corpus:
        raise CheckpointError(
            f"{reader.path} was trained on another corpus or tokenizer: use the same data and tokenizer"
        )
