"""From plain dictionaries to frozen dataclasses: strict, with the full key in every error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.typed_config import build, nearest, valid_keys


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.5
    kind: Literal["plain", "fancy"] = "plain"


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    verbose: bool = False
    pairs: tuple[tuple[float, float], ...] = ()
    steps: tuple[int, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict)


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    return str(caught.value)


class TestConversion:
    """A value is taken when it means exactly what the field's type says, however YAML and Hydra spell it."""

    @pytest.mark.parametrize(("spelling", "expected"), [(7, 7), ("7", 7), (1e3, 1000), ("1e3", 1000), ("-2", -2)])
    def test_whole_numbers(self, spelling: object, expected: int) -> None:
        width = build(Outer, {"inner": {"width": spelling}}).inner.width
        assert width == expected, f"{spelling!r} became {width!r}, expected {expected!r}"
        assert type(width) is int, f"{spelling!r} became a {type(width).__name__}, expected int"

    @pytest.mark.parametrize(("spelling", "expected"), [(1, 1.0), ("1e-3", 1e-3), (2.5, 2.5), ("3", 3.0)])
    def test_numbers(self, spelling: object, expected: float) -> None:
        rate = build(Outer, {"inner": {"rate": spelling}}).inner.rate
        assert rate == expected, f"{spelling!r} became {rate!r}, expected {expected!r}"
        assert type(rate) is float, f"{spelling!r} became a {type(rate).__name__}, expected float"

    def test_lists_become_tuples(self) -> None:
        built = build(Outer, {"pairs": [[1e13, "0.1"], [2, 3]], "steps": ["1", 2.0]})
        assert built.pairs == ((1e13, 0.1), (2.0, 3.0)), f"pairs became {built.pairs}"
        assert built.steps == (1, 2), f"steps became {built.steps}"

    def test_text_may_look_like_a_number(self) -> None:
        name = build(Outer, {"name": 7}).name
        assert name == "7", f"7 became {name!r}, expected '7'"

    def test_absent_keys_keep_their_defaults(self) -> None:
        built = build(Outer, {"inner": {"width": 9}, "name": None})
        assert built == Outer(inner=Inner(width=9)), f"got {built}"

    def test_free_sections_are_kept_as_they_are(self) -> None:
        raw = {"a": {"b": [1, {"c": None}]}}
        built = build(Outer, {"raw": raw}).raw
        assert built == raw, f"got {built}, expected {raw}"

    def test_result_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            build(Outer, {}).name = "other"  # type: ignore[misc]


class TestRefusals:
    """What does not fit is refused with the full dotted key and the value; what is close to a valid key names it."""

    @pytest.mark.parametrize(
        ("values", "parts"),
        [
            ({"inner": {"width": "abc"}}, ["inner.width", "whole number", "'abc'"]),
            ({"inner": {"width": 2.5}}, ["inner.width", "whole number", "2.5"]),
            ({"inner": {"width": True}}, ["inner.width", "whole number", "True"]),
            ({"inner": {"width": "nan"}}, ["inner.width", "whole number", "nan"]),
            ({"inner": {"width": None}}, ["inner.width", "whole number", "None"]),
            ({"inner": {"rate": "fast"}}, ["inner.rate", "number", "'fast'"]),
            ({"inner": {"rate": False}}, ["inner.rate", "number", "False"]),
            ({"inner": {"rate": "nan"}}, ["inner.rate", "nan", "finite"]),
            ({"inner": {"rate": float("inf")}}, ["inner.rate", "inf", "finite"]),
            ({"inner": {"kind": "fancyy"}}, ["inner.kind", "fancyy", "plain, fancy", "did you mean 'fancy'?"]),
            ({"inner": 3}, ["inner", "section", "3"]),
            ({"inner": {"widht": 3}}, ["inner.widht", "did you mean 'inner.width'?"]),
            ({"verbose": "yes"}, ["verbose", "true or false", "'yes'"]),
            ({"verbose": 1}, ["verbose", "true or false", "1"]),
            ({"name": True}, ["name", "text", "True"]),
            ({"steps": 3}, ["steps", "list", "3"]),
            ({"steps": "12"}, ["steps", "list", "'12'"]),
            ({"steps": [1, "x"]}, ["steps[1]", "whole number", "'x'"]),
            ({"pairs": [[1, 2], [3]]}, ["pairs[1]", "2 entries", "1", "[3]"]),
            ({"raw": [1]}, ["raw", "section", "[1]"]),
            ({"verbos": True}, ["verbos", "did you mean 'verbose'?"]),
            ({"entirely_different": 1}, ["unknown key 'entirely_different'"]),
        ],
        ids=str,
    )
    def test_error_names_key_and_value(self, values: dict[str, Any], parts: list[str]) -> None:
        text = message(values)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{text!r} lacks {missing}"

    def test_no_suggestion_out_of_thin_air(self) -> None:
        text = message({"entirely_different": 1})
        assert "did you mean" not in text, f"{text!r} suggests something unrelated"


class TestKeys:
    """``valid_keys`` lists every dotted key of the schema; ``nearest`` finds the one that was meant."""

    def test_all_keys(self) -> None:
        keys = list(valid_keys(Outer))
        expected = ["inner", "inner.width", "inner.rate", "inner.kind", "name", "verbose", "pairs", "steps", "raw"]
        assert keys == expected, f"got {keys}, expected {expected}"

    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("train.setps", "train.steps"),
            ("steps", "train.steps"),
            ("mtp.detph", "mtp.depth"),
            ("seq_len", "train.seq_len"),
            ("trian.steps", "train.steps"),
        ],
    )
    def test_nearest(self, typed: str, meant: str) -> None:
        hint = nearest(typed, list(valid_keys(Config)))
        assert hint == f" (did you mean '{meant}'?)", f"for {typed!r} got {hint!r}, expected {meant!r}"
