"""What TensorBoard shows of a run, read back with its own reader, and that losing it costs nothing else."""

import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

from dist_mtp.monitor.charts import CATEGORIES, chart_layout
from dist_mtp.monitor.run_charts import Run, lines, points_of
from dist_mtp.monitor.tags import SCALED_TAGS, STEP_SHARE_TAGS, TAGS, scalars
from dist_mtp.monitor.tensorboard import TensorBoard

ROW = {
    "step": 1, "tokens": 512, "loss": 6.5, "loss_main": 5.5, "loss_mtp_1": 5.75, "loss_mtp_2": 5.875, "mtp_weight": 0.25,
    "accept_mtp_1": 0.5, "accept_mtp_2": 0.25, "grad_norm": 1.5, "lr": 0.125, "load_max_violation": 2.5,
    "router_bias_norm": 0.75, "step_time": 0.5, "tokens_per_s": 1024.0, "tflops_per_device": 3.5, "mfu": 0.375,
    "data_wait_s": 0.0625, "memory_gib": 1.25, "eval_loss_main": 4.5, "eval_loss_mtp_1": 4.75,
    "eval_loss_mtp_2": 4.875, "eval_accept_mtp_1": 0.625, "eval_accept_mtp_2": 0.3125, "eval_bits_per_byte": 2.25,
    "load_violation_layer_1": 1.5, "load_violation_layer_10": 2.5, "loss_seq_aux": 1.125, "loss_global_aux": 1.0625,
    "loss_z": 7.5, "all_to_all_bytes": 1.5 * 2**20, "all_to_all_wait_s": 0.125, "dropped_share": 0.0078125,
    "bubble": 0.25, "bubble_plan": 0.125, "p2p_wait_s": 0.375, "pipeline_time": 0.4375, "stage_0_busy_share": 0.5, "stage_13_busy_share": 0.75,
    "memory_rank_0_gib": 1.25, "memory_rank_11_gib": 0.75,
    "fp8_underflow_experts_input": 0.03125, "fp8_underflow_mtp_projection_weight": 0.0625, "fp8_saturation_experts_grad": 0.5,
    "fp8_error_attention_grad": 0.25, "fp8_error_attention_input": 0.5, "fp8_error_attention_weight": 0.75,
    "fp8_underflow_experts_grad": 0.125, "fp8_scale_min_experts_grad": 2**-20, "fp8_scale_max_experts_grad": 2.0,
}  # fmt: skip
FP8_ROLES = ("attention_input", "attention_weight")
ROW |= {f"fp8_{quantity}_{role}": 0.5 for quantity in ("saturation", "scale_min", "scale_max") for role in FP8_ROLES}
EXPECTED = {
    "loss/total": 6.5, "loss/main": 5.5, "loss/mtp_1": 5.75, "loss/mtp_2": 5.875, "loss/mtp_weight": 0.25,
    "mtp/accept_rate_1": 0.5, "mtp/accept_rate_2": 0.25, "mtp/expected_tokens_per_step": 1 + 0.5 + 0.125,
    "optim/lr": 0.125, "optim/grad_norm": 1.5, "perf/tokens_per_s": 1024.0, "perf/step_time_s": 0.5,
    "perf/tflops_per_device": 3.5, "perf/mfu_pct": 37.5, "perf/data_wait_pct": 12.5, "moe/load_max_violation": 2.5,
    "moe/bias_norm": 0.75, "memory/peak_gib": 1.25, "eval/loss_main": 4.5, "eval/loss_mtp_1": 4.75,
    "eval/loss_mtp_2": 4.875, "eval/accept_rate_1": 0.625, "eval/accept_rate_2": 0.3125, "eval/bits_per_byte": 2.25,
    "progress/tokens": 512, "moe/load_violation/layer_01": 1.5, "moe/load_violation/layer_10": 2.5,
    "moe/loss_seq_aux": 1.125, "moe/loss_global_aux": 1.0625, "moe/loss_z": 7.5, "moe/all_to_all_mib": 1.5,
    "moe/all_to_all_wait_pct": 25.0, "moe/dropped_pct": 0.78125,
    "pipeline/bubble_pct_measured": 25.0, "pipeline/bubble_pct_theory": 12.5, "pipeline/p2p_wait_s": 0.375,
    "pipeline/time_s": 0.4375, "pipeline/stage_0_busy_pct": 50.0, "pipeline/stage_13_busy_pct": 75.0,
    "memory/rank_0_gib": 1.25, "memory/rank_11_gib": 0.75,
    "fp8/underflow_pct/experts_input": 3.125, "fp8/underflow_pct/mtp_projection_weight": 6.25,
    "fp8/underflow_pct/experts_grad": 12.5, "fp8/saturation_pct/experts_grad": 50.0,
    "fp8/error_pct/attention_grad": 25.0, "fp8/error_pct/attention_input": 50.0, "fp8/error_pct/attention_weight": 75.0,
    "fp8/scale_min/experts_grad": 2**-20, "fp8/scale_max/experts_grad": 2.0,
}  # fmt: skip
EXPECTED |= {f"fp8/saturation_pct/{role}": 50.0 for role in FP8_ROLES}
EXPECTED |= {f"fp8/scale_{end}/{role}": 0.5 for end in ("min", "max") for role in FP8_ROLES}


