import numpy as np
import pytest

from dist_mtp.data.order import permutation, rank_slice, sample_ids


def samples(seed: int, steps: range, rows_per_step: int, num_rows: int) -> list[int]:
    return np.concatenate([sample_ids(seed, step, rows_per_step, num_rows) for step in steps]).tolist()


class TestEpochs:
    """Every run of ``num_rows`` samples from an epoch's start visits each row once, wherever batches end."""

    @pytest.mark.parametrize(("rows_per_step", "num_rows"), [(4, 12), (5, 12), (12, 12), (30, 12), (1, 1), (7, 1)])
    def test_each_row_once_per_epoch(self, rows_per_step: int, num_rows: int) -> None:
        steps = -(-3 * num_rows // rows_per_step)
        stream = samples(3, range(steps), rows_per_step, num_rows)
        for epoch in range(3):
            visited = sorted(stream[epoch * num_rows : (epoch + 1) * num_rows])
            assert visited == list(range(num_rows)), f"epoch {epoch} visits {visited}, expected 0..{num_rows - 1}"

    def test_batch_across_the_boundary(self) -> None:
        found = sample_ids(3, 2, 5, 12).tolist()  # samples 10..14: two of epoch 0, three of epoch 1
        expected = [*permutation(3, 0, 12)[10:].tolist(), *permutation(3, 1, 12)[:3].tolist()]
        assert found == expected, f"{found} != {expected}"

    def test_epochs_and_seeds_differ(self) -> None:
        orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in (0, 1, -1) for epoch in (0, 1)}
        assert len(orders) == 6, f"{len(orders)} different orders, expected 6"
        assert tuple(range(50)) not in orders


class TestPurity:
    """A step's samples depend on the arguments alone: not on earlier calls, and not on the split into steps."""

    def test_calls_in_any_order(self) -> None:
        forward = [sample_ids(7, step, 6, 20).tolist() for step in range(20)]
        permutation.cache_clear()
        backward = [sample_ids(7, step, 6, 20).tolist() for step in reversed(range(20))][::-1]
        assert forward == backward, f"{forward} != {backward}"

    def test_batch_size_does_not_change_the_sequence(self) -> None:
        small, large = samples(7, range(30), 2, 20), samples(7, range(5), 12, 20)
        assert small == large, f"{small} != {large}"

    def test_cached_order_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            permutation(7, 0, 20)[0] = 0
        sample_ids(7, 0, 20, 20)[:] = 0
        assert sorted(sample_ids(7, 0, 20, 20).tolist()) == list(range(20))

    def test_known_values(self) -> None:
        """Resume continues runs of other machines and NumPy versions: a failure here means saved runs change order."""
        found = sample_ids(1234, 0, 8, 1000).tolist()
        expected = [233, 888, 534, 296, 168, 19, 396, 895]
        assert found == expected, f"{found} != {expected}"


class TestRanks:
    """Ranks' shares, joined in rank order, are the global batch for any degree of data parallelism."""

    @pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
    def test_shares_join_to_the_batch(self, dp: int) -> None:
        ids = sample_ids(5, 4, 12, 40)
        joined = np.concatenate([rank_slice(ids, rank, dp) for rank in range(dp)])
        assert joined.tolist() == ids.tolist(), f"{joined} != {ids}"
        assert {len(rank_slice(ids, rank, dp)) for rank in range(dp)} == {12 // dp}

    @pytest.mark.parametrize(("rank", "dp"), [(0, 5), (2, 2), (-1, 2)])
    def test_impossible_share(self, rank: int, dp: int) -> None:
        with pytest.raises(ValueError, match=f"rank {rank} of {dp} in a batch of 12 rows"):
            rank_slice(np.arange(12), rank, dp)
