"""``expert_loads.jsonl``: exact quantiles of each layer's loads, whatever else the run writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_mtp.monitor.expert_loads import ExpertLoadsFile, Spread, read_spreads


def write_loads(folder: Path, layers: tuple[int, ...], *loads_LE: list[list[float]], resume: int | None = None) -> Path:
    """A run folder's file with these loads at every tenth step after ``resume``."""
    path = folder / "expert_loads.jsonl"
    file = ExpertLoadsFile(path, resume)
    for count, load_LE in enumerate(loads_LE, start=1):
        file.write((resume or 0) + 10 * count, layers, torch.tensor(load_LE, dtype=torch.float64))
    file.close()
    return path


def test_two_clusters(tmp_path: Path) -> None:
    """Four experts at half the mean load and four at one and a half: no quartile lies between them, the median does."""
    path = write_loads(tmp_path, (3,), [[50.0, 150.0, 50.0, 150.0, 150.0, 50.0, 150.0, 50.0]])
    spreads = read_spreads(path)
    assert spreads == {3: Spread((10,), ((0.5, 0.5, 1.0, 1.5, 1.5),))}, spreads


def test_layers_and_steps_in_order(tmp_path: Path) -> None:
    """Each layer is compared with its own mean, and an expert without tokens has load 0."""
    even, uneven = [float(load) for load in range(96, 105)], [0.0] * 8 + [900.0]
    spreads = read_spreads(write_loads(tmp_path, (12, 3), [even, uneven], [uneven, even]))
    calm, wild = (0.96, 0.98, 1.0, 1.02, 1.04), (0.0, 0.0, 0.0, 0.0, 9.0)
    assert list(spreads) == [3, 12], spreads
    assert spreads == {12: Spread((10, 20), (calm, wild)), 3: Spread((10, 20), (wild, calm))}, spreads


def test_resume_forgets_what_is_trained_again(tmp_path: Path) -> None:
    write_loads(tmp_path, (0,), [[1.0, 3.0]], [[1.0, 3.0]], [[1.0, 3.0]])
    path = write_loads(tmp_path, (0,), [[2.0, 2.0]], resume=10)
    (spread,) = read_spreads(path).values()
    assert spread.steps == (10, 20), spread
    assert [quantiles[-1] for quantiles in spread.quantiles_SQ] == [1.5, 1.0], spread


def test_loads_stay_on_the_device_at_other_steps(tmp_path: Path) -> None:
    """Steps 1, 10 and 20 are kept; a tensor without data, which the others get, raises when it is copied."""
    file = ExpertLoadsFile(tmp_path / "loads", None)
    without_data, load_LE = torch.empty(1, 4, device="meta"), torch.ones(1, 4)
    for step in range(1, 21):
        file.write(step, (0,), load_LE if step in (1, 10, 20) else without_data)
    file.close()
    assert read_spreads(tmp_path / "loads")[0].steps == (1, 10, 20)


def test_run_without_experts_has_none(tmp_path: Path) -> None:
    assert read_spreads(tmp_path / "absent") == {}


@pytest.mark.parametrize("device_dtype", [torch.float32, torch.int64])
def test_any_kind_of_count(tmp_path: Path, device_dtype: torch.dtype) -> None:
    file = ExpertLoadsFile(tmp_path / "loads", None)
    file.write(1, (0,), torch.tensor([[1, 3]], dtype=device_dtype))
    file.close()
    assert read_spreads(tmp_path / "loads")[0].quantiles_SQ == ((0.5, 0.75, 1.0, 1.25, 1.5),)
