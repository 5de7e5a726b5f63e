"""The ``checkpoints/`` folder: what its names mean, and the renames that commit and retire a checkpoint.

``step_00000010``        committed: complete and durable
``step_00000010.tmp``    being written, or left by a crash
``step_00000010.old``    committed, set aside while a new save of the same step takes its place
``step_00000010.trash``  being deleted, or left by a crash

A folder changes its meaning by one rename, so that a crash between any two system calls leaves either the previous or
the new checkpoint, and never a half-written or half-deleted one under a committed name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dist_mtp.checkpoint.files import sync_folder

_COMMITTED = re.compile(r"step_(\d{8,})(\.old)?", re.ASCII)
_LITTER = re.compile(r"step_\d{8,}(\.tmp|(\.old)?\.trash)", re.ASCII)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a committed checkpoint's folder name, or None for any other name."""
    match = _COMMITTED.fullmatch(name)
    return int(match[1]) if match else None


def temporary_of(final: Path) -> Path:
    """Where the checkpoint that will be ``final`` is written."""
    return final.with_name(final.name + ".tmp")


def committed(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of committed checkpoints, newest first; intactness is not checked. A missing folder has none."""
    found = [(step, path) for path in _subfolders(folder) if (step := step_of(path.name)) is not None]
    # ``step_X`` sorts after ``step_X.old`` here: the replacement is the newer of the two.
    return sorted(found, key=lambda item: (item[0], not item[1].name.endswith(".old")), reverse=True)


def newest_first(folder: Path) -> list[Path]:
    """Paths of committed checkpoints, newest first."""
    return [path for _, path in committed(folder)]


def prepare(final: Path) -> None:
    """Create the empty folder to write ``final`` into, after clearing what crashed saves left.

    Nothing else may write in the folder at that time.
    """
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    _remove_litter(folder)
    temporary_of(final).mkdir()


def commit(final: Path) -> None:
    """Turn the complete and fsynced temporary folder into the checkpoint ``final``."""
    folder = final.parent
    if final.exists():
        # A run that went back (damaged or older checkpoint chosen) saves a step again. Folders cannot be exchanged in
        # one portable call, so the old one stays loadable under another name until the new one is durable.
        aside = final.with_name(final.name + ".old")
        if aside.exists():
            _retire(aside)
        os.rename(final, aside)
    os.rename(temporary_of(final), final)
    sync_folder(folder)


def retain(final: Path, *, keep: int) -> None:
    """Delete what is older than ``final``, which was just committed, beyond the newest ``keep`` (``final`` included).

    Checkpoints of later steps are left alone: they exist when a run went back, and are replaced as it advances.
    """
    step, found = step_of(final.name), committed(final.parent)
    assert step is not None
    kept = sorted({other for other, _ in found if other < step}, reverse=True)[: max(keep - 1, 0)]
    for other, path in found:
        superseded = path.name.endswith(".old") and path.with_suffix("").exists()
        if superseded or (other < step and other not in kept):
            _retire(path)


def _retire(path: Path) -> None:
    trash = path.with_name(path.name + ".trash")
    os.rename(path, trash)
    sync_folder(path.parent)
    _remove(trash)


def _remove_litter(folder: Path) -> None:
    for path in _subfolders(folder):
        if _LITTER.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    # Network file systems keep deleted files that a process still maps, and so the folder: the next save retries.
    shutil.rmtree(path, ignore_errors=True)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
