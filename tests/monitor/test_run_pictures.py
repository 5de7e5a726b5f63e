"""What ``dist-mtp plot`` draws: which charts a run has numbers for, and which lines are in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dist_mtp.monitor.run_charts import CHARTS, lines, with_derived
from dist_mtp.monitor.run_pictures import draw_runs

DENSE = [{"step": step, "loss_main": 4.0 - step, "lr": 0.1, "tokens_per_s": 100.0} for step in (1, 2, 3)]
FULL = [
    row
    | {
        "loss_mtp_1": 3.0,
        "loss_mtp_2": 2.0,
        "accept_mtp_1": 0.5,
        "accept_mtp_2": 0.5,
        "load_max_violation": 1.0,
        "memory_rank_0_gib": 1.0,
    }
    for row in DENSE
]
FULL[2] |= {"load_violation_layer_3": 0.5, "load_violation_layer_12": 1.0, "all_to_all_bytes": 2.0**21}
FULL[1] |= {"bubble": 0.25, "bubble_plan": 0.125, "stage_2_busy_share": 0.5, "stage_10_busy_share": 0.25}
FULL[1] |= {"fp8_error_experts_input": 0.125, "fp8_error_attention_input": 0.25, "fp8_error_mtp_projection_grad": 0.5}


def panel(title: str) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    (found,) = [panel for chart in CHARTS for panel in chart.panels if panel.title.startswith(title)]
    return [(line.label, line.steps, line.values) for line in lines(found, [with_derived(row) for row in FULL])]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        (
            "training loss",
            [("main", (1, 2, 3), (3.0, 2.0, 1.0)), ("mtp 1", (1, 2, 3), (3.0,) * 3), ("mtp 2", (1, 2, 3), (2.0,) * 3)],
        ),
        ("agreement", [("mtp 1", (1, 2, 3), (50.0,) * 3), ("mtp 2", (1, 2, 3), (50.0,) * 3)]),
        ("expected tokens", [("all depths", (1, 2, 3), (1.75,) * 3)]),
        ("largest load", [("layer 3", (3,), (0.5,)), ("layer 12", (3,), (1.0,))]),
        ("all-to-all", [("sent", (3,), (2.0,))]),
        ("bubble", [("measured", (2,), (25.0,)), ("plan", (2,), (12.5,))]),
        ("time in which", [("stage 2", (2,), (50.0,)), ("stage 10", (2,), (25.0,))]),
        ("relative error", [("inputs", (2,), (25.0,)), ("gradients", (2,), (50.0,))]),
        ("held-out loss", []),
    ],
)
def test_lines(title: str, expected: list[object]) -> None:
    """Depths, stages and ranks in order of their numbers, at the steps that have them; of kinds of layers the worst."""
    assert panel(title) == expected, panel(title)


class TestPictures:
    """One PNG per chart that some run has numbers for; runs lie over each other and are told apart by the legend."""

    def test_charts_without_numbers_are_skipped(self, tmp_path: Path) -> None:
        written = [path.name for path in draw_runs({"dense": DENSE}, tmp_path / "a" / "b")]
        assert written == ["losses.png", "throughput.png", "optimizer.png"], written
        assert sorted(written) == sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
        written = [path.name for path in draw_runs({"dense": DENSE, "full": FULL}, tmp_path / "c")]
        assert written == [f"{chart.name}.png" for chart in CHARTS], written

    def test_several_runs_are_overlaid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_args, **_options: figures.append(self))
        draw_runs({"dense": DENSE, "full": FULL}, tmp_path)
        losses = figures[0]
        (axes,) = losses.axes  # no panel of held-out losses: there are none
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(looks)) == len(looks) == 4, f"main of both runs and two depths of one: {looks}"
        assert looks[0][0] != looks[1][0], looks
        assert looks[0][1] == looks[1][1], f"one quantity has one dash pattern: {looks}"
        (legend,) = losses.legends
        assert [text.get_text() for text in legend.get_texts()] == ["dense", "full", "main", "mtp 1", "mtp 2"]

    @pytest.mark.parametrize(
        ("values", "scale"), [((0.25, 0.125), "linear"), ((0.25, 0.0), "linear"), ((0.25, 0.0125), "log")]
    )
    def test_losses_of_fp8_over_decades(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], scale: str
    ) -> None:
        """A logarithmic axis only where it has ticks to read and every value a place."""
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_runs({"fp8": [{"step": i, "fp8_error_experts_input": value} for i, value in enumerate(values)]}, tmp_path)
        (axes,) = figures[0].axes
        assert axes.get_yscale() == scale, f"{values}: {axes.get_yscale()}"

    def test_legend_has_what_titles_leave_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Depths need one; the quantity that has axes of its own is named by their title."""
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_runs({"full": FULL}, tmp_path)
        acceptance = figures[[chart.name for chart in CHARTS].index("acceptance")]
        assert len(acceptance.axes) == 2, f"{len(acceptance.axes)} panels, of agreement and of expected tokens"
        (legend,) = acceptance.legends
        assert [text.get_text() for text in legend.get_texts()] == ["mtp 1", "mtp 2"]
