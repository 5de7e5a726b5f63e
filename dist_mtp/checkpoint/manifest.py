"""The manifest on disk: ``manifest.json``, and ``manifest.sha256`` that protects it as it protects the shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dist_mtp.checkpoint.files import read_bytes, write_text
from dist_mtp.checkpoint.folder import step_name, step_of
from dist_mtp.checkpoint.format import Manifest
from dist_mtp.checkpoint.merge import check_coverage
from dist_mtp.errors import CheckpointError

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
MAX_MANIFEST_BYTES = 1 << 30
"""DeepSeek-V3 with Adam, 140,000 tensors of a few slices each, takes about 100 MB."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write both files durably; ``sha256sum -c manifest.sha256`` checks them without dist_mtp."""
    text = manifest.to_json()
    write_text(folder / MANIFEST, text)
    write_text(folder / MANIFEST_HASH, _hash_line(text.encode()))


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the committed checkpoint in folder ``path``.

    Raises:
        CheckpointError: not a committed checkpoint, a damaged or hostile manifest, or one of another step.
    """
    step = step_of(path.name)
    if step is None or not path.is_dir():
        raise CheckpointError(
            f"{path} is not a committed checkpoint: give an existing folder named like {step_name(100)}"
        )
    text = read_bytes(path / MANIFEST, limit=MAX_MANIFEST_BYTES)
    hash_line = _hash_line(text).encode()
    if read_bytes(path / MANIFEST_HASH, limit=len(hash_line)) != hash_line:
        raise CheckpointError(f"{path / MANIFEST} does not match {MANIFEST_HASH}: one of them is damaged")
    where = str(path / MANIFEST)
    manifest = Manifest.from_json(text, where=where)
    check_coverage(manifest, where=where)
    if manifest.step != step:
        raise CheckpointError(
            f"{path} holds step {manifest.step}, its name says {step}: rename it to {step_name(manifest.step)}"
        )
    return manifest


def _hash_line(manifest: bytes) -> str:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n"
