"""TensorBoard's page over real runs, in a real browser: what users are told to look at is there, and drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.browser import missing_programs
from support.launches import dist_mtp, overrides, train
from support.tensorboard_page import Chart, TensorBoardPage, tensorboard_page

from dist_mtp.errors import EXIT_DONE

pytestmark = pytest.mark.skipif(
    bool(missing_programs()),
    reason=f"not installed: {', '.join(missing_programs())} (Debian: chromium chromium-driver)",
)

BOTH = ("model.num_layers=3", "monitor.tensorboard=true")
RUN = (
    "mtp.depth=2",
    "train.steps=10",
    "precision=fp8",
    "precision.fp8_statistics_every=4",
    "eval.every=5",
    "monitor.timeline_every=5",
)
"""Two pipeline ranks; of three layers two have experts, and so have both MTP modules."""
OTHER = ("mtp.depth=0", "train.steps=1", "parallel.pp=1", "monitor.timeline_every=0")
COLUMNS = [
    *("eval.every", "monitor.timeline_every", "mtp.depth", "parallel.pp", "precision.fp8_statistics_every"),
    *("eval/accept_rate_1", "eval/accept_rate_2", "eval/bits_per_byte", "eval/loss_main", "eval/loss_mtp_1"),
]
"""TensorBoard shows five settings, of those in which the runs differ the first, and as many results."""
FP8_KINDS = 5
"""Attention, dense feed-forward, shared and routed experts, and the projection of MTP modules."""
LINES = {
    ("Loss", "training loss, nats/token"): 3,
    ("Loss", "held-out loss, nats/token"): 3,
    ("MTP", "agreement with main head, training"): 2,
    ("MTP", "agreement with main head, held out"): 2,
    ("MTP", "expected tokens per decoding step"): 1,
    ("MoE", "largest load / mean load - 1"): 1 + 4,
    ("MoE", "router bias norm, all layers"): 1,
    ("MoE", "dropped tokens, %"): 1,
    ("Pipeline", "bubble, measured and planned, %"): 2,
    ("Pipeline", "time spent computing a stage, %"): 4,
    ("Pipeline", "time and waits of the pipeline, s"): 2,
    ("Throughput", "tokens/s, all ranks"): 1,
    ("Throughput", "share of peak FLOP/s (MFU), %"): 1,
    ("Throughput", "wait for data, % of the step"): 1,
    ("Optimizer", "learning rate"): 1,
    ("Optimizer", "gradient norm before clipping"): 1,
    ("Memory", "peak memory so far, GiB"): 2,
} | {
    ("FP8", f"{title}, {role}"): lines
    for title, lines in (
        ("values that become 0, %", FP8_KINDS),
        ("values beyond the largest or not finite, %", FP8_KINDS),
        ("relative error, %", FP8_KINDS),
        ("least and largest scale", 2 * FP8_KINDS),
    )
    for role in ("inputs", "weights", "gradients")
}
"""Category and title of each chart -> lines. The other run has no line with two points, and charts in common are there once."""
CHARTS = sorted(Chart(category, title, lines) for (category, title), lines in LINES.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two finished runs, ``cockpit`` and ``other``."""
    folder = tmp_path_factory.mktemp("cockpit")
    for name, settings in (("cockpit", RUN), ("other", OTHER)):
        (folder / "runs").mkdir(exist_ok=True)
        ended = train(dist_mtp(*overrides(folder, f"runs/{name}", *BOTH, *settings)), folder / "runs" / name)
        assert ended.code == EXIT_DONE, ended.output
    return folder / "runs"


@pytest.fixture(scope="module")
def board(runs: Path) -> Iterator[TensorBoardPage]:
    with tensorboard_page(runs, 1400, 1000) as page:
        yield page


class TestCockpit:
    """Every tab shows this run's content as elements of the page that have a size, not just as answers of the server."""

    def test_charts_have_their_lines(self, board: TensorBoardPage) -> None:
        """Losses by depth, agreement, loads, bubble, speed, memory and FP8, each quantity a line with several points."""

        drawn = board.charts(lambda charts: sorted(charts) == CHARTS)
        assert sorted(drawn) == CHARTS, f"differs in {sorted(set(drawn) ^ set(CHARTS))}, of {len(drawn)} charts"

    def test_plan_and_measured_timeline_are_pictures(self, board: TensorBoardPage) -> None:
        images = {(image.run, image.tag): image for image in board.images(3)}
        shown = {tag: image.steps for (run, tag), image in images.items() if run == "cockpit/tensorboard"}
        assert shown == {"plan": 1, "timeline/measured": 2}, f"{shown}; measured are steps 5 and 10"
        for name, image in images.items():
            assert image.width >= 1000 <= image.width > image.height > 100, f"{name}: {image}"

    def test_expert_loads_are_histograms(self, board: TensorBoardPage) -> None:
        """Two layers and two MTP modules with experts, at step 1 and at step 10."""
        drawn = {h.tag: h.steps for h in board.histograms(6) if h.run == "cockpit/tensorboard"}
        assert drawn == {f"moe/load_share/layer_{layer:02d}": 2 for layer in (1, 2, 3, 4)}, drawn

    def test_texts_are_configuration_and_plan(self, board: TensorBoardPage, runs: Path) -> None:
        texts = board.texts(4)
        config, plan = (texts["cockpit/tensorboard", f"{tag}/text_summary"] for tag in ("config", "plan"))
        assert yaml.safe_load(config) == yaml.safe_load((runs / "cockpit" / "config.yaml").read_text()), config
        assert json.loads(plan) == json.loads((runs / "cockpit" / "plan.json").read_text()), plan

    def test_table_compares_the_runs(self, board: TensorBoardPage) -> None:
        """Of some 170 settings the first columns are ones in which the runs differ, then those of the objective."""
        header, *rows = board.hparams(2)
        assert header == ["Trial ID", "Show Metrics", *COLUMNS], header
        depths = {row[0]: row[header.index("mtp.depth") - 1] for row in rows}
        assert depths == {"cockpit/tensorboard": "2.0000", "other/tensorboard": "0.0000"}, rows
