"""A layer whose experts are shared among ranks is the layer of one rank: outputs, gradients, traffic and waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.expert_worlds import CASES, DEGREES, EXPERTS, LATE_S, WORLD_SIZE, config_for
from support.ranks import run_ranks
from support.whole_layer import (
    BF16_BOUND,
    FP32_BOUND,
    RANKS,
    assert_equals_whole_layer,
    expected_tensor,
    group_of,
    relative_difference,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote down, from one launch."""
    folder = tmp_path_factory.mktemp("expert_layer")
    run_ranks("support.expert_worlds:world_of_4", WORLD_SIZE, folder, timeout_s=300)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in RANKS]


class TestEqualsWholeLayer:
    """With the same weights and each rank's own tokens, outputs, input gradients and the router's gradients are those of a
    rank that holds all experts; an expert's gradient is the sum over the ranks that share it.

    A breach: rows that arrive at another expert or return to another token, a dropped token, or the gradient of a rank
    that is lost or counted twice; each is a difference far above rounding.
    """

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize("case", CASES)
    def test_outputs_and_gradients(self, ranks: list[dict[str, Any]], case: str, ep: int) -> None:
        bound = BF16_BOUND if CASES[case].dtype == torch.bfloat16 else FP32_BOUND
        assert_equals_whole_layer([rank["cases"][case] for rank in ranks], ep, bound)

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize("case", CASES)
    def test_every_slot_is_processed(self, ranks: list[dict[str, Any]], case: str, ep: int) -> None:
        results = [rank["cases"][case] for rank in ranks]
        for rank in RANKS:
            sent = sum(results[other]["ids"].flatten().bincount(minlength=8) for other in group_of(rank, ep))
            mine, processed = sent.chunk(ep)[rank % ep], results[rank][f"counts {ep}"]["processed"]
            assert torch.equal(processed, mine), f"rank {rank} processed {processed.tolist()}, was sent {mine.tolist()}"
            load, ids = results[rank][f"counts {ep}"]["load"], results[rank]["ids"].flatten().bincount(minlength=8)
            assert torch.equal(load, ids), f"rank {rank} counted a load of {load.tolist()}, chose {ids.tolist()}"

    def test_cases_are_what_they_say(self, ranks: list[dict[str, Any]]) -> None:
        """In "empty experts" two of four ranks get nothing, in "all on one" three of them."""
        for case, used in (("empty experts", {0, 1, 6, 7}), ("all on one", {5})):
            chosen = {expert for rank in ranks for expert in rank["cases"][case]["ids"].flatten().tolist()}
            assert chosen == used, f"{case}: experts {chosen}, expected {used}"


class TestSameWhateverTheWay:
    """Deferring weight gradients, recomputing activations, evaluating, repeating, and interleaving microbatches as a
    pipeline does change no bit.

    A breach: a microbatch that finishes the exchange of another, or a weight gradient from another microbatch's rows.
    """

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize(
        ("variation", "reference"),
        [
            *[(each, "plain") for each in ("again", "deferred", "reentrant", "non-reentrant", "evaluated")],
            *[(each, "F0 B0 F1 B1") for each in ("F0 F1 B0 B1", "F0 F1 B1 B0")],
        ],
    )
    def test_bitwise(self, ranks: list[dict[str, Any]], variation: str, reference: str, ep: int) -> None:
        for rank in RANKS:
            found, expected = (ranks[rank]["variations"][ep][each] for each in (variation, reference))
            for name, tensor in found.items():
                difference = float((tensor - expected[name]).abs().max())
                assert torch.equal(tensor, expected[name]), f"rank {rank}, {name}: differ by up to {difference}"


