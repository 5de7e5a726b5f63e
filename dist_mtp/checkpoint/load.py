"""Reading a checkpoint into any layout: verified first, then slice by slice."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dist_mtp.checkpoint.files import regular_size, sha256_of
from dist_mtp.checkpoint.format import DTYPES, SliceEntry, TensorEntry, tensor_key
from dist_mtp.checkpoint.manifest import MANIFEST, MANIFEST_HASH, read_manifest
from dist_mtp.errors import CheckpointError


def find_latest(
    candidates: Iterable[Path], *, report: Callable[[str], None], check: Callable[[Path], object] | None = None
) -> Path | None:
    """First of ``candidates`` (newest first) that is complete and intact, or None. Nothing is changed on disk.

    Args:
        report: called with one message, naming file and reason, for each damaged checkpoint that is skipped.
        check: raises CheckpointError for a damaged checkpoint. None hashes every byte of it in this process; several
            ranks that search together share that work, and must all come to the same answer.
    """
    for path in candidates:
        try:
            (check or CheckpointReader)(path)
        except CheckpointError as error:
            report(f"skipping damaged checkpoint {path}: {error}")
        else:
            return path
    return None


class CheckpointReader:
    """Random access to the tensors of one committed checkpoint.

    The manifest is always checked; with ``verify`` (the default) so are size and SHA-256 of every shard. Without it,
    sizes are still checked, but flipped bits in the shards go unnoticed.

    Raises:
        CheckpointError: missing, damaged, mixed from several checkpoints, or not a checkpoint.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = Path(path).resolve()
        self._manifest = read_manifest(self.path)
        self._files: dict[str, Any] = {}
        for name in self._manifest.files:
            self._check_size(name)
        if verify:
            self.verify()

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def run_id(self) -> str:
        return self._manifest.run_id

    @property
    def state(self) -> dict[str, Any]:
        """The JSON object that rank 0 passed to ``save``."""
        return self._manifest.state

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """``kind/name`` -> entry with global ``shape``, ``dtype`` (such as ``float32``) and ``numel``."""
        return self._manifest.tensors

    def names(self, kind: str) -> list[str]:
        """Sorted logical names that have a tensor of ``kind``."""
        prefix = tensor_key(kind, "")
        return sorted(key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix))

    def verify(self, part: int = 0, parts: int = 1, progress: Callable[[], None] = lambda: None) -> None:
        """Check that the folder holds the listed shards and no others, with their size and SHA-256.

        Args:
            part, parts: hash only every ``parts``-th shard, so that ranks can share the work.
            progress: called now and then, for a watchdog.

        Raises:
            CheckpointError: names the file and what differs.
        """
        listed = {MANIFEST, MANIFEST_HASH, *self._manifest.files}
        for found in sorted(self.path.iterdir()):
            # Hidden files are not ours: network file systems and desktops leave some.
            if found.name not in listed and not found.name.startswith("."):
                raise CheckpointError(f"{found} is not part of this checkpoint: remove it, or use another checkpoint")
        for name, entry in sorted(self._manifest.files.items())[part::parts]:
            self._check_size(name)
            digest = sha256_of(self.path / name, progress)
            if digest != entry.sha256:
                raise CheckpointError(
                    f"{self.path / name} has SHA-256 {digest[:16]}..., manifest says {entry.sha256[:16]}...: "
                    "the file is damaged or from another checkpoint"
                )

    def read(
        self,
        kind: str,
        name: str,
        start: int,
        numel: int,
        dtype: torch.dtype | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Elements ``[start, start + numel)`` of the flattened logical tensor, as a new 1-D CPU tensor.

        Args:
            dtype: type to convert to; None keeps the stored one.
            shape: the logical shape the caller expects, checked if given.

        Raises:
            CheckpointError: no such tensor, another shape, a range outside of it, or an unreadable shard.
        """
        entry = self._entry(kind, name, shape)
        stop = start + numel
        if not 0 <= start <= stop <= entry.numel:
            raise CheckpointError(
                f"{self.path}: elements [{start}, {stop}) of {tensor_key(kind, name)!r} were asked for, "
                f"it has {entry.numel}"
            )
        result = torch.empty(numel, dtype=dtype or DTYPES[entry.dtype])
        first = max(bisect.bisect_right(entry.slices, start, key=lambda piece: piece.start) - 1, 0)
        for piece in entry.slices[first:]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low >= high:
                break
            stored = self._stored(piece, entry.dtype)[low - piece.start : high - piece.start]
            result[low - start : high - start].copy_(stored)
        return result

    def read_full(
        self, kind: str, name: str, dtype: torch.dtype | None = None, *, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """The whole logical tensor in its global shape; arguments and errors as in :meth:`read`."""
        entry = self._entry(kind, name, shape)
        return self.read(kind, name, 0, entry.numel, dtype).view(entry.shape)

    def _entry(self, kind: str, name: str, shape: tuple[int, ...] | None) -> TensorEntry:
        entry = self.tensors.get(tensor_key(kind, name))
        if entry is None:
            nearest = difflib.get_close_matches(name, self.names(kind), n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}" if nearest else f"it has nothing of kind {kind!r}"
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} of kind {kind!r}; {hint}: "
                "model settings must be those the checkpoint was written with"
            )
        if shape is not None and tuple(shape) != entry.shape:
            raise CheckpointError(
                f"{self.path}: tensor {tensor_key(kind, name)!r}: checkpoint has {list(entry.shape)}, model has "
                f"{list(shape)}: model settings must be those the checkpoint was written with"
            )
        return entry

    def _stored(self, piece: SliceEntry, dtype: str) -> Any:
        """Lazy view (safetensors' ``get_slice``) of one stored slice, checked against the manifest."""
        path = self.path / piece.file
        try:
            if piece.file not in self._files:
                self._check_size(piece.file)
                self._files[piece.file] = safe_open(path, framework="pt", device="cpu")
            stored = self._files[piece.file].get_slice(piece.key)
            found = (list(stored.get_shape()), stored[0:0].dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read {piece.key!r}: {error}") from error
        if found != ([piece.numel], DTYPES[dtype]):
            raise CheckpointError(
                f"{path}: {piece.key!r} is {found[0]} {found[1]}, manifest says [{piece.numel}] {dtype}"
            )
        return stored

    def _check_size(self, name: str) -> None:
        size, expected = regular_size(self.path / name), self._manifest.files[name].bytes
        if size != expected:
            raise CheckpointError(f"{self.path / name} has {size} bytes, manifest says {expected}: the file is damaged")