def start(folder, report=pytest.fail, purge_step=None):
    return TensorBoard(
        folder,
        has_mtp=True,
        has_experts=True,
        aux_losses=True,
        ep=2,
        fp8=True,
        timelines=True,
        config_text="model:\n  name: tiny",
        plan_text="stage 0: embedding",
        hparams={"optim.lr": 0.1, "model.name": "tiny", "parallel.dp": None, "debug.dump_steps": (1, 2)},
        purge_step=purge_step,
        report=report,
    )


def load(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})  # 0: all of them, not the last one
    events.Reload()
    return events


def plugin_content(events, tag):
    return events.SummaryMetadata(tag).plugin_data.content


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorboard")
    board = start(folder)
    board.write(ROW)
    imsave(folder / "plan.png", np.zeros((4, 6, 3)))
    board.add_image("plan", folder / "plan.png")
    for step in (5, 100):
        board.add_image("timeline/measured", folder / "plan.png", step)
    board.close()
    board.close()
    assert not [path for path in folder.iterdir() if path.is_dir()], "a sub-run folder would show as a second run"
    return load(folder)


def test_every_metric_is_a_scalar_under_its_tag(events):
    """Each tag reads back as a scalar with the metric's value (percentages scaled), and there are no other tags."""
    read = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert read == EXPECTED, f"differs in {dict(read.items() ^ EXPECTED.items())}"


def test_step_is_one_event(tmp_path, monkeypatch):
    """An event for each scalar would take milliseconds of every step."""
    board, events = start(tmp_path), []
    add_event = EventFileWriter.add_event
    monkeypatch.setattr(
        EventFileWriter, "add_event", lambda self, event: (events.append(event), add_event(self, event))
    )
    board.write(ROW)
    board.close()
    assert len(events) == 1, f"{len(events)} events"
    assert len(events[0].summary.value) == len(EXPECTED), events[0]


def test_no_tag_is_shared():
    """Two metrics under one tag would overwrite each other; units in a name make that easy to miss."""
    tags = [*TAGS.values(), *(tag for tag, _ in SCALED_TAGS.values()), *STEP_SHARE_TAGS.values()]
    assert len(set(tags)) == len(tags), f"{len(set(tags))} tags for {len(tags)} metrics"


def test_unknown_and_absent_metrics_are_left_out():
    """A dense model has no expert load, and a metric that nobody named a tag for must not invent one."""
    drawn = scalars({"loss": 1.0, "surprise": 2.0})
    assert drawn == {"loss/total": 1.0}, drawn


