"""Training state to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dist_mtp.checkpoint.folder import newest_first
from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.load import CheckpointReader, find_latest
from dist_mtp.checkpoint.save import save
from dist_mtp.config import Config, to_dict
from dist_mtp.errors import CheckpointError
from dist_mtp.model.naming import router_state
from dist_mtp.parallel.collectives import any_problem, from_rank_0
from dist_mtp.parallel.engine import Engine
from dist_mtp.parallel.mesh import Mesh
from dist_mtp.same_run import clashes

CHECKPOINTS = "checkpoints"


def save_snapshot(
    config: Config, engine: Engine, mesh: Mesh, *, step: int, corpus: str, beat: Callable[[], None] = lambda: None
) -> Path:
    """Write and commit the state after ``step``. Collective.

    The state beside the tensors is what decides the rest of the run: the step and the seed give the order of samples,
    the learning rate and lambda; nothing draws random numbers after initialisation.

    Args:
        corpus: fingerprint of the tokenised corpus.
        beat: called while this rank makes progress.
    """
    engine.check_embedding_copies()
    return save(
        Path(config.run_dir) / CHECKPOINTS,
        step=step,
        run_id=config.run_name,
        rank=mesh.rank,
        world_size=mesh.world_size,
        slices=_slices(engine, mesh, beat),
        state={"rows_per_step": config.rows_per_step, "corpus": corpus, "config": to_dict(config)},
        barrier=dist.barrier,
        keep=config.checkpoint.keep,
        progress=beat,
    )


def restore_newest(
    config: Config,
    engine: Engine,
    mesh: Mesh,
    *,
    corpus: str,
    report: Callable[[str], None],
    beat: Callable[[], None] = lambda: None,
) -> int:
    """Load the checkpoint that ``resume`` asks for, if there is one. Collective.

    Args:
        report: told of damaged checkpoints that are passed over.
        beat: called while this rank makes progress.

    Returns:
        The last trained step, 0 when training starts from scratch.

    Raises:
        CheckpointError: on all ranks. The checkpoint is damaged or does not fit the model, the corpus or the order of
            samples; or every checkpoint of the run is damaged.
    """
    if config.resume == "never":
        return 0
    folder = Path(config.run_dir) / CHECKPOINTS
    # Named by rank 0 for all: ranks must search the same list, whatever a network file system shows them.
    own = [folder / name for name in from_rank_0(lambda: _names(folder), mesh.device).split()]

    def check(path: Path) -> None:
        _verify_together(path, mesh, beat)

    if config.resume == "auto" or own:
        if config.resume != "auto":
            report(f"continuing {config.run_dir}, which has checkpoints of its own, instead of resume={config.resume}")
        newest = find_latest(own, report=report, check=check)
        if own and newest is None:
            raise CheckpointError(
                f"none of the {len(own)} checkpoints in {folder} is intact: restore one, or set resume=never to start "
                "anew and keep them aside"
            )
    else:
        newest = Path(config.resume)
        check(newest)
    if newest is None:
        return 0
    reader = CheckpointReader(newest, verify=False)
    _check_state(reader, config, corpus)
    _load(reader, engine, beat)
    return reader.step


def _names(folder: Path) -> str:
    """Names of the committed checkpoints, newest first, one a line."""
    return "\n".join(path.name for path in newest_first(folder))


def _verify_together(path: Path, mesh: Mesh, beat: Callable[[], None]) -> None:
    """Verify a checkpoint, each rank hashing its share of the shards. Collective.

    Raises:
        CheckpointError: on all ranks, what one of them found.
    """
    problem = ""
    try:
        CheckpointReader(path, verify=False).verify(mesh.rank, mesh.world_size, beat)
    except CheckpointError as error:
        problem = str(error)
    if found := any_problem(problem, mesh.device):
        raise CheckpointError(found)


def _slices(engine: Engine, mesh: Mesh, beat: Callable[[], None]) -> Iterator[TensorSlice]:
    for fragment in engine.fragments():
        beat()
        for logical, start, tensors in fragment.pieces():
            for kind, data in tensors.items():
                yield TensorSlice(kind, logical.name, logical.shape, start, data.cpu())
    if mesh.dp_rank == 0:
        for name, buffer in router_state(engine.model):
            yield TensorSlice("buffer", name, tuple(buffer.shape), 0, buffer.detach().cpu())


@torch.no_grad()
def _load(reader: CheckpointReader, engine: Engine, beat: Callable[[], None]) -> None:
    for fragment in engine.all_fragments():
        beat()
        for logical, start, tensors in fragment.pieces():
            for kind, target in tensors.items():
                target.copy_(reader.read(kind, logical.name, start, target.numel(), shape=logical.shape))
    # The working copy of every parameter is whole on each rank, in the run's precision.
    for name, parameter in engine.named_parameters():
        beat()
        flat = parameter.view(-1)
        for logical in engine.logical_tensors(name, parameter):
            logical.view(flat).copy_(reader.read_full("param", logical.name, shape=logical.shape))
    for name, buffer in router_state(engine.model):
        buffer.copy_(reader.read_full("buffer", name, shape=tuple(buffer.shape)))
    engine.weights_changed()
    engine.set_optimizer_step(reader.step)


def _check_state(reader: CheckpointReader, config: Config, corpus: str) -> None:
    state = reader.state
    if different := clashes(state.get("config", {}), to_dict(config)):
        raise CheckpointError(
            f"{reader.path} was trained with other settings ({different}): use the same, or another checkpoint"
        )
    if state.get("rows_per_step") != config.rows_per_step:
        raise CheckpointError(
            f"{reader.path} was trained with {state.get('rows_per_step')} rows per step, this run has {config.rows_per_step}: "
            "the order of samples would change; keep train.micro_batch_size x train.micro_batches x parallel.dp"
        )
    if state.get("corpus") != corpus:
        raise CheckpointError(
            f"{reader.path} was trained on another corpus or tokenizer: use the same data and tokenizer"
        )
