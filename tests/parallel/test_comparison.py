"""The comparison of runs behind every layout test and ``benchmarks/parity.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.parity import STEPS, compare

NAME = "grad/lm_head.weight"


def write_run(folder: Path, *, gradient: torch.Tensor | None = None, **metrics: float) -> Path:
    """A run folder of ``STEPS`` equal steps, but for the last one's ``gradient`` and ``metrics``."""
    rows: list[dict[str, Any]] = [{"loss": 4.0, "loss_main": 3.0, "grad_norm": 2.0} for _ in range(STEPS)]
    rows[-1] |= metrics
    (folder / "dumps").mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    for step in range(1, STEPS + 1):
        tensors = {NAME: torch.arange(1.0, 7.0), "grad/zero": torch.zeros(2), "batch/input_ids": torch.arange(4)}
        if step == STEPS and gradient is not None:
            tensors[NAME] = gradient
        save_file(tensors, folder / "dumps" / f"step_{step}.safetensors")
    return folder


def test_equal_runs_are_within_bounds(tmp_path: Path) -> None:
    difference = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert (difference.loss, difference.grad_norm, difference.gradient) == (0, 0, 0), difference
    assert difference.within_bounds()


@pytest.mark.parametrize(
    "change",
    [{"gradient": torch.arange(1.0, 7.0) * (1 + 1e-5)}, {"loss_main": 3.00003}, {"grad_norm": 2.00002}],
    ids=lambda change: next(iter(change)),
)
def test_a_difference_of_1e5_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    difference = compare(write_run(tmp_path / "a", **change), write_run(tmp_path / "b"))
    assert not difference.within_bounds(), difference
    field = next(iter(change)).removesuffix("_main")
    assert getattr(difference, field) == pytest.approx(1e-5, rel=0.05), difference


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("runs", ["a", "b", "ab"])
@pytest.mark.parametrize("place", ["loss", "loss_main", "grad_norm", "gradient"])
def test_what_is_not_finite_is_infinitely_different(tmp_path: Path, place: str, runs: str, value: float) -> None:
    """Even where both runs have it: two runs that diverged alike are not equal runs."""
    change: dict[str, Any] = {place: value}
    if place == "gradient":
        change = {place: torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, value])}
    a, b = (write_run(tmp_path / run, **(change if run in runs else {})) for run in ("a", "b"))
    difference = compare(a, b)
    assert getattr(difference, place.removesuffix("_main")) == math.inf, difference
    assert not difference.within_bounds(), difference


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    run, reference = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    save_file({"grad/zero": torch.zeros(2)}, run / "dumps" / "step_2.safetensors")
    for pair in ((run, reference), (reference, run)):
        with pytest.raises(AssertionError, match=NAME):
            compare(*pair)


def test_another_batch_is_an_error(tmp_path: Path) -> None:
    run, reference = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    tensors = {NAME: torch.arange(1.0, 7.0), "grad/zero": torch.zeros(2), "batch/input_ids": torch.arange(4) + 1}
    save_file(tensors, run / "dumps" / "step_1.safetensors")
    with pytest.raises(AssertionError, match="batch/input_ids"):
        compare(run, reference)
