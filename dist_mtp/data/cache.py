"""Folders that are written once, appear all at once, and are verified each time they are used."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_mtp.errors import ConfigError, DataError

SHORT_HASH = 16
"""Hexadecimal digits of a content hash in a folder's name."""


def cached_folder(
    folder: Path, manifest: str, write: Callable[[Path], dict[str, Any]], *, check_hashes: bool = True
) -> dict[str, Any]:
    """Build ``folder`` unless it exists, verify it, and return its manifest.

    Processes may race to build the same folder: each builds a private one, the first rename wins and the others use
    the winner's. The folder's name must therefore hash everything that determines its content.

    Args:
        manifest: file name of the JSON manifest inside the folder.
        write: fills an empty folder and returns the manifest; ``files`` (bytes and SHA-256 of each) is added here.
        check_hashes: also compare SHA-256; sizes are always compared.

    Raises:
        ConfigError: the folder's parent cannot be written.
        DataError: a file is missing or differs from the manifest.
    """
    if not folder.exists():
        _build(folder, manifest, write)
    return verified(folder, manifest, check_hashes)


def sha256_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _build(folder: Path, manifest: str, write: Callable[[Path], dict[str, Any]]) -> None:
    # A sibling, because rename is atomic only inside one file system. Not tempfile.mkdtemp: its mode 0700 would survive
    # the rename and lock other users out of a shared cache.
    partial = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create {partial.parent} ({error.strerror}): set data.cache_dir to a folder that you may write"
        ) from error
    try:
        info = write(partial)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(partial.iterdir())
        }
        text = json.dumps({**info, "files": files}, indent=2, ensure_ascii=False)
        (partial / manifest).write_text(text + "\n", encoding="utf-8")
        try:
            os.rename(partial, folder)
        except OSError:
            # A non-empty target refuses the rename: another process was faster, with the same content.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verified(folder: Path, manifest: str, check_hashes: bool) -> dict[str, Any]:
    """The manifest of a folder whose files agree with it in size and, if asked, in SHA-256.

    Raises:
        DataError: a file is missing or differs.
    """
    fix = f"delete the folder {folder} and it is built again"
    try:
        info = json.loads((folder / manifest).read_text(encoding="utf-8"))
        files = dict(info["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / manifest} is missing or damaged ({error}): {fix}") from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing: {fix}")
        if file.stat().st_size != expected["bytes"]:
            raise DataError(f"{file} is damaged: {file.stat().st_size} bytes, expected {expected['bytes']}: {fix}")
        if check_hashes and (actual := sha256_file(file)) != expected["sha256"]:
            raise DataError(f"{file} is damaged: SHA-256 {actual}, expected {expected['sha256']}: {fix}")
    return info
