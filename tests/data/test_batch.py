import numpy as np
import pytest
import torch

from dist_mtp.data.batch import Batch, load_batch
from dist_mtp.data.packing import PackedRows


@pytest.fixture
def rows() -> PackedRows:
    return PackedRows(np.arange(1, 60, dtype=np.uint16), np.array([0, 20]), seq_len=5, depth=1)


class TestBatch:
    """A batch holds the packed rows it was asked for, and its microbatches are those rows in order."""

    def test_load(self, rows: PackedRows) -> None:
        batch = load_batch(rows, np.array([7, 0, 3]))
        expected = rows.rows(np.array([7, 0, 3]))
        for found, array in zip((batch.input_ids, batch.document_ids), expected, strict=True):
            assert found.dtype == torch.int64, f"{found.dtype} != int64"
            assert np.array_equal(found.numpy(), array), f"{found} != {array}"

    @pytest.mark.parametrize("count", [1, 2, 3, 6])
    def test_microbatches(self, rows: PackedRows, count: int) -> None:
        batch = load_batch(rows, np.arange(6))
        parts = batch.microbatches(count)
        assert [part.input_ids.shape[0] for part in parts] == [6 // count] * count
        for name in ("input_ids", "document_ids"):
            joined, expected = torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)
            assert torch.equal(joined, expected), f"{name}: {joined} != {expected}"

    @pytest.mark.parametrize("count", [0, 4])
    def test_unequal_microbatches(self, rows: PackedRows, count: int) -> None:
        with pytest.raises(ValueError, match=f"6 rows into {count} equal"):
            load_batch(rows, np.arange(6)).microbatches(count)

    def test_to_moves_both(self, rows: PackedRows) -> None:
        moved: Batch = load_batch(rows, np.arange(2)).to("meta")
        assert (moved.input_ids.device.type, moved.document_ids.device.type) == ("meta", "meta")
