"""Layouts that users write: numbers, and strings as Megatron-LM reads them."""

from __future__ import annotations

import re

import pytest
from pipeline.pipeline_cases import v_ranks

from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.layout import read_layout

ROUND_16 = tuple(range(16)) * 2


class TestStrings:
    """A string gives the units per stage that its letters say: E, a, f and L one, t two, and m none of its own."""

    @pytest.mark.parametrize(
        ("layout", "ranks", "counts"),
        [
            ("Et*3|(tt|)*29,m|L", ROUND_16, (7, *[4] * 29, 0, 1)),  # 61 layers, as in Megatron-LM's documentation
            ("Et|(tt|)*30mL", ROUND_16, (3, *[4] * 30, 1)),
            ("Ettt|(t|)*3tmL", (0, 1, 2, 3, 4), (7, 2, 2, 2, 3)),
            ("E,t*2|t*2|t*2,L", (0, 1, 2), (5, 4, 5)),
            ("(Et|(t|)*2)*1,mL", (0, 1, 2, 3), (3, 2, 2, 1)),
            ("Et(|t)*3L", (0, 1, 2, 3), (3, 2, 2, 3)),
            ("E||t|L", (0, 1, 0, 1), (1, 0, 2, 1)),
            ("Et|*3L", v_ranks(1) * 2, (3, 0, 0, 1)),
            ("Ea|ft|a|fL", v_ranks(2), (2, 3, 1, 2)),
            (" E t | t L ", (0, 1), (3, 3)),
        ],
    )
    def test_counts(self, layout: str, ranks: tuple[int, ...], counts: tuple[int, ...]) -> None:
        found, _ = read_layout(layout, ranks, sum(counts), num_depths=1)
        assert found == counts

    @pytest.mark.parametrize(
        ("layout", "notes"),
        [
            (
                "Et|t|m|L",
                [r"MTP \(m\) on stage 2, but it is computed where the head is, on stage 3; stage 2 stays empty"],
            ),
            ("Et|(t|)mm|L", [r"on stage 2, but .* on stage 3; stage 2 stays empty"]),
            ("Et|tm||L", [r"on stage 1, but it is computed where the head is, on stage 3$"]),
            ("Et|t||mL", []),
            ("Et|t||L", []),
        ],
    )
    def test_notes(self, layout: str, notes: list[str]) -> None:
        _, found = read_layout(layout, v_ranks(2), 6, num_depths=2)
        assert len(found) == len(notes), found
        for text, pattern in zip(found, notes, strict=True):
            assert re.search(pattern, text), text

    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            ("Et|t|L", "has 3 stages, parallel.pp and pipeline.placement make 4: write 3 '|'"),
            ("Et|t||tL", "has 3 layers, the model has 2: change the string so that it has 2 t"),
            ("Et|a||L", "has 1.5 layers, the model has 2"),
            ("Ea|t||fL", "layer 0 is not one a and one f in this order"),
            ("Ef|a||tL", "layer 0 is not one a and one f"),
            ("tE|t||L", "must have one E, before everything else"),
            ("Et|Et||L", "must have one E"),
            ("Et|t|L|m", "must have one L, after everything else"),
            ("Et|m||tL", "has an m before a layer: MTP comes after the last layer"),
            ("Et|t||mmmL", "has 3 m, but mtp.depth=2: write m once, 2 times or not at all"),
            ("Et|x||L", "neither auto, uniform, a list .* nor a layout string such as .*: 'x' is none of"),
            ("E*|t|tL", r"a \* has no number after it"),
            ("*3Et|t|tL", r"a \* has nothing before it"),
            ("E(t|)*1)t||L", r"a \) has no \( before it"),
            ("E(t|t||L", r"a \( has no \) after it"),
            ("Et*99999999999999|L", "has more than 100000 items"),
            ("Et|||tL|", "must have one L|has 5 stages"),
            ("|Et|t|L", "leaves the first stage without units: give it at least 1, the embedding"),
            ("Ett|||L", r"leaves pipeline rank 1 without units \(stages 1, 2\)"),
        ],
    )
    def test_refusals(self, layout: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_layout(layout, v_ranks(2), 6, num_depths=2)

    def test_m_without_mtp(self) -> None:
        with pytest.raises(ConfigError, match=r"has 1 m, but mtp\.depth=0: leave m out, or set mtp\.depth=1"):
            read_layout("Et|m|L", (0, 1, 2), 4, num_depths=0)


class TestNumbers:
    def test_stages_may_be_empty(self) -> None:
        assert read_layout("3, 2,0,3", v_ranks(2), 8) == ((3, 2, 0, 3), ())

    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            ("3,2,5", "lists 3 stages, parallel.pp and pipeline.placement make 4: list 4 numbers that add up to 10"),
            ("3,2,2,4", "places 11 units, the model has 10"),
            ("0,2,2,6", "leaves the first stage without units: give it at least 1, the embedding"),
            ("6,2,2,0", "leaves the last stage without units: give it at least 1, the head"),
            ("6,0,0,4", r"leaves pipeline rank 1 without units \(stages 1, 2\): give one of its stages at least 1"),
            ("3 3,2,2", "neither auto, uniform, a list of units per stage"),
            ("3,2,2,", "neither auto, uniform, a list of units per stage"),
            ("even", "neither auto, uniform, a list of units per stage"),
        ],
    )
    def test_refusals(self, layout: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_layout(layout, v_ranks(2), 10)
