"""Which token each head predicts at each position, and how much each head counts."""

from __future__ import annotations

import pytest
import torch

from dist_mtp.config import MtpConfig
from dist_mtp.model.loss import IGNORE
from dist_mtp.model.targets import count_targets, loss_coefficients, shifted_targets

X = IGNORE


class TestShiftedTargets:
    """At position i depth k predicts token i+1+k, if i and that token lie in one document.

    A breach: a shift by one, a lost target at the end of the row, or a target in the next document.
    """

    def test_docstring_example(self) -> None:
        ids, documents = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 0, 0, 1]])
        found = shifted_targets(ids, documents, 3, 1).tolist()
        assert found == [[[2, 3, 4]], [[3, 4, X]]], f"{found} != b c d; c d IGNORE"

    def test_one_document_keeps_all_targets(self) -> None:
        """Rows carry 1+D tokens more than T, so that no depth loses any."""
        found = shifted_targets(torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64), 4, 3)[:, 0].tolist()
        assert found == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7]], found

    def test_document_ends_and_padding(self) -> None:
        """Documents of 3, 1 and 2 tokens, then padding, which has no targets though its ids are equal."""
        ids, documents = torch.arange(10, 19)[None], torch.tensor([[4, 4, 4, 5, 6, 6, -1, -1, -1]])
        found = shifted_targets(ids, documents, 6, 2)[:, 0].tolist()
        expected = [[11, 12, X, X, 15, X], [12, X, X, X, X, X], [X, X, X, X, X, X]]
        assert found == expected, f"{found} != {expected}"
        counts = count_targets(documents, 6, 2).tolist()
        assert counts == [3, 1, 0], f"{counts} != [3, 1, 0]"

    def test_padding_inside_the_row(self) -> None:
        found = shifted_targets(torch.arange(5)[None], torch.tensor([[0, -1, -1, -1, -1]]), 4, 0)[0, 0].tolist()
        assert found == [X] * 4, f"{found} != nothing"

    def test_rows_are_independent(self) -> None:
        ids = torch.arange(8).view(2, 4)
        found = shifted_targets(ids, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), 2, 1).tolist()
        assert found == [[[1, 2], [5, X]], [[2, 3], [X, X]]], found

    @pytest.mark.parametrize("depth", range(4))
    def test_counts_are_those_of_the_targets(self, depth: int) -> None:
        documents = torch.randint(3, (5, 9), generator=torch.Generator().manual_seed(1)).sort(dim=1).values - 1
        ids = torch.randint(50, documents.shape, generator=torch.Generator().manual_seed(2))
        expected = (shifted_targets(ids, documents, 8 - depth, depth) != IGNORE).sum(dim=(1, 2)).tolist()
        found = count_targets(documents, 8 - depth, depth).tolist()
        assert found == expected, f"{found} != {expected}"


class TestCoefficients:
    """Main mean plus lambda / D times the sum of the depths' means (arXiv 2412.19437, equations 24 and 25)."""

    def test_valid(self) -> None:
        found = loss_coefficients([10, 8, 5], MtpConfig(depth=2), 0.3, positions=16)
        assert found == pytest.approx([1 / 10, 0.15 / 8, 0.15 / 5], rel=1e-15), found

    def test_paper(self) -> None:
        """Depths are divided by all positions; the main loss stays a mean over its targets."""
        found = loss_coefficients([10, 8, 5], MtpConfig(depth=2, normalize="paper"), 0.3, positions=16)
        assert found == pytest.approx([1 / 10, 0.15 / 16, 0.15 / 16], rel=1e-15), found

    def test_without_mtp(self) -> None:
        found = loss_coefficients([10], MtpConfig(depth=0), 0.3, positions=16)
        assert found == [0.1], f"{found} != [0.1]"

    def test_heads_without_targets(self) -> None:
        """No division by zero; the loss sum of such a head is zero."""
        found = loss_coefficients([0, 0], MtpConfig(depth=1), 0.3, positions=16)
        assert found == [1.0, 0.3], f"{found} != [1, 0.3]"


class TestSchedule:
    """lambda changes once a threshold's tokens have been trained on."""

    @pytest.mark.parametrize(
        ("tokens", "expected"), [(0, 0.3), (999, 0.3), (1000, 0.1), (1999, 0.1), (2000, 0.0), (10**14, 0.0)]
    )
    def test_steps(self, tokens: int, expected: float) -> None:
        mtp = MtpConfig(loss_weight=0.3, loss_weight_steps=((1000, 0.1), (2000, 0.0)))
        found = mtp.loss_weight_at(tokens)
        assert found == expected, f"lambda after {tokens} tokens: {found} != {expected}"

    def test_constant(self) -> None:
        assert MtpConfig(loss_weight=0.25).loss_weight_at(10**15) == 0.25
