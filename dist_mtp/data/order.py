"""Which rows a step trains on, as a pure function: nothing to save, and resume is exact under any layout of ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


def sample_ids(seed: int, step: int, rows_per_step: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Row indices of one global batch, int64 [rows_per_step].

    Sample ``s = step * rows_per_step + j`` is entry ``s % num_rows`` of the permutation of epoch ``s // num_rows``. So
    an epoch visits each row once, and a batch may begin in one epoch and end in the next. Ranks and microbatches take
    slices of the result (:func:`rank_slice`), hence train on the same samples however many they are.

    Args:
        seed: ``train.seed``.
        step: 0-based.
        rows_per_step: rows of a global batch, over all ranks and microbatches.
        num_rows: rows of an epoch, at least 1.
    """
    samples = step * rows_per_step + np.arange(rows_per_step, dtype=np.int64)
    epochs, positions = np.divmod(samples, num_rows)
    ids = np.empty(rows_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        ids[inside] = permutation(seed, int(epoch), num_rows)[positions[inside]]
    return ids


def rank_slice(ids: npt.NDArray[np.int64], dp_rank: int, dp: int) -> npt.NDArray[np.int64]:
    """The contiguous share of data-parallel rank ``dp_rank`` in a global batch: [rows_per_step] -> [rows_per_step / dp].

    Raises:
        ValueError: ``dp`` does not divide the batch, or there is no such rank.
    """
    if len(ids) % dp or not 0 <= dp_rank < dp:
        raise ValueError(f"cannot take the share of rank {dp_rank} of {dp} in a batch of {len(ids)} rows")
    share = len(ids) // dp
    return ids[dp_rank * share : (dp_rank + 1) * share]


@lru_cache(maxsize=4)  # a batch at an epoch's end needs two, and evaluation alternates with training
def permutation(seed: int, epoch: int, num_rows: int) -> npt.NDArray[np.int64]:
    """The order of ``num_rows`` rows in an epoch, int64 [num_rows], read-only because it is shared.

    Philox is counter-based and keyed by (seed, epoch): epochs are independent without drawing the earlier ones.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(num_rows)
    order.flags.writeable = False
    return order
