"""Metrics that come once per MTP depth (``loss_mtp_1``, ``loss_mtp_2``, ...) and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def by_depth(row: Mapping[str, float], prefix: str) -> list[float]:
    """Values of ``prefix1``, ``prefix2``, ... in order of depth, up to the first that is absent.

    >>> by_depth({"loss_main": 2.0, "loss_mtp_1": 3.0, "loss_mtp_2": 4.0}, "loss_mtp_")
    [3.0, 4.0]
    """
    values: list[float] = []
    while (key := f"{prefix}{len(values) + 1}") in row:
        values.append(row[key])
    return values


def expected_tokens_per_step(accept_rates: Sequence[float]) -> float:
    """Tokens that one speculative decoding step yields: ``1 + sum_k prod_{j<=k} rate_j``.

    A draft at depth k counts only if all shallower ones were accepted. The rates are measured independently of each
    other, so the product is an estimate; drafts that fail together make the true number larger.

    Args:
        accept_rates: share of accepted drafts (0..1) at depth 1, 2, ...
    """
    expected = reached = 1.0
    for rate in accept_rates:
        reached *= rate
        expected += reached
    return expected
