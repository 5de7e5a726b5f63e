"""The manifest: which file holds which elements of which logical tensor. Pure data, no file is touched here.

A checkpoint knows nothing of ranks' roles. Every tensor has a logical Hugging Face name and a global shape, and every
shard holds 1-D *slices*: elements ``[start, start + numel)`` of the flattened logical tensor. Three ranks may save a
``[4, 5]`` tensor as slices ``[0, 7) [7, 8) [8, 20)``, and a loader that wants row 1 asks for ``[5, 10)``.

A manifest comes from outside, so :meth:`Manifest.from_json` trusts nothing: names cannot leave the folder, and the
slices of a file must fit into its bytes. Since a tensor is covered by slices, no manifest can demand more memory than
its files take on disk.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

import torch

from dist_mtp.errors import CheckpointError

FORMAT = "dist_mtp.checkpoint"
VERSION = 1
MAX_BYTES = 1 << 50
"""1 PiB, beyond any file or tensor; keeps arithmetic on hostile numbers small."""
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Element types that a checkpoint stores, by the name the manifest uses (``float32``, ``bfloat16``, ...)."""

_SHARD_NAME = re.compile(r"rank_\d{5,}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorSlice:
    """What a rank hands to :func:`dist_mtp.checkpoint.save.save`: a run of one logical tensor's elements."""

    kind: str
    """``param`` (fp32 master weight), ``exp_avg``, ``exp_avg_sq``, ``buffer``, ...; no ``/``."""
    name: str
    """Logical Hugging Face name, such as ``model.layers.3.mlp.experts.5.gate_proj.weight``."""
    shape: tuple[int, ...]
    """Global shape of the logical tensor."""
    start: int
    """First element, counted in the flattened logical tensor."""
    data: torch.Tensor
    """1-D, on any device: elements ``[start, start + numel)``. Empty when a rank owns nothing of the tensor."""


@dataclass(frozen=True)
class SliceEntry:
    """Where elements ``[start, start + numel)`` are stored: 1-D tensor ``key`` of shard ``file``."""

    file: str
    key: str
    start: int
    numel: int

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class TensorEntry:
    """A logical tensor and its slices, in rising order of ``start``."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[SliceEntry, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of a shard."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the numbers. A rank's sidecar is a manifest of its own shard alone."""

    run_id: str
    step: int
    state: dict[str, Any]
    """JSON object of the trainer: order state, config hash, layout, token counts, ..."""
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    """Keyed ``kind/name``."""

    def to_json(self) -> str:
        """Compact JSON with sorted keys.

        Raises:
            CheckpointError: ``state`` holds something that JSON cannot represent, such as a NaN or a tensor.
        """
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        try:
            return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the state of step {self.step} cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> Manifest:
        """Parse and check everything but coverage (see :func:`dist_mtp.checkpoint.merge.check_coverage`).

        Args:
            where: file name for messages.

        Raises:
            CheckpointError: not JSON, another format or version, wrong types, unsafe names or impossible sizes.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not valid JSON: {error}") from error
        document = _typed(document, dict, where)
        if document.get("format") != FORMAT:
            raise CheckpointError(f"{where}: format is {document.get('format')!r}, expected {FORMAT!r}")
        if document.get("version") != VERSION:
            raise CheckpointError(
                f"{where}: format version is {document.get('version')!r}, this dist_mtp reads {VERSION}: "
                "use the dist_mtp that wrote it"
            )
        files = {name: _file_entry(name, value, where) for name, value in _get(document, "files", dict, where).items()}
        tensors = {
            key: _tensor_entry(value, files, f"{where}: tensor {key!r}")
            for key, value in _get(document, "tensors", dict, where).items()
        }
        manifest = cls(
            run_id=_get(document, "run_id", str, where),
            step=_count(document, "step", where),
            state=_get(document, "state", dict, where),
            files=files,
            tensors=tensors,
        )
        _check_slices_fit_files(manifest, where)
        return manifest


def tensor_key(kind: str, name: str) -> str:
    """Key of a logical tensor in :attr:`Manifest.tensors`."""
    return f"{kind}/{name}"


def shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _check_slices_fit_files(manifest: Manifest, where: str) -> None:
    used = dict.fromkeys(manifest.files, 0)
    for entry in manifest.tensors.values():
        for piece in entry.slices:
            used[piece.file] += piece.numel * DTYPES[entry.dtype].itemsize
    for name, entry_bytes in used.items():
        if entry_bytes > manifest.files[name].bytes:
            raise CheckpointError(
                f"{where}: slices in {name} take {entry_bytes} bytes, the file has only {manifest.files[name].bytes}"
            )


def _file_entry(name: str, value: object, where: str) -> FileEntry:
    if not _SHARD_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: file name {name!r} is not of the form {shard_name(0)!r}")
    where = f"{where}: file {name}"
    fields = _typed(value, dict, where)
    digest = _get(fields, "sha256", str, where)
    if not _SHA256.fullmatch(digest):
        raise CheckpointError(f"{where}: sha256 {digest!r} is not 64 lower-case hexadecimal digits")
    return FileEntry(bytes=_count(fields, "bytes", where), sha256=digest)


def _tensor_entry(value: object, files: Mapping[str, FileEntry], where: str) -> TensorEntry:
    fields = _typed(value, dict, where)
    shape = _get(fields, "shape", list, where)
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of at most {MAX_DIMENSIONS} sane sizes")
    dtype = _get(fields, "dtype", str, where)
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    slices = tuple(_slice_entry(piece, files, where) for piece in _get(fields, "slices", list, where))
    entry = TensorEntry(tuple(shape), dtype, slices)
    if entry.numel * DTYPES[dtype].itemsize > MAX_BYTES or any(piece.stop > entry.numel for piece in slices):
        raise CheckpointError(f"{where}: shape {shape} is absurd or smaller than the slices it is stored in")
    return entry


def _slice_entry(value: object, files: Mapping[str, FileEntry], where: str) -> SliceEntry:
    fields = _typed(value, dict, where)
    entry = SliceEntry(
        file=_get(fields, "file", str, where),
        key=_get(fields, "key", str, where),
        start=_count(fields, "start", where),
        numel=_count(fields, "numel", where),
    )
    if entry.file not in files:
        raise CheckpointError(f"{where}: slice in file {entry.file!r}, which the manifest does not list")
    if entry.numel == 0:
        raise CheckpointError(f"{where}: empty slice at {entry.start} in {entry.file}")
    return entry


def _get(fields: Mapping[str, Any], key: str, expected: type[_T], where: str) -> _T:
    if key not in fields:
        raise CheckpointError(f"{where}: {key!r} is missing")
    return _typed(fields[key], expected, f"{where}: {key!r}")


def _typed(value: object, expected: type[_T], where: str) -> _T:
    # Exact types, since bool is an int and would pass isinstance.
    if type(value) is not expected:
        raise CheckpointError(f"{where} is {type(value).__name__}, expected {expected.__name__}")
    return value


def _count(fields: Mapping[str, Any], key: str, where: str) -> int:
    value = _get(fields, key, int, where)
    if not 0 <= value <= MAX_BYTES:
        raise CheckpointError(f"{where}: {key!r} is {value}, expected 0 to {MAX_BYTES}")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
