"""From a step's sample ids to the microbatches that this rank's stages run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dist_mtp.config import Config
from dist_mtp.data.batch import Batch, load_batch
from dist_mtp.data.corpus import PreparedCorpus
from dist_mtp.data.order import rank_slice, sample_ids
from dist_mtp.data.packing import PackedRows
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.targets import count_targets, loss_coefficients
from dist_mtp.model.transformer import MicroBatch
from dist_mtp.parallel.collectives import all_sum
from dist_mtp.parallel.mesh import Mesh

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class StepBatches:
    """One global batch as this rank sees it.

    ``coefficients``: factor of each head's loss, summed over the global batch, in the objective.
    """

    micro_batches: list[MicroBatch]
    coefficients: list[float]


class BatchSource:
    """Loads global batches. Every rank reads its replica's rows itself, so no ids travel through the pipeline."""

    def __init__(self, config: Config, mesh: Mesh, corpus: PreparedCorpus) -> None:
        self._config, self._mesh = config, mesh
        self._rows: dict[Split, PackedRows] = {}
        for split in ("train", "validation"):
            stream = corpus.split(split)
            self._rows[split] = PackedRows(
                stream.tokens, stream.document_starts, config.train.seq_len, config.mtp.depth
            )

    def step(self, split: Split, index: int, mtp_weight: float) -> StepBatches:
        """Global batch number ``index`` (0-based) with its losses weighted by ``mtp_weight`` (lambda). Collective."""
        config, mesh = self._config, self._mesh
        batch = load_batch(self._rows[split], rank_slice(self._ids(split, index), mesh.dp_rank, mesh.dp)).to(
            mesh.device
        )
        local_counts = count_targets(batch.document_ids, config.train.seq_len, config.mtp.depth).tolist()
        counts = [int(c) for c in all_sum(local_counts, mesh.device, mesh.data_group)]
        coefficients = loss_coefficients(counts, config.mtp, mtp_weight, config.tokens_per_step)
        # The engine averages gradients over the replicas, while the objective is a sum over all rows.
        scaled = [c * mesh.dp for c in coefficients]
        micro_batches = [self._micro_batch(b, scaled) for b in batch.microbatches(config.train.micro_batches)]
        return StepBatches(micro_batches, coefficients)

    def whole(self, split: Split, index: int) -> Batch:
        """The rows of all replicas, in order, on the CPU."""
        return load_batch(self._rows[split], self._ids(split, index))

    def _ids(self, split: Split, index: int) -> npt.NDArray[np.int64]:
        return sample_ids(self._config.train.seed, index, self._config.rows_per_step, len(self._rows[split]))

    def _micro_batch(self, batch: Batch, coefficients: list[float]) -> MicroBatch:
        context = AttentionContext.of(batch.document_ids[:, : self._config.train.seq_len], self._config.model)
        return MicroBatch(batch.input_ids, batch.document_ids, context, coefficients)