def test_all_depths_share_one_chart(events):
    """Custom Scalars has one multiline loss chart with the main head and every depth, and charts only written tags."""
    config = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(config)
    titles = {category.title for category in layout.category}
    assert titles == {"Loss", "MTP", "MoE", "Pipeline", "Throughput", "Optimizer", "Memory", "FP8"}, titles
    charts = [chart for category in layout.category for chart in category.chart]
    written = events.Tags()["scalars"]
    (loss_chart,) = [chart for chart in charts if "loss/main" in chart.multiline.tag]
    drawn = charted(written, ("Multiline", loss_chart.multiline.tag))
    assert drawn == {"loss/main", "loss/mtp_1", "loss/mtp_2"}, drawn
    for tag in (tag for chart in charts for tag in chart.multiline.tag):
        assert any(re.match(tag, name) for name in written), f"{tag} is charted but matches none of {written}"


def charted(tags, chart):
    """What the Custom Scalars tab draws: it looks up each line of a chart with ``re.match``."""
    _, lines = chart
    return {tag for tag in tags if any(re.match(line, tag) for line in lines)}


def test_layers_share_one_chart_and_so_do_auxiliary_losses():
    """A model with 58 MoE layers must not need 58 charts, and the balance of no layer may be missing from the one."""
    charts = layout(aux_losses=True)["MoE"]
    layers = {f"moe/load_violation/layer_{layer:02d}" for layer in range(3, 62)}
    drawn = charted(layers | EXPECTED.keys(), charts["largest load / mean load - 1"])
    expected = {"moe/load_max_violation", "moe/load_violation/layer_01"} | layers
    assert drawn == expected, f"differs in {drawn ^ expected}"
    drawn = charted(EXPECTED, charts["auxiliary losses, unweighted"])
    assert drawn == {"moe/loss_seq_aux", "moe/loss_global_aux", "moe/loss_z"}, drawn


def layout(**settings):
    """Of a model with MTP and experts, if ``settings`` do not say otherwise."""
    usual = {"has_mtp": True, "has_experts": True, "aux_losses": False, "ep": 1, "fp8": False, "timelines": False}
    return chart_layout(**(usual | settings))


def test_charts_are_those_the_run_fills():
    """Empty charts: none of experts for a dense model, none of the all-to-all where no rank shares its experts."""
    assert layout(has_experts=False).keys() == {"Loss", "MTP", "Throughput", "Optimizer", "Memory"}
    assert layout(has_mtp=False).keys() == {"Loss", "MoE", "Throughput", "Optimizer", "Memory"}
    added = layout(fp8=True, timelines=True).keys() - layout().keys()
    assert added == {"FP8", "Pipeline"}, added
    usual = layout()["MoE"]
    for setting, expected in (
        ({"ep": 2}, ["moe/all_to_all_mib", "moe/all_to_all_wait_pct"]),
        ({"aux_losses": True}, [r"moe/loss_(\w+)"]),
    ):
        charts = layout(**setting)["MoE"]
        tags = [tag for title in charts.keys() - usual.keys() for tag in charts[title][1]]
        assert sorted(tags) == expected, f"{setting}: {tags}"


def test_runs_share_their_charts():
    """TensorBoard adds up the layouts of all runs and knows a chart again only if it is equal: else it stands there twice."""
    everything = layout(aux_losses=True, ep=2, fp8=True, timelines=True)
    for fewer in ({"has_mtp": False}, {"has_experts": False}, {"ep": 4, "fp8": True}, {"timelines": True}):
        for category, charts in layout(**fewer).items():
            different = {title for title, chart in charts.items() if everything[category][title] != chart}
            assert not different, f"{fewer}: {category} has other lines in {different}"


def test_stages_share_one_chart_and_so_do_ranks():
    """Every stage and every pipeline rank has a line, and the peak over all ranks is not drawn as one more rank."""
    charts = layout(timelines=True)
    drawn = charted(EXPECTED, charts["Pipeline"]["time spent computing a stage, %"])
    assert drawn == {"pipeline/stage_0_busy_pct", "pipeline/stage_13_busy_pct"}, drawn
    (chart,) = charts["Memory"].values()
    drawn = charted(EXPECTED, chart)
    assert drawn == {"memory/rank_0_gib", "memory/rank_11_gib"}, drawn


