"""Writing a checkpoint: every rank its shard, rank 0 the manifest and the commit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dist_mtp.checkpoint import folder as checkpoints
from dist_mtp.checkpoint.files import read_bytes, regular_size, sha256_of, sync_folder, write_shard, write_text
from dist_mtp.checkpoint.format import (
    DTYPES,
    FileEntry,
    Manifest,
    SliceEntry,
    TensorEntry,
    TensorSlice,
    shard_name,
    tensor_key,
)
from dist_mtp.checkpoint.manifest import MAX_MANIFEST_BYTES, write_manifest
from dist_mtp.checkpoint.merge import merge
from dist_mtp.errors import CheckpointError


def save(
    folder: Path,
    *,
    step: int,
    run_id: str,
    rank: int,
    world_size: int,
    slices: Iterable[TensorSlice],
    state: dict[str, Any],
    barrier: Callable[[], None],
    keep: int,
    progress: Callable[[], None] = lambda: None,
) -> Path:
    """Write and commit the checkpoint of ``step``. Collective: every rank calls it with its own slices.

    1. Rank 0 clears litter and creates ``step_XXXXXXXX.tmp``.
    2. Every rank writes its shard and a sidecar that lists the shard's slices and SHA-256.
    3. Rank 0 checks that the sidecars cover every tensor exactly once, merges them into the manifest and renames the
       folder.

    Each phase ends in ``barrier()``, which a rank meets even if its work failed: a full disk on one rank makes all
    ranks raise instead of leaving the others waiting. Killed at any instant, the run finds the previous or the new
    checkpoint.

    Args:
        folder: the ``checkpoints/`` folder, on a file system that all ranks share.
        run_id: identifies the run; ranks must agree on it.
        slices: this rank's parts. Over all ranks each element of each tensor appears once, so only one data-parallel
            replica passes it. Consumed once; CPU memory of the whole shard is needed at a time.
        state: JSON object, rank 0's is stored (dict keys become strings, tuples lists; floats round-trip exactly).
        barrier: returns once all ranks called it; called three times.
        keep: newest checkpoints to keep, this one included.
        progress: called now and then while this rank writes, for a watchdog.

    Returns:
        The committed folder ``folder/step_XXXXXXXX``, on every rank.

    Raises:
        CheckpointError: nothing was committed (disk full, overlapping or missing slices, another rank failed) and
            earlier checkpoints are untouched; or, on rank 0, older checkpoints cannot be deleted.
    """
    final = folder / checkpoints.step_name(step)
    temporary = checkpoints.temporary_of(final)
    failure: Exception | None = None

    def phase(work: Callable[[], object], *, taken: bool = True) -> None:
        nonlocal failure
        if taken and failure is None:
            try:
                work()
            except Exception as error:
                failure = error
        barrier()

    phase(lambda: checkpoints.prepare(final), taken=rank == 0)
    phase(lambda: _write_rank(temporary, step, run_id, rank, slices, progress))
    phase(lambda: _commit(final, world_size, state), taken=rank == 0)

    if failure is not None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(failure, OSError):
            raise CheckpointError(f"checkpoint of step {step} was not committed: {failure}") from failure
        raise failure
    if not final.is_dir():
        raise CheckpointError(f"checkpoint of step {step} was not committed, because another rank failed: see its log")
    if rank == 0:
        try:
            checkpoints.retain(final, keep=keep)
        except OSError as error:
            raise CheckpointError(f"{final} was committed, but older checkpoints cannot be deleted: {error}") from error
    return final


def _write_rank(
    temporary: Path, step: int, run_id: str, rank: int, slices: Iterable[TensorSlice], progress: Callable[[], None]
) -> None:
    """Write this rank's shard and, once that is durable, the sidecar that vouches for it."""
    path = temporary / shard_name(rank)
    data, tensors = _shard(slices, path.name)
    progress()
    write_shard(path, data, {"run_id": run_id, "step": str(step), "rank": str(rank)})
    progress()
    # Hashed from the file and not from memory: safetensors writes in native code, and a copy of the shard would double
    # the memory. The pages are still cached, so this costs no disk reads.
    file = FileEntry(bytes=regular_size(path), sha256=sha256_of(path, progress))
    sidecar = Manifest(run_id, step, {}, {path.name: file}, tensors)
    write_text(_sidecar(temporary, rank), sidecar.to_json())


def _shard(slices: Iterable[TensorSlice], file: str) -> tuple[dict[str, torch.Tensor], dict[str, TensorEntry]]:
    """What ``file`` will hold, and the table that says so."""
    data: dict[str, torch.Tensor] = {}
    tensors: dict[str, TensorEntry] = {}
    for piece in slices:
        key = tensor_key(piece.kind, piece.name)
        entry = TensorEntry(tuple(piece.shape), str(piece.data.dtype).removeprefix("torch."), ())
        _check_slice(piece, entry)
        known = tensors.setdefault(key, entry)
        if (known.shape, known.dtype) != (entry.shape, entry.dtype):
            raise CheckpointError(
                f"slices of {key!r} disagree: {list(known.shape)} {known.dtype} and {list(entry.shape)} {entry.dtype}"
            )
        numel = piece.data.numel()
        if numel == 0:
            continue
        stored = f"{key}[{piece.start}:{piece.start + numel}]"
        if stored in data:
            raise CheckpointError(f"{stored} was passed twice to {file}")
        data[stored] = piece.data.detach().to("cpu")
        place = SliceEntry(file, stored, piece.start, numel)
        tensors[key] = TensorEntry(known.shape, known.dtype, (*known.slices, place))
    return data, tensors


def _check_slice(piece: TensorSlice, entry: TensorEntry) -> None:
    """A wrong slice is a bug of the caller; found here, it is named before anything is written."""
    label = repr(tensor_key(piece.kind, piece.name))
    if "/" in piece.kind or not piece.kind or not piece.name:
        raise CheckpointError(f"slice of {label}: kind must be a word without '/', and name must not be empty")
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"slice of {label}: {entry.dtype} cannot be stored, use one of {', '.join(DTYPES)}")
    if piece.data.dim() != 1:
        raise CheckpointError(f"slice of {label}: data has shape {list(piece.data.shape)}, expected 1-D")
    stop = piece.start + piece.data.numel()
    if piece.start < 0 or stop > entry.numel:
        raise CheckpointError(
            f"slice of {label}: elements [{piece.start}, {stop}) are outside its shape {list(entry.shape)}, "
            f"{entry.numel} elements"
        )


def _commit(final: Path, world_size: int, state: dict[str, Any]) -> None:
    """Merge the sidecars into the manifest, make all durable, and rename the folder."""
    temporary = checkpoints.temporary_of(final)
    sidecars = [_sidecar(temporary, rank) for rank in range(world_size)]
    parts = [_read_sidecar(path, rank, world_size) for rank, path in enumerate(sidecars)]
    write_manifest(temporary, merge(parts, state=state))
    for path in sidecars:
        path.unlink()
    sync_folder(temporary)
    checkpoints.commit(final)


def _read_sidecar(path: Path, rank: int, world_size: int) -> Manifest:
    if not path.exists():
        raise CheckpointError(
            f"rank {rank} of {world_size} left no {path.name}: it failed (see its log), or {path.parent.parent} "
            "is not on a file system that all ranks share"
        )
    return Manifest.from_json(read_bytes(path, limit=MAX_MANIFEST_BYTES), where=str(path))


def _sidecar(temporary: Path, rank: int) -> Path:
    return (temporary / shard_name(rank)).with_suffix(".json")
