"""The picture of the experts' loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dist_mtp.cli.main import main
from dist_mtp.errors import EXIT_DONE
from dist_mtp.monitor.expert_loads import Spread
from dist_mtp.monitor.load_pictures import draw_spreads

ROW = '{"step": 10, "layer_1": [0.5, 0.75, 1.0, 1.25, 1.5]}\n'


def test_plot_draws_it_for_one_run(tmp_path: Path) -> None:
    """Without TensorBoard, too; spreads of several runs cannot lie over each other, as the lines of other charts do."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "expert_loads.jsonl").write_text(ROW)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss_main": 2.0}\n')
    runs = [str(tmp_path / name) for name in "ab"]
    for chosen in (runs[:1], runs):
        assert main(["plot", *chosen, f"out={tmp_path / str(len(chosen))}"]) == EXIT_DONE
    written = [sorted(path.name for path in (tmp_path / count).iterdir()) for count in "12"]
    assert written == [["expert_load_spread.png", "losses.png"], ["losses.png"]], written


@pytest.mark.parametrize("layers", [1, 5])
def test_every_layer_has_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Panels share their axis, which reaches to the largest load of any layer; the layers after the trunk's are modules."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    spread = Spread((1, 10), ((0.5, 0.8, 1.0, 1.2, 1.5), (0.0, 0.5, 1.0, 1.5, 3.0)))
    calm = Spread((1, 10), ((1.0,) * 5,) * 2)
    spreads = {**dict.fromkeys(range(1, layers), calm), layers: spread}
    draw_spreads(spreads, tmp_path / "a" / "picture.png", num_layers=layers)
    shown = figures[0].axes
    names = [*(f"layer {layer}" for layer in range(1, layers)), "mtp 1"]
    assert [axes.get_title(loc="left") for axes in shown] == [f"load over the mean load, {name}" for name in names]
    assert all(axes.get_ylim() == (0, pytest.approx(3.15)) for axes in shown), [axes.get_ylim() for axes in shown]
    assert (tmp_path / "a" / "picture.png").read_bytes()[:4] == b"\x89PNG"
