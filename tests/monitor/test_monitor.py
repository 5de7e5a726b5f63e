"""Rank 0's monitor says at the start and at the end what a run with experts was, and shows measured steps."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mtp.config import from_mapping, resolve
from dist_mtp.monitor.expert_loads import Spread, read_spreads
from dist_mtp.monitor.metrics import MetricsFile
from dist_mtp.monitor.monitor import RunMonitor
from dist_mtp.monitor.throughput import Throughput
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.timeline import from_marks

CORPUS = {
    "source": "texts", "unigram_entropy_nats": 3.0,
    "splits": {"train": {"tokens": 900}, "validation": {"tokens": 100}},
}  # fmt: skip
LAYERS = (1, 4)
STEPS = 2


def start(folder, ep=1, resume_step=0, **groups):
    """Monitor of a run that begins, and its plan."""
    settings = {"run": {"dir": str(folder)}, "parallel": {"dp": 4, "ep": ep}, "train": {"steps": STEPS}} | groups
    config = resolve(from_mapping(settings), vocab_size=257)
    throughput = Throughput(flops_per_token=1e6, tokens_per_step=8, peak_flops_per_s=None, num_devices=8)
    plan = make_plan(config)
    monitor = RunMonitor(config, plan, CORPUS, throughput)
    monitor.start(resume_step)
    return monitor, plan


def log(monitor, step):
    monitor.log(
        {
            "step": step, "tokens": 8 * step, "loss": 2.0, "loss_main": 2.0, "loss_mtp_1": 2.0, "lr": 0.1,
            "step_time": 0.5, "load_max_violation": 0.5, "router_bias_norm": 0.25,
        }
    )  # fmt: skip


def run(folder, capsys, ep, loads):
    """Console text of a run of :data:`STEPS` steps whose expert loads, one [layers, E] list a step, are ``loads``."""
    monitor, _ = start(folder, ep)
    for step, load_LE in enumerate(loads, start=1):
        monitor.expert_loads(step, LAYERS, torch.tensor(load_LE, dtype=torch.float64))
        log(monitor, step)
    monitor.finish()
    monitor.close()
    return capsys.readouterr().out


BALANCED = [[4, 4, 4, 4], [4, 4, 4, 4]]
UNEVEN = [[4, 4, 4, 4], [6, 1, 4, 5]]


def test_report_is_about_the_last_steps_loads(tmp_path, capsys):
    """The end report names the experts of the last step, by their layers' indices; TensorBoard has the first step's."""
    text = run(tmp_path, capsys, ep=1, loads=[BALANCED, UNEVEN])
    said = (
        "experts          max violation 0.50 over 2 layers (layer 4, expert 0), "
        "least load 0.25 of the mean (layer 4, expert 1), router bias norm 0.25\n"
    )
    assert said in text, text
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    drawn = {tag: [event.step for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    assert drawn == {"moe/load_share/layer_01": [1], "moe/load_share/layer_04": [1]}, drawn


@pytest.mark.parametrize(("ep", "said"), [(1, "2 pipeline x 4 data ranks, placement"), (2, "experts shared by 2, ")])
def test_header_says_who_shares_experts(tmp_path, capsys, ep, said):
    """Ranks that share experts are named in the layout; a run without expert parallelism says nothing about it."""
    text = run(tmp_path, capsys, ep, loads=[BALANCED, BALANCED])
    assert said in text, f"{said!r} is not in\n{text}"


def measured(plan):
    """The plan's own timeline, as if clocks had shown it."""
    events = [[e for e in plan.timeline.events if e.rank == rank] for rank in range(plan.pp)]
    return from_marks(plan.table, [[(e.start, e.start, e.end) for e in line] for line in events])


def test_measured_steps_are_files_and_images(tmp_path):
    """Each measured step leaves its numbers; the picture is of the last one, and TensorBoard has all of them."""
    monitor, plan = start(tmp_path)
    for step in (1, 2, 3):
        if step != 2:
            monitor.timeline(step, measured(plan))
        log(monitor, step)
    monitor.close()
    assert sorted(path.name for path in (tmp_path / "timelines").iterdir()) == [
        "step_00000001.json",
        "step_00000003.json",
    ]
    content = json.loads((tmp_path / "timelines" / "step_00000003.json").read_text())
    assert (content["step"], content["bubble"]) == (3, pytest.approx(plan.timeline.bubble)), content
    assert content["predicted"] == {"step_time": plan.timeline.step_time, "bubble": plan.timeline.bubble}, content
    first, last = (content["ranks"][rank]["actions"][index][0] for rank, index in ((0, 0), (plan.pp - 1, -1)))
    assert (first, last) == (str(plan.table[0][0]), str(plan.table[-1][-1])), (first, last)
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("timeline/measured")] == [1, 3]


def test_timeline_that_cannot_be_written_costs_nothing_else(tmp_path, capsys):
    """A file where the folder should be: training goes on, and the user is told."""
    monitor, plan = start(tmp_path)
    (tmp_path / "timelines").write_text("")
    monitor.timeline(1, measured(plan))
    log(monitor, 1)
    monitor.close()
    output = capsys.readouterr().out
    assert "warning: no timeline of step 1: " in output, output
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_quartiles_of_loads_need_no_tensorboard(tmp_path):
    """Eight experts in two clusters: the picture's numbers are the experts' own, at steps 1 and 10."""
    monitor, _ = start(tmp_path, monitor={"tensorboard": False})
    for step in range(1, 12):
        monitor.expert_loads(step, LAYERS, torch.tensor([[2, 6, 2, 6, 6, 2, 6, 2], [4] * 8], dtype=torch.float64))
        log(monitor, step)
    monitor.close()
    assert not (tmp_path / "tensorboard").exists()
    clusters, even = (0.5, 0.5, 1.0, 1.5, 1.5), (1.0,) * 5
    expected = {1: Spread((1, 10), (clusters,) * 2), 4: Spread((1, 10), (even,) * 2)}
    assert read_spreads(tmp_path / "expert_loads.jsonl") == expected


def test_resume_forgets_what_is_trained_again(tmp_path):
    """Loads and measured steps after the checkpoint are gone, as rows of metrics are."""
    monitor, plan = start(tmp_path)
    for step in (1, 10, 20):
        monitor.expert_loads(step, LAYERS, torch.ones(2, 8))
        monitor.timeline(step, measured(plan))
        log(monitor, step)
    monitor.close()
    start(tmp_path, resume_step=12)[0].close()
    assert [path.name for path in sorted((tmp_path / "timelines").iterdir())] == [
        "step_00000001.json",
        "step_00000010.json",
    ]
    assert read_spreads(tmp_path / "expert_loads.jsonl")[1].steps == (1, 10)


def test_failing_close_leaves_no_bar(tmp_path, monkeypatch):
    """A full disk when files are closed: the console is closed all the same, so that the error has a clean line."""
    monitor, _ = start(tmp_path)
    closed = []
    monkeypatch.setattr(
        MetricsFile, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    monkeypatch.setattr(monitor.console, "close", lambda: closed.append(True))
    with pytest.raises(OSError, match="No space left"):
        monitor.close()
    assert closed == [True]
