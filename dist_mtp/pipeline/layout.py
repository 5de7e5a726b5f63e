"""Layouts that users write down: units per stage as numbers, or as a layout string.

Layout strings are those of Megatron-LM's ``--pipeline-model-parallel-layout`` (its
``megatron/core/transformer/pipeline_parallel_layer_layout.py``), with two letters more::

    layout = { item [ "*" number ] | "," }
    item   = "E" | "t" | "a" | "f" | "m" | "L" | "|" | "(" layout ")"

======  ==========================================================
``E``   embedding
``t``   one layer of the trunk
``a``   attention half of a layer (not in Megatron-LM)
``f``   feed-forward half of a layer (not in Megatron-LM)
``m``   MTP modules
``L``   output head and loss
``|``   end of a stage
======  ==========================================================

``*n`` repeats the item before it, commas and blanks mean nothing, and stages may be empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dist_mtp.errors import ConfigError

_MOST_ITEMS = 100_000
"""Of an expanded string: more than any model has, and quick to refuse."""
_HALVES = {"t": "af", "a": "a", "f": "f"}
_EXAMPLE = "Et*3|(tt|)*29,m|L"


def read_layout(
    layout: str, stage_to_rank: Sequence[int], num_units: int, num_depths: int | None = None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Units of each stage.

    >>> read_layout("3,0,2,3", (0, 1, 1, 0), 8)
    ((3, 0, 2, 3), ())
    >>> read_layout("Et|ta|f|tmL", (0, 1, 1, 0), 10)
    ((3, 3, 1, 3), ())

    Args:
        layout: ``3,2,2,3`` or a layout string.
        stage_to_rank: rank of each stage.
        num_units: of the model: embedding, two per layer, and head with MTP.
        num_depths: MTP depths; None leaves ``m`` unchecked.

    Returns:
        Counts, and notes to the user about what was not followed to the letter.

    Raises:
        ConfigError: the layout is no such text, or does not fit the model, the number of stages, or the rule that the first
            and the last stage and every rank hold something.
    """
    notes: tuple[str, ...] = ()
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", layout):
        counts = _numbers(layout, len(stage_to_rank), num_units)
    else:
        counts, notes = _string(layout, len(stage_to_rank), num_units, num_depths)
    _check_ranks(layout, counts, stage_to_rank)
    return counts, notes


def _numbers(layout: str, num_stages: int, num_units: int) -> tuple[int, ...]:
    counts = tuple(int(part) for part in layout.split(","))
    if len(counts) != num_stages:
        raise ConfigError(
            f"pipeline.layout={layout} lists {len(counts)} stages, parallel.pp and pipeline.placement make {num_stages}: "
            f"list {num_stages} numbers that add up to {num_units}"
        )
    if sum(counts) != num_units:
        raise ConfigError(
            f"pipeline.layout={layout} places {sum(counts)} units, the model has {num_units} (embedding, two per layer, "
            f"and head): change the list so that it adds up to {num_units}"
        )
    return counts


def _check_ranks(layout: str, counts: Sequence[int], stage_to_rank: Sequence[int]) -> None:
    for place, stage, unit in (("first", 0, "embedding"), ("last", len(counts) - 1, "head")):
        if counts[stage] < 1:
            raise ConfigError(
                f"pipeline.layout={layout} leaves the {place} stage without units: give it at least 1, the {unit}"
            )
    for rank in range(max(stage_to_rank) + 1):
        stages = [stage for stage, owner in enumerate(stage_to_rank) if owner == rank]
        if not any(counts[stage] for stage in stages):
            raise ConfigError(
                f"pipeline.layout={layout} leaves pipeline rank {rank} without units (stages {', '.join(map(str, stages))}): "
                "give one of its stages at least 1, or lower parallel.pp"
            )


