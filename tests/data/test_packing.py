import doctest

import numpy as np
import pytest

from dist_mtp.data import packing
from dist_mtp.data.packing import PADDING_DOCUMENT, PackedRows
from dist_mtp.errors import DataError

LENGTHS = [5, 1, 9, 2, 13]
NUM_TOKENS = sum(LENGTHS)
TOKENS = np.arange(100, 100 + NUM_TOKENS, dtype=np.uint16)  # each id names its position
STARTS = np.cumsum(LENGTHS) - LENGTHS
DOCUMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def packed(seq_len: int, depth: int, num_tokens: int = NUM_TOKENS) -> PackedRows:
    return PackedRows(TOKENS[:num_tokens], STARTS[num_tokens > STARTS], seq_len, depth)


def all_rows(rows: PackedRows) -> tuple[np.ndarray, np.ndarray]:
    return rows.rows(np.arange(len(rows)))


SHAPES = pytest.mark.parametrize(
    ("seq_len", "num_tokens"), [(1, 30), (4, 30), (4, 29), (4, 28), (7, 30), (29, 30), (64, 30), (4, 2)]
)


class TestTargets:
    """Each token but the first is the main head's target once; depth d reads the same targets shifted by d."""

    @SHAPES
    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_each_token_is_a_target_once(self, seq_len: int, num_tokens: int, depth: int) -> None:
        input_ids, document_ids = all_rows(packed(seq_len, depth, num_tokens))
        for shift in range(1, depth + 2):
            targets = input_ids[:, shift : shift + seq_len][document_ids[:, shift : shift + seq_len] >= 0]
            expected = TOKENS[shift:num_tokens]
            assert targets.tolist() == expected.tolist(), f"shift {shift}: {targets} != {expected}"

    @SHAPES
    def test_number_of_rows(self, seq_len: int, num_tokens: int) -> None:
        for depth in range(4):
            rows, expected = len(packed(seq_len, depth, num_tokens)), int(np.ceil((num_tokens - 1) / seq_len))
            assert rows == expected, f"depth {depth}: {rows} rows != {expected}"


class TestDepthIndependence:
    """Rows of any depth begin alike: turning MTP on changes neither the main head's data nor its order."""

    @SHAPES
    def test_common_prefix(self, seq_len: int, num_tokens: int) -> None:
        plain = all_rows(packed(seq_len, 0, num_tokens))
        for depth in (1, 2, 3):
            for expected, found in zip(plain, all_rows(packed(seq_len, depth, num_tokens)), strict=True):
                prefix = found[:, : seq_len + 1]
                assert found.shape[1] == seq_len + 1 + depth, f"{found.shape[1]} != {seq_len + 1 + depth}"
                assert np.array_equal(prefix, expected), f"depth {depth}: {prefix} != {expected}"


class TestDocuments:
    """A position's document id is that of its token in the stream, and -1 with id 0 past the end."""

    @SHAPES
    def test_ids_and_padding(self, seq_len: int, num_tokens: int) -> None:
        rows = packed(seq_len, 2, num_tokens)
        input_ids, document_ids = all_rows(rows)
        positions = np.arange(len(rows))[:, None] * seq_len + np.arange(rows.row_length)
        for r, column in np.ndindex(positions.shape):
            position = positions[r, column]
            expected = (TOKENS[position], DOCUMENTS[position]) if position < num_tokens else (0, PADDING_DOCUMENT)
            found = (input_ids[r, column], document_ids[r, column])
            assert found == expected, f"row {r} column {column}: {found} != {expected}"

    def test_dtypes(self) -> None:
        for array in all_rows(packed(4, 1)):
            assert array.dtype == np.int64, f"{array.dtype} != int64"


class TestIndexing:
    """``rows`` gives any rows in any order, equal to ``row``; there is no row outside the stream."""

    def test_rows_equal_row(self) -> None:
        rows = packed(4, 1)
        indices = np.array([3, 0, 3, len(rows) - 1])
        input_ids, document_ids = rows.rows(indices)
        for at, index in enumerate(indices):
            expected = rows.row(int(index))
            assert np.array_equal(input_ids[at], expected[0]), f"{input_ids[at]} != {expected[0]}"
            assert np.array_equal(document_ids[at], expected[1]), f"{document_ids[at]} != {expected[1]}"

    @pytest.mark.parametrize("index", [-1, 8])
    def test_outside(self, index: int) -> None:
        rows = packed(4, 1)
        assert len(rows) == 8
        with pytest.raises(IndexError, match=rf"{index}.* 8 rows"):
            rows.row(index)

    def test_no_rows_asked(self) -> None:
        assert packed(4, 1).rows(np.array([], dtype=np.int64))[0].shape == (0, 6)

    def test_too_few_tokens(self) -> None:
        with pytest.raises(DataError, match="1 tokens, but a row needs at least 2"):
            packed(4, 1, num_tokens=1)


def test_docstring_example() -> None:
    """The worked example in the documentation is what the code does."""
    result = doctest.testmod(packing, extraglobs={"np": np})
    assert result.attempted > 0
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail"
