"""Rows of ``T + 1 + D`` ids cut from a token stream, so that every MTP depth keeps all its targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_mtp.errors import DataError

PADDING_DOCUMENT = -1
"""Document id past the end of the stream; no real document has it, so those positions are never targets."""


class PackedRows:
    """A stream of N tokens as rows of T inputs and the targets of the main head and of D MTP depths.

    Row ``r`` covers stream positions ``[r*T, r*T + T + 1 + D)``. Its T inputs are the first T ids; the main head's
    targets are the same shifted by 1, those of depth ``d`` shifted by ``1 + d``. Consecutive rows overlap by ``1 + D``
    ids, so each token but the stream's first is the main head's target exactly once, and the number of rows and their
    first ``T + 1`` ids do not depend on D. Ids past the end are 0, in document ``PADDING_DOCUMENT``.

    Rows cross document boundaries. Where ``document_ids`` change, attention and targets must stop; that is the model's
    part, and why the document ids travel with the token ids.

    Example, T=3 and D=1, two documents of lengths 3 and 4 (9 ends a document)::

        >>> tokens = np.array([10, 11, 9, 20, 21, 22, 9], dtype=np.uint16)
        >>> rows = PackedRows(tokens, np.array([0, 3]), seq_len=3, depth=1)
        >>> len(rows)
        2
        >>> input_ids, document_ids = rows.rows(np.array([0, 1]))
        >>> print(input_ids)
        [[10 11  9 20 21]
         [20 21 22  9  0]]
        >>> print(document_ids)
        [[ 0  0  0  1  1]
         [ 1  1  1  1 -1]]

    The main head's targets are ``11 9 20`` and ``21 22 9``, depth 1's are ``9 20 21`` and ``22 9 0``; the model drops
    those whose document id differs from their input's: ``20``, ``20 21`` and the padding.

    Args:
        tokens: ids [N], any integer type; may be a memory map.
        document_starts: rising positions of each document's first token, beginning with 0.
        seq_len: T, at least 1.
        depth: D, at least 0.

    Raises:
        DataError: fewer than two tokens, which make no input with a target.
    """

    def __init__(self, tokens: np.ndarray, document_starts: npt.NDArray[np.int64], seq_len: int, depth: int) -> None:
        if len(tokens) < 2:
            raise DataError(f"the token stream has {len(tokens)} tokens, but a row needs at least 2: add text to it")
        self.tokens = tokens
        self.document_starts = document_starts
        self.seq_len = seq_len
        self.depth = depth

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    @property
    def row_length(self) -> int:
        """T + 1 + D."""
        return self.seq_len + 1 + self.depth

    def row(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and document ids of one row, int64 [T+1+D] each. Raises IndexError outside ``[0, len)``."""
        input_ids, document_ids = self.rows(np.array([index]))
        return input_ids[0], document_ids[0]

    def rows(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and document ids of rows ``indices`` [B], int64 [B, T+1+D] each.

        A document id is the index of the document in the stream.

        Raises:
            IndexError: an index outside ``[0, len(self))``; negative ones do not count from the end.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"rows {indices.min()}..{indices.max()} are not all in the {len(self)} rows of this stream"
            )
        positions = indices[:, None] * self.seq_len + np.arange(self.row_length)  # [B, T+1+D]
        inside = positions < len(self.tokens)
        positions = np.minimum(positions, len(self.tokens) - 1)
        documents = np.searchsorted(self.document_starts, positions, side="right") - 1
        input_ids = np.where(inside, self.tokens[positions].astype(np.int64), 0)
        return input_ids, np.where(inside, documents, PADDING_DOCUMENT).astype(np.int64)
