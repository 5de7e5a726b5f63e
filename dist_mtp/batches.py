"""From a step's sample ids to the microbatches that this rank's stages run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from dist_mtp.config import Config
from dist_mtp.data.batch import Batch, load_batch
from dist_mtp.data.corpus import TokenizedCorpus
from dist_mtp.data.order import rank_slice, sample_ids
from dist_mtp.data.packing import PADDING_DOCUMENT, PackedRows
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.targets import count_targets, loss_coefficients
from dist_mtp.model.transformer import MicroBatch
from dist_mtp.parallel.collectives import all_sum
from dist_mtp.parallel.mesh import Mesh

Split = Literal["train", "validation"]
NO_ROW = -1
"""Place of a row in a batch that the validation split does not fill."""


class MicroBatches(Sequence[MicroBatch]):
    """One replica's microbatches of a step.

    Each access makes the microbatch anew, with its [B, 1, T, T] attention mask: a mask then lives as long as the
    activations of its microbatch, where M of them at once would cost 0.5 GiB at T = 4096 and M = 32.
    """

    def __init__(self, batches: Sequence[Batch], coefficients: list[float], config: Config) -> None:
        self._batches, self._coefficients, self._config = batches, coefficients, config

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        if isinstance(index, slice):
            return MicroBatches(self._batches[index], self._coefficients, self._config)
        batch = self._batches[index]
        context = AttentionContext.of(batch.document_ids[:, : self._config.train.seq_len], self._config.model)
        return MicroBatch(batch.input_ids, batch.document_ids, context, self._coefficients)


@dataclass(frozen=True)
class StepBatches:
    """One global batch as this rank sees it.

    ``coefficients``: factor of each head's loss, summed over the global batch, in the objective.
    """

    micro_batches: MicroBatches
    coefficients: list[float]


class BatchSource:
    """Loads global batches. Every rank reads its replica's rows itself, so no ids travel through the pipeline."""

    def __init__(self, config: Config, mesh: Mesh, corpus: TokenizedCorpus) -> None:
        self._config, self._mesh = config, mesh
        self._rows: dict[Split, PackedRows] = {}
        for split in ("train", "validation"):
            stream = corpus.split(split)
            self._rows[split] = PackedRows(
                stream.tokens, stream.document_starts, config.train.seq_len, config.mtp.depth
            )

    def validation_batches(self) -> int:
        """Global batches that ``eval.batches`` allows and the validation split fills, the last one perhaps in part."""
        return min(self._config.eval.batches, -(-len(self._rows["validation"]) // self._config.rows_per_step))

    def step(self, split: Split, index: int, mtp_weight: float) -> StepBatches:
        """Global batch number ``index`` (0-based) with its losses weighted by ``mtp_weight`` (lambda). Collective."""
        config, mesh = self._config, self._mesh
        batch = self._load(split, rank_slice(self._ids(split, index), mesh.dp_rank, mesh.dp)).to(mesh.device)
        local_counts = count_targets(batch.document_ids, config.train.seq_len, config.mtp.depth).tolist()
        counts = [int(c) for c in all_sum(local_counts, mesh.device, mesh.data_group)]
        coefficients = loss_coefficients(counts, config.mtp, mtp_weight, config.tokens_per_step)
        # The engine averages gradients over the replicas, while the objective is a sum over all rows.
        scaled = [c * mesh.dp for c in coefficients]
        return StepBatches(MicroBatches(batch.microbatches(config.train.micro_batches), scaled, config), coefficients)

    def whole(self, split: Split, index: int) -> Batch:
        """The rows of all replicas, in order, on the CPU."""
        return self._load(split, self._ids(split, index))

    def _ids(self, split: Split, index: int) -> npt.NDArray[np.int64]:
        """Rows of a global batch: training goes round and round, evaluation sees each row once and then ``NO_ROW``."""
        seed, rows_per_step, num_rows = self._config.train.seed, self._config.rows_per_step, len(self._rows[split])
        ids = sample_ids(seed, index, rows_per_step, num_rows)
        if split == "validation":
            ids[index * rows_per_step + np.arange(rows_per_step) >= num_rows] = NO_ROW
        return ids

    def _load(self, split: Split, ids: npt.NDArray[np.int64]) -> Batch:
        batch = load_batch(self._rows[split], np.maximum(ids, 0))
        batch.document_ids[torch.from_numpy(ids == NO_ROW)] = PADDING_DOCUMENT
        return batch
