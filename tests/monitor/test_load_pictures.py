"""The picture of the experts' loads, from histograms as a run writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from dist_mtp.cli.main import main
from dist_mtp.errors import EXIT_DONE
from dist_mtp.monitor.load_pictures import Spread, draw_spreads, read_spreads
from dist_mtp.monitor.tensorboard import TensorBoard


def write_loads(folder: Path, layers: tuple[int, ...], *loads_LE: list[list[float]]) -> None:
    """A TensorBoard folder with these loads at steps 10, 20, ..."""
    board = TensorBoard(
        folder, has_mtp=False, has_experts=True, aux_losses=False, ep=1, fp8=False, timelines=False, config_text="",
        plan_text="", hparams={}, purge_step=None, report=pytest.fail,
    )  # fmt: skip
    for count, load_LE in enumerate(loads_LE, start=1):
        board.write_expert_loads(10 * count, layers, torch.tensor(load_LE, dtype=torch.float64))
    board.close()


def test_spread_is_that_of_the_experts(tmp_path: Path) -> None:
    """Least and largest load are exact, quartiles to within a bar; layers in order of their numbers, steps in theirs."""
    even, uneven = [float(load) for load in range(96, 105)], [100.0] * 8 + [1000.0]
    write_loads(tmp_path, (12, 3), [even, uneven], [uneven, even])
    spreads = read_spreads(tmp_path)
    assert [(layer, spread.steps) for layer, spread in spreads.items()] == [(3, (10, 20)), (12, (10, 20))], spreads
    for layer, (calm_at, wild_at) in {12: (0, 1), 3: (1, 0)}.items():
        least, low, median, high, largest = spreads[layer].quantiles_SQ[calm_at]
        assert (least, largest) == (0.96, 1.04), spreads[layer]
        assert [low, median, high] == pytest.approx([0.98, 1.0, 1.02], abs=0.005), spreads[layer]
        assert spreads[layer].quantiles_SQ[wild_at] == pytest.approx([0.5, 0.55, 0.6, 0.65, 5.0], abs=0.15), spreads[
            layer
        ]


def test_perfect_balance_has_no_spread(tmp_path: Path) -> None:
    write_loads(tmp_path, (0,), [[7.0] * 4])
    (quantiles,) = read_spreads(tmp_path)[0].quantiles_SQ
    assert quantiles == (1.0,) * 5, quantiles


def test_run_without_histograms_has_none(tmp_path: Path) -> None:
    write_loads(tmp_path / "dense", ())
    assert read_spreads(tmp_path / "dense") == read_spreads(tmp_path / "absent") == {}


def test_plot_draws_it_for_one_run(tmp_path: Path) -> None:
    """Spreads of several runs cannot lie over each other, as the lines of the other charts do."""
    for name in "ab":
        write_loads(tmp_path / name / "tensorboard", (1,), [[1.0, 3.0]])
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss_main": 2.0}\n')
    runs = [str(tmp_path / name) for name in "ab"]
    for chosen in (runs[:1], runs):
        assert main(["plot", *chosen, f"out={tmp_path / str(len(chosen))}"]) == EXIT_DONE
    written = [sorted(path.name for path in (tmp_path / count).iterdir()) for count in "12"]
    assert written == [["expert_load_spread.png", "losses.png"], ["losses.png"]], written


@pytest.mark.parametrize("layers", [1, 5])
def test_every_layer_has_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Panels share their axes, which reach to the largest load of any layer; places that are left over stay empty."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    spread = Spread((1, 10), ((0.5, 0.8, 1.0, 1.2, 1.5), (0.0, 0.5, 1.0, 1.5, 3.0)))
    calm = Spread((1, 10), ((1.0,) * 5,) * 2)
    draw_spreads({**dict.fromkeys(range(1, layers), calm), layers: spread}, tmp_path / "a" / "picture.png")
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [f"layer {layer}" for layer in range(1, layers + 1)]
    assert all(axes.get_ylim() == (0, pytest.approx(3.15)) for axes in shown), [axes.get_ylim() for axes in shown]
    assert (tmp_path / "a" / "picture.png").read_bytes()[:4] == b"\x89PNG"
