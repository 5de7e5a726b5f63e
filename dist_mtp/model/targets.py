"""Which token each head predicts at each position, and how much each head counts."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mtp.config import MtpConfig
from dist_mtp.model.loss import IGNORE


def shifted_targets(input_ids: Tensor, document_ids: Tensor, seq_len: int, num_depths: int) -> Tensor:
    """Targets of the main head and of every MTP depth.

    At position i, depth k predicts token ``i+1+k`` from tokens ``..i+k``; the target is valid when all of these lie in
    one document. With seq_len 3, one depth and the row ``a b c d | e`` (a document ends after d)::

        depth 0: b c d        depth 1: c d IGNORE

    Args:
        input_ids, document_ids: int64 [B, T+1+D]; document id -1 is padding.

    Returns:
        int64 [D+1, B, T], ``IGNORE`` where invalid.
    """
    home = document_ids[:, :seq_len]
    rows = []
    for depth in range(num_depths + 1):
        span = slice(1 + depth, 1 + depth + seq_len)
        valid = (document_ids[:, span] == home) & (home >= 0)
        rows.append(input_ids[:, span].masked_fill(~valid, IGNORE))
    return torch.stack(rows)


def count_targets(document_ids: Tensor, seq_len: int, num_depths: int) -> Tensor:
    """Valid targets of each head: int64 [D+1]."""
    targets = shifted_targets(torch.zeros_like(document_ids), document_ids, seq_len, num_depths)
    return (targets != IGNORE).sum(dim=(1, 2))


def loss_coefficients(counts: list[int], mtp: MtpConfig, mtp_weight: float, positions: int) -> list[float]:
    """Factor of each head's summed loss: main + lambda / D * sum of depth losses (arXiv 2412.19437, equation 25).

    Args:
        counts: valid targets per head over the whole global batch.
        mtp_weight: lambda.
        positions: rows * T of the global batch, the divisor under ``mtp.normalize: paper`` (equation 24).
    """
    main, *depths = counts
    coefficients = [1.0 / max(main, 1)]
    for count in depths:
        divisor = positions if mtp.normalize == "paper" else max(count, 1)
        coefficients.append(mtp_weight / len(depths) / divisor)
    return coefficients