class TestFp8:
    """Sharing experts changes no tile of rows, so outputs and input gradients are those of the whole layer; tiles along
    tokens have other neighbours, so experts' weight gradients differ by quantisation. Scales are powers of two: numbers that
    travel in FP8 are quantised again to what they were, along tokens too but for those that are subnormal in one tile only.

    A breach: scales of other rows, or a direction that travels in the wrong precision.
    """

    @pytest.mark.parametrize("ep", DEGREES)
    def test_shared_experts(self, ranks: list[dict[str, Any]], ep: int) -> None:
        results = [rank["fp8"][ep] for rank in ranks]
        for name in results[0]["whole"]:
            pairs = [(results[rank]["shared"][name], expected_tensor(results, name, rank, ep)) for rank in RANKS]
            bound = 2**-4 if name.startswith("experts.") else BF16_BOUND  # half a step of E4M3 at most
            difference = relative_difference(pairs)
            assert difference <= bound, f"{name}: relative difference {difference}, bound {bound}"

    @pytest.mark.parametrize("ep", DEGREES)
    def test_tokens_that_travel_in_fp8(self, ranks: list[dict[str, Any]], ep: int) -> None:
        for rank in RANKS:
            found, expected = (ranks[rank]["fp8"][ep][each] for each in ("dispatch", "shared"))
            for name in found:
                if name.startswith("experts."):
                    difference = relative_difference([(found[name], expected[name])])
                    assert difference <= 2**-9, f"rank {rank}, {name}: relative difference {difference}"
                else:
                    assert torch.equal(found[name], expected[name]), (
                        f"rank {rank}, {name}: {found[name]} != {expected[name]}"
                    )

    @pytest.mark.parametrize("ep", DEGREES)
    def test_bytes(self, ranks: list[dict[str, Any]], ep: int) -> None:
        """Of 160 bf16 numbers, 320 bytes, two ways home; to experts 256 with padding, and 2 exponents."""
        # On one rank, those that leave for experts and those that leave for home need not be as many; over all they are.
        in_bf16, in_fp8 = (sum(rank["fp8"][ep]["bytes"][i] for rank in ranks) for i in (0, 1))
        assert in_fp8 / in_bf16 == (320 + 258) / 640, f"{in_fp8} / {in_bf16}"

    @pytest.mark.parametrize("variation", ["deferred", "recomputed"])
    @pytest.mark.parametrize("ep", DEGREES)
    def test_bitwise(self, ranks: list[dict[str, Any]], ep: int, variation: str) -> None:
        for rank in RANKS:
            found, expected = (ranks[rank]["fp8"][ep][each] for each in (variation, "dispatch"))
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), f"rank {rank}, {name}: {tensor} != {expected[name]}"


class TestTraffic:
    """``traffic`` counts each row that leaves for another rank: to its expert, home, and both ways again in the backward.

    A breach: rows of the own rank counted, or a direction left out.
    """

    @pytest.mark.parametrize("ep", DEGREES)
    @pytest.mark.parametrize("case", CASES)
    def test_sent_bytes(self, ranks: list[dict[str, Any]], case: str, ep: int) -> None:
        config = config_for(ep)
        row_bytes = config.model.hidden_size * CASES[case].dtype.itemsize
        for rank in RANKS:
            rows = 0
            for other in set(group_of(rank, ep)) - {rank}:
                to_other = ranks[rank]["cases"][case]["ids"] // config.experts_per_rank == other % ep
                to_me = ranks[other]["cases"][case]["ids"] // config.experts_per_rank == rank % ep
                rows += 2 * int(to_other.sum()) + 2 * int(to_me.sum())
            found = ranks[rank]["cases"][case][f"sent bytes {ep}"]
            assert found == rows * row_bytes, f"rank {rank} counted {found} bytes, sent {rows} rows of {row_bytes}"


class TestOperations:
    """A forward and backward of the layer is the same operations for any number of experts, tokens and ranks; the host
    waits for the device once, for the sizes of the all-to-all, and never if all experts are local.

    A breach: a Python loop over experts or tokens, or a hidden synchronisation, each of which idles a GPU in every layer.
    """

    @pytest.mark.parametrize("ep", [1, *DEGREES])
    def test_constant(self, ranks: list[dict[str, Any]], ep: int) -> None:
        counts = {
            (rank, experts, tokens): counted
            for rank in RANKS
            for experts in EXPERTS
            for tokens, counted in ranks[rank]["operations"][ep, experts].items()
        }
        (first, *others) = {each["operations"] for each in counts.values()}
        assert not others, f"operations by rank, experts and tokens: {counts}"
        assert first > 50, f"only {first} operations were seen"
        waits = {key: {name: n for name, n in each.items() if name != "operations"} for key, each in counts.items()}
        expected = {} if ep == 1 else {"tolist": 1}
        wrong = {key: each for key, each in waits.items() if each != expected}
        assert not wrong, f"waits of the host by rank, experts and tokens: {wrong}, expected {expected}"


class TestWaiting:
    """The time in all-to-alls has in it that of waiting for a rank that comes late, in the forward and in the backward."""

    @pytest.mark.parametrize("phase", ["forward", "backward"])
    def test_late_rank(self, ranks: list[dict[str, Any]], phase: str) -> None:
        waited = ranks[0]["waits"][phase]
        assert waited > LATE_S / 2, f"rank 0 counted {waited} s of about {LATE_S}"
        assert ranks[1]["waits"][phase] < waited, "the late rank found its peer waiting"


class TestAgainstAutoEP:
    """Outputs and gradients are those of DeepSpeed's AutoEP with the same weights and tokens, over the same two groups of
    two ranks: an implementation with its own router, dispatch and experts."""

    def test_outputs_and_gradients(self, ranks: list[dict[str, Any]]) -> None:
        names = [set(rank["autoep"][side]) for rank in ranks for side in ("ours", "theirs")]
        assert names == names[:1] * len(names), f"tensors that only one side has: {set.union(*names) ^ names[0]}"
        for name in ranks[0]["autoep"]["ours"]:
            pairs = [(rank["autoep"]["ours"][name], rank["autoep"]["theirs"][name]) for rank in ranks]
            difference = relative_difference(pairs)
            assert difference <= FP32_BOUND, f"{name}: relative difference {difference}, bound {FP32_BOUND}"