def test_histograms_show_each_layers_spread_of_loads(tmp_path):
    """A layer's histogram counts its experts by load over the layer's own mean, at step 1 and every tenth."""
    board = start(tmp_path)
    load_LE = torch.tensor([[1, 3, 4, 8], [100, 100, 100, 100]], dtype=torch.float64)  # means 4 and 100
    for step in range(1, 21):
        board.write_expert_loads(step, (2, 11), load_LE)
    board.close()
    events = load(tmp_path)
    assert events.Tags()["histograms"] == ["moe/load_share/layer_02", "moe/load_share/layer_11"], events.Tags()
    steps = [event.step for event in events.Histograms("moe/load_share/layer_02")]
    assert steps == [1, 10, 20], steps
    uneven, even = (events.Histograms(tag)[-1].histogram_value for tag in events.Tags()["histograms"])
    assert (uneven.num, uneven.min, uneven.max, uneven.sum) == (4, 0.25, 2.0, 4.0), uneven
    assert (even.num, even.min, even.max) == (4, 1.0, 1.0), even


def test_histograms_tell_small_imbalance_apart(tmp_path):
    """Loads within 4 % of the mean, a well-balanced layer, still fall into bars of their own."""
    board = start(tmp_path)
    board.write_expert_loads(1, (0,), torch.tensor([[96.0, 98.0, 102.0, 104.0]]))
    board.close()
    histogram = load(tmp_path).Histograms("moe/load_share/layer_00")[0].histogram_value
    bars = sum(count > 0 for count in histogram.bucket)
    assert bars == 4, f"{bars} bars for 4 different loads: {histogram}"


def test_loads_stay_on_the_device_at_other_steps(tmp_path):
    """Waiting for the device at every step would slow training; a tensor without data raises when it is copied."""
    board = start(tmp_path)
    without_data = torch.empty(2, 4, device="meta")
    for step in range(2, 10):
        board.write_expert_loads(step, (0, 1), without_data)
    board.close()
    assert load(tmp_path).Tags()["histograms"] == []


@pytest.mark.parametrize(("tag", "line"), [("config", "  name: tiny"), ("plan", "stage 0: embedding")])
def test_texts_keep_their_lines(events, tag, line):
    """The Text tab renders Markdown: only a fenced block keeps the indentation of YAML."""
    text = events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("```", "```"), text
    assert line in lines, text


def test_plan_picture_keeps_its_size(events):
    """The image that is shown is the file that was given."""
    (image,) = events.Images("plan")
    assert (image.width, image.height) == (6, 4), f"{image.width}x{image.height}, expected 6x4"


def test_timelines_stand_at_their_steps(events):
    """The Images tab has a slider over the measured steps."""
    steps = [image.step for image in events.Images("timeline/measured")]
    assert steps == [5, 100], steps


def test_hparams_stand_in_the_runs_own_folder(events):
    """The HParams tab lists the run from its start, with settings by value and as strings where they are no scalars."""
    start_info = metadata.parse_session_start_info_plugin_data(
        plugin_content(events, metadata.SESSION_START_INFO_TAG)
    ).hparams
    read = {key: start_info[key].number_value or start_info[key].string_value for key in start_info}
    assert read == {"optim.lr": 0.1, "model.name": "tiny", "debug.dump_steps": "(1, 2)"}, read
    with pytest.raises(KeyError):  # it would fix the table's columns for all runs
        events.SummaryMetadata(metadata.EXPERIMENT_TAG)


def test_resume_hides_the_steps_that_are_trained_again(tmp_path, monkeypatch):
    """After a resume from step 2, step 3 has the new value only; without the purge it would have two points."""
    # Files of one process and second are read in the order of this counter's digits, in which 10 comes before 9. A real
    # resume is another process, later.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    board = start(tmp_path)
    for step in (1, 2, 3):
        board.write({"step": step, "loss": float(step)})
    board.close()
    board = start(tmp_path, purge_step=3)
    board.write({"step": 3, "loss": 30.0})
    board.close()
    points = [(event.step, event.value) for event in load(tmp_path).Scalars("loss/total")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0)], points