def _string(
    layout: str, num_stages: int, num_units: int, num_depths: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    items = _expand(layout)
    stages = "".join(items).split("|")
    flat = "".join(stages)
    if flat[:1] != "E" or flat.count("E") != 1:
        raise ConfigError(f"pipeline.layout={layout} must have one E, before everything else")
    if flat[-1:] != "L" or flat.count("L") != 1:
        raise ConfigError(f"pipeline.layout={layout} must have one L, after everything else")
    trunk = flat.rstrip("L").rstrip("m")[1:]
    if "m" in trunk:
        raise ConfigError(f"pipeline.layout={layout} has an m before a layer: MTP comes after the last layer")
    _check_depths(layout, flat.count("m"), num_depths)

    halves = "".join(_HALVES[letter] for letter in trunk)
    for index, half in enumerate(halves):
        if half != "af"[index % 2]:
            raise ConfigError(
                f"pipeline.layout={layout}: layer {index // 2} is not one a and one f in this order: write a and f in turns, "
                "and t between pairs of them"
            )
    if len(halves) != num_units - 2:
        whole = (num_units - 2) // 2
        raise ConfigError(
            f"pipeline.layout={layout} has {len(halves) / 2:g} layers, the model has {whole}: change the string so that it "
            f"has {whole} t"
        )
    if len(stages) != num_stages:
        raise ConfigError(
            f"pipeline.layout={layout} has {len(stages)} stages, parallel.pp and pipeline.placement make {num_stages}: write "
            f"{num_stages - 1} '|', or change parallel.pp or pipeline.stages_per_rank"
        )
    counts = tuple(
        sum(len(_HALVES[letter]) for letter in stage if letter in _HALVES) + stage.count("E") + stage.count("L")
        for stage in stages
    )
    return counts, _notes(stages, counts)


def _check_depths(layout: str, found: int, num_depths: int | None) -> None:
    if num_depths == 0 and found:
        raise ConfigError(
            f"pipeline.layout={layout} has {found} m, but mtp.depth=0: leave m out, or set mtp.depth={found}"
        )
    if num_depths is not None and found not in (0, 1, num_depths):
        raise ConfigError(
            f"pipeline.layout={layout} has {found} m, but mtp.depth={num_depths}: write m once, {num_depths} times or not at "
            "all"
        )


def _notes(stages: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    last = len(stages) - 1
    notes = []
    for stage in range(last):
        if "m" in stages[stage]:
            empty = f"; stage {stage} stays empty" if counts[stage] == 0 else ""
            notes.append(
                f"pipeline.layout puts MTP (m) on stage {stage}, but it is computed where the head is, on stage {last}{empty}"
            )
    return tuple(notes)


def _expand(layout: str) -> list[str]:
    """One letter or ``|`` an item, repetitions written out."""

    def fail(what: str) -> ConfigError:
        return ConfigError(
            f"pipeline.layout={layout} is neither auto, uniform, a list of units per stage such as 3,2,2,3, nor a layout "
            f"string such as {_EXAMPLE}: {what}"
        )

    tokens = re.findall(r"\d+|\S", layout.replace(",", " "))
    open_groups: list[list[str]] = [[]]
    item: list[str] | None = None  # what a * would repeat
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token == "(":
            open_groups.append([])
            item = None
            continue
        if token == "*":
            if item is None:
                raise fail("a * has nothing before it to repeat")
            if position == len(tokens) or not tokens[position].isdecimal():
                raise fail("a * has no number after it")
            times = int(tokens[position][:9])
            position += 1
            if len(item) * times > _MOST_ITEMS:
                raise fail(f"it has more than {_MOST_ITEMS} items")
            del open_groups[-1][len(open_groups[-1]) - len(item) :]
            open_groups[-1].extend(item * times)
            item = None
            continue
        if token == ")":
            if len(open_groups) == 1:
                raise fail("a ) has no ( before it")
            item = open_groups.pop()
        elif token in "EtafmL|":
            item = [token]
        else:
            raise fail(f"'{token}' is none of E t a f m L | * ( )")
        open_groups[-1].extend(item)
    if len(open_groups) > 1:
        raise fail("a ( has no ) after it")
    return open_groups[0]
