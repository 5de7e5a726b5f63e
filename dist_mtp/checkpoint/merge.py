"""From the ranks' sidecars to one manifest whose slices tile every tensor. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dist_mtp.checkpoint.format import FileEntry, Manifest, SliceEntry, TensorEntry
from dist_mtp.errors import CheckpointError


def merge(parts: Iterable[Manifest], *, state: dict[str, Any]) -> Manifest:
    """Join the ranks' sidecars into the manifest of the whole checkpoint.

    Raises:
        CheckpointError: ranks disagree on run, step, or a tensor's shape or type, or do not cover it exactly once.
    """
    parts = list(parts)
    first = parts[0]
    files: dict[str, FileEntry] = {}
    slices: dict[str, list[SliceEntry]] = {}
    headers: dict[str, TensorEntry] = {}
    for part in parts:
        if (part.run_id, part.step) != (first.run_id, first.step):
            raise CheckpointError(
                f"shard {next(iter(part.files))} belongs to run {part.run_id!r} step {part.step}, "
                f"shard {next(iter(first.files))} to run {first.run_id!r} step {first.step}: "
                "all ranks must save together"
            )
        files.update(part.files)
        for key, entry in part.tensors.items():
            header = headers.setdefault(key, entry)
            if (entry.shape, entry.dtype) != (header.shape, header.dtype):
                raise CheckpointError(
                    f"ranks disagree on tensor {key!r}: {list(entry.shape)} {entry.dtype} in {next(iter(part.files))}, "
                    f"{list(header.shape)} {header.dtype} in an earlier rank"
                )
            slices.setdefault(key, []).extend(entry.slices)
    tensors = {
        key: TensorEntry(header.shape, header.dtype, tuple(sorted(slices[key], key=lambda piece: piece.start)))
        for key, header in headers.items()
    }
    merged = Manifest(first.run_id, first.step, state, files, tensors)
    check_coverage(merged, where=f"checkpoint of step {first.step}")
    return merged


def check_coverage(manifest: Manifest, *, where: str) -> None:
    """Check that the slices of every tensor, in order, cover each of its elements exactly once.

    Raises:
        CheckpointError: a gap (some rank did not save its part) or an overlap (more than one replica saved it).
    """
    for key, entry in manifest.tensors.items():
        covered = 0
        previous = "the start"
        for piece in entry.slices:
            if piece.start > covered:
                break
            if piece.start < covered:
                raise CheckpointError(
                    f"{where}: tensor {key!r}: elements [{piece.start}, {min(piece.stop, covered)}) are in both "
                    f"{previous} and {piece.file}: only one replica may save them"
                )
            covered, previous = piece.stop, piece.file
        if covered < entry.numel:
            raise CheckpointError(
                f"{where}: tensor {key!r}: element {covered} of {entry.numel} is in no file: "
                "some rank did not save its part"
            )