@pytest.mark.parametrize("fails", [(FileWriter, "add_summary"), (SummaryWriter, "close")])
def test_failing_write_is_reported_once(tmp_path, monkeypatch, fails):
    """A full disk ends TensorBoard, never training, and is said once, not at every step."""
    reports = []
    board = start(tmp_path, reports.append)

    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*fails, disk_full)
    for step in (1, 2, 3):
        board.write(ROW | {"step": step})
    board.close()
    assert len(reports) == 1, f"{len(reports)} reports: {reports}"
    assert "No space left on device" in reports[0], reports


@pytest.mark.parametrize("num_steps", [1, 200])
def test_failure_in_the_writers_thread_is_reported_once(tmp_path, monkeypatch, num_steps):
    """Events are written by a thread of TensorBoard's own; its real failure must reach the report and no further."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread's traceback is expected
    others = set(threading.enumerate())
    reports = []
    board = start(tmp_path / "board", reports.append)
    threads = set(threading.enumerate()) - others
    shutil.rmtree(tmp_path / "board")
    for step in range(1, num_steps + 1):
        board.write({"step": step, "loss": 1.0})
    board.close()
    for thread in threads:
        thread.join(timeout=10)
    assert threads, "TensorBoard has no writing thread any more"
    assert len(reports) == 1, f"{len(reports)} reports: {reports}"


def test_folder_that_cannot_be_made_is_reported_once(tmp_path):
    """A run whose TensorBoard never starts still trains."""
    (tmp_path / "file").write_text("")
    reports = []
    board = start(tmp_path / "file" / "tensorboard", reports.append)
    board.write(ROW)
    board.close()
    assert len(reports) == 1, f"{len(reports)} reports: {reports}"


def test_missing_picture_leaves_the_rest(tmp_path):
    """Without plan.png the scalars go on: one bad file is no reason to give TensorBoard up."""
    reports = []
    board = start(tmp_path, reports.append)
    board.add_image("plan", tmp_path / "plan.png")
    board.write(ROW)
    board.close()
    assert len(reports) == 1, f"{len(reports)} reports: {reports}"
    assert "loss/main" in load(tmp_path).Tags()["scalars"], "scalars stopped with the picture"


def test_every_metric_is_explained():
    """docs/monitoring.md has each metric and its tag, so that nobody has to read this package to know what a line is."""
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    drawn = {**TAGS, **{key: tag for key, (tag, _) in SCALED_TAGS.items()}, **STEP_SHARE_TAGS}
    for key, tag in drawn.items():
        for name in (key.format(k="K"), re.sub(r"\{k.*?\}", "KK" if "layer" in tag else "K", tag)):
            assert f"`{name}`" in page, f"{name} of {key} is not in docs/monitoring.md"


@pytest.mark.parametrize(
    "chart", [chart for category in CATEGORIES for chart in category.charts], ids=lambda c: c.title
)
def test_charts_are_the_table(chart):
    """Custom Scalars and pictures of ``dist-mtp plot`` draw the same lines, in the same unit: those of its tags."""
    drawn = {tag: value for tag, value in EXPECTED.items() if any(re.match(line, tag) for line in chart.lines)}
    found = lines(chart, points_of(Run([ROW])))
    assert sorted(value for line in found for value in line.values) == sorted(drawn.values()), chart.title
    assert ("%" in chart.title) == any("_pct" in tag for tag in drawn), f"{chart.title}: {sorted(drawn)}"


def test_charts_have_every_tag():
    """But those that are derived from, or add up, others that are drawn."""
    patterns = [line for category in CATEGORIES for chart in category.charts for line in chart.lines]
    left_out = {tag for tag in EXPECTED if not any(re.fullmatch(line, tag) for line in patterns)}
    expected = {"loss/total", "loss/mtp_weight", "eval/bits_per_byte", "progress/tokens", "memory/peak_gib"}
    assert left_out == expected | {"perf/step_time_s", "perf/tflops_per_device"}, left_out
