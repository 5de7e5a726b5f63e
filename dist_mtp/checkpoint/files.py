"""Durable writing and cautious reading of single files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dist_mtp.errors import CheckpointError

HASH_BLOCK = 16 << 20
"""Bytes read at a time while hashing."""
FILE_MODE = 0o640
"""safetensors writes 0600 files, which the rest of a project group could not resume from."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a plain safetensors file atomically: ``path`` is absent, or old, or complete and durable.

    Tensors may have any shape and device, need not be contiguous, and may share memory (tied weights are stored twice).

    Raises:
        CheckpointError: the file could not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    write_shard(temporary, tensors, metadata)
    try:
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write and fsync a safetensors file in place; its directory entry is not durable yet.

    Raises:
        CheckpointError: the file could not be written.
    """
    try:
        save_file(_storable(tensors), path, metadata=dict(metadata))
        with path.open("rb") as file:
            os.fchmod(file.fileno(), FILE_MODE)
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write and fsync a text file in place; its directory entry is not durable yet."""
    with path.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), FILE_MODE)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file.

    Raises:
        CheckpointError: missing, or a symbolic link, pipe, device or folder: those could lead out of the checkpoint, or
            block whoever opens them.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: links and special files are never followed")
    return status.st_size


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Contents of a small regular file.

    Raises:
        CheckpointError: unreadable, not a regular file, or longer than ``limit`` bytes.
    """
    size = regular_size(path)
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes, more than the {limit} such a file can have")
    try:
        with open(path, "rb", opener=_open_no_follow) as file:
            return file.read(limit)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def sha256_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a regular file, streamed in 16 MiB blocks.

    Args:
        progress: called after every block, for a watchdog.

    Raises:
        CheckpointError: unreadable, or not a regular file.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_BLOCK, regular_size(path) + 1)))
    try:
        with open(path, "rb", buffering=0, opener=_open_no_follow) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                progress()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _open_no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, without a copy where they already are.

    ``save_file`` refuses tensors that overlap in memory. Disjoint views of one flat buffer pass, so only a tensor that
    starts inside another one (a tied weight) is cloned.
    """
    stored = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    end = 0
    for key, tensor in sorted(stored.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            stored[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return stored
