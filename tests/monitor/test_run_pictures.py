"""What ``dist-mtp plot`` draws: which charts a run has numbers for, and which lines are in them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from dist_mtp.monitor.charts import CATEGORIES
from dist_mtp.monitor.run_charts import Run, lines, points_of
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
FULL[2] |= {
    "all_to_all_wait_s": 0.25,
    "step_time": 0.5,
    "data_wait_s": 0.125,
    "dropped_share": 0.0,
    "loss_seq_aux": 2.0,
}
FULL[1] |= {"fp8_saturation_experts_grad": 0.0, "fp8_underflow_experts_grad": 0.0}
FULL[1] |= {"bubble": 0.25, "bubble_plan": 0.125, "stage_2_busy_share": 0.5, "stage_10_busy_share": 0.25}
FULL[1] |= {"fp8_error_experts_input": 0.125, "fp8_error_attention_input": 0.25, "fp8_error_mtp_projection_grad": 0.5}


def panel(title: str) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    (found,) = [chart for category in CATEGORIES for chart in category.charts if chart.title.startswith(title)]
    return [(line.label, line.steps, line.values) for line in lines(found, points_of(Run(FULL)), num_layers=12)]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        (
            "training loss",
            [("main", (1, 2, 3), (3.0, 2.0, 1.0)), ("mtp 1", (1, 2, 3), (3.0,) * 3), ("mtp 2", (1, 2, 3), (2.0,) * 3)],
        ),
        (
            "agreement with main head, training",
            [("mtp 1", (1, 2, 3), (0.5,) * 3), ("mtp 2", (1, 2, 3), (0.5,) * 3)],
        ),
        ("expected tokens", [("all depths", (1, 2, 3), (1.75,) * 3)]),
        (
            "largest load",
            [("worst layer", (1, 2, 3), (1.0,) * 3), ("layer 3", (3,), (0.5,)), ("mtp 1", (3,), (1.0,))],
        ),
        ("auxiliary losses", [("seq aux loss", (3,), (2.0,))]),
        ("all-to-all", [("all ranks", (3,), (2.0,))]),
        ("wait for all-to-all", [("slowest rank", (3,), (50.0,))]),
        ("wait for data", [("rank 0", (3,), (25.0,))]),
        ("dropped", [("all layers", (3,), (0.0,))]),
        ("bubble", [("measured", (2,), (25.0,)), ("plan", (2,), (12.5,))]),
        ("time spent", [("stage 2", (2,), (50.0,)), ("stage 10", (2,), (25.0,))]),
        ("relative error, %, inputs", [("attention", (2,), (25.0,)), ("experts", (2,), (12.5,))]),
        ("relative error, %, gradients", [("mtp projection", (2,), (50.0,))]),
        ("held-out loss", []),
    ],
)
def test_lines(title: str, expected: list[object]) -> None:
    """Depths, layers, stages and ranks in order of their numbers, at the steps that have them, in units of their tags."""
    assert panel(title) == expected, panel(title)


class TestPictures:
    """One PNG per chart that some run has numbers for; runs lie over each other and are told apart by the legend."""

    def test_charts_without_numbers_are_skipped(self, tmp_path: Path) -> None:
        written = [path.name for path in draw_runs({"dense": Run(DENSE)}, tmp_path / "a" / "b")]
        assert written == ["losses.png", "throughput.png", "optimizer.png"], written
        assert sorted(written) == sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
        written = [path.name for path in draw_runs({"dense": Run(DENSE), "full": Run(FULL)}, tmp_path / "c")]
        assert written == [f"{category.name}.png" for category in CATEGORIES], written

    def test_several_runs_are_overlaid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_args, **_options: figures.append(self))
        draw_runs({"dense": Run(DENSE), "full": Run(FULL)}, tmp_path)
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
        rows = [{"step": i, "fp8_error_experts_input": value} for i, value in enumerate(values)]
        draw_runs({"fp8": Run(rows)}, tmp_path)
        (axes,) = figures[0].axes
        assert axes.get_yscale() == scale, f"{values}: {axes.get_yscale()}"

    def test_legend_has_what_titles_leave_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Depths need one; the quantity that has axes of its own is named by their title."""
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_runs({"full": Run(FULL)}, tmp_path)
        acceptance = figures[[category.name for category in CATEGORIES].index("mtp")]
        assert len(acceptance.axes) == 2, f"{len(acceptance.axes)} panels, of agreement and of expected tokens"
        (legend,) = acceptance.legends
        assert [text.get_text() for text in legend.get_texts()] == ["mtp 1", "mtp 2"]

    @pytest.mark.parametrize("several", ["runs", "ranks"])
    def test_many_lines_have_colours_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: str
    ) -> None:
        """Sixteen runs, or sixteen lines of one: no two of them look alike, to the eye."""
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        if several == "runs":
            draw_runs({f"run {place}": Run(DENSE) for place in range(16)}, tmp_path)
        else:
            row = {f"memory_rank_{rank}_gib": 1.0 for rank in range(16)}
            draw_runs({"run": Run([{"step": step} | row for step in (1, 2)])}, tmp_path)
        colours = [to_rgb(line.get_color()) for line in figures[0].axes[0].lines]
        assert len(colours) == 16, colours
        closest = min(math.dist(one, other) for one, other in itertools.combinations(colours, 2))
        assert closest > 0.1, f"{closest} between two colours of {colours}"

    def test_axes_begin_at_zero(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shares, seconds and sizes do, also where all values are 0; losses do not."""
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_runs({"full": Run(FULL)}, tmp_path)
        limits = {axes.get_title(loc="left"): axes.get_ylim() for figure in figures for axes in figure.axes}
        assert limits["dropped tokens, %"] == (0, 1), limits
        assert limits["wait for data, % of the step"] == pytest.approx((0, 1.05 * 25)), limits
        raised = {title for title, (bottom, _) in limits.items() if bottom != 0}
        assert raised == {"training loss, nats/token", "expected tokens per decoding step"}, raised

    def test_fits_a_column_of_a_paper(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three panels are as wide as a page's text, and a title is never wider than its panel."""
        figures: list[Figure] = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
        draw_runs({"full": Run(FULL)}, tmp_path)
        for figure in figures:
            width = figure.get_figwidth()
            assert width <= 7, f"{width} inches"
            edges = sorted(axes.get_position().x0 * width for axes in figure.axes)
            for axes in figure.axes:
                title = axes.get_window_extent().x0 / figure.dpi, _title_end(axes) / figure.dpi
                following = min((edge for edge in edges if edge > title[0] + 0.1), default=width)
                assert title[1] <= following, f"{axes.get_title(loc='left')!r} from {title}, next panel at {following}"


def _title_end(axes: Axes) -> float:
    """Right edge of the title, in pixels."""
    (title,) = [
        text for text in axes.get_children() if isinstance(text, Text) and text.get_text() == axes.get_title("left")
    ]
    return title.get_window_extent().x1
