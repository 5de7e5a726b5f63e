"""The DeepEP adapter, on a stand-in of the library (``tests/support/fake_deep_ep.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.expert_worlds import CASES, DEEPEP_CASES, DEGREES, WORLD_SIZE
from support.ranks import run_ranks
from support.whole_layer import BF16_BOUND, FP32_BOUND, RANKS, assert_equals_whole_layer, relative_difference


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote down, from one launch."""
    folder = tmp_path_factory.mktemp("deepep")
    run_ranks("support.expert_worlds:world_with_deepep", WORLD_SIZE, folder, timeout_s=300)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in RANKS]


class TestDeepEP:
    """Through the adapter, a layer is that of a rank which holds all experts, as in ``test_expert_layer.py``, although rows
    of an expert arrive in any order.

    A breach: routing weights that are left out, applied twice or without gradient, rows counted by the wrong sums, or rows
    of a long buffer read that never arrived.
    """

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize("padding", [0, 5])
    @pytest.mark.parametrize("case", DEEPEP_CASES)
    def test_outputs_and_gradients(self, ranks: list[dict[str, Any]], case: str, padding: int, ep: int) -> None:
        bound = BF16_BOUND if CASES[case].dtype == torch.bfloat16 else FP32_BOUND
        assert_equals_whole_layer([rank["cases"][case, padding] for rank in ranks], ep, bound)

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize("padding", [0, 5])
    def test_only_rows_that_arrived(self, ranks: list[dict[str, Any]], padding: int, ep: int) -> None:
        for rank in RANKS:
            rows, ends = ranks[rank]["received"][ep, padding]
            assert len(rows) == ends[-1], f"rank {rank}: {len(rows)} rows, the last expert's end at {ends[-1]}"
            assert rows.isfinite().all(), f"rank {rank}: rows that no token filled"

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize(
        ("variation", "reference"),
        [
            *[(each, "plain") for each in ("deferred", "reentrant", "evaluated")],
            *[(each, "F0 B0 F1 B1") for each in ("F0 F1 B0 B1", "F0 F1 B1 B0")],
        ],
    )
    def test_variations(self, ranks: list[dict[str, Any]], variation: str, reference: str, ep: int) -> None:
        """Each backward replays its own forward's handle, whichever was dispatched last."""
        results = [rank["variations"][ep] for rank in ranks]
        for name in results[0][variation]:
            difference = relative_difference((each[variation][name], each[reference][name]) for each in results)
            assert difference <= FP32_BOUND, f"{name}: relative difference {difference}, bound {FP32_BOUND}"
