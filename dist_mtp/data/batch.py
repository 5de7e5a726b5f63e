"""Packed rows as tensors, whole or in microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mtp.data.packing import PackedRows


@dataclass(frozen=True)
class Batch:
    """B rows of T inputs with the targets of the main head and of D MTP depths; see :class:`PackedRows`."""

    input_ids: Tensor
    """Token ids, int64 [B, T+1+D]."""
    document_ids: Tensor
    """Document of each token, int64 [B, T+1+D]; -1 past the end of the stream."""

    def microbatches(self, count: int) -> list[Batch]:
        """Split the rows into ``count`` equal runs, as views: [B, T+1+D] -> count times [B/count, T+1+D].

        Raises:
            ValueError: ``count`` does not divide the rows.
        """
        rows = self.input_ids.shape[0]
        if count < 1 or rows % count:
            raise ValueError(f"cannot split {rows} rows into {count} equal microbatches")
        size = rows // count
        return [
            Batch(ids, documents)
            for ids, documents in zip(self.input_ids.split(size), self.document_ids.split(size), strict=True)
        ]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.document_ids.to(device))


def load_batch(rows: PackedRows, ids: npt.NDArray[np.int64]) -> Batch:
    """Rows ``ids`` [B] of a packed stream, on the CPU. Raises IndexError for a row that is not there."""
    input_ids, document_ids = rows.rows(ids)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(document_ids))
