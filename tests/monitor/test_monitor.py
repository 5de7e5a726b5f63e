"""Rank 0's monitor says at the start and at the end what a run with experts was."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mtp.config import from_mapping, resolve
from dist_mtp.monitor.monitor import RunMonitor
from dist_mtp.monitor.throughput import Throughput
from dist_mtp.pipeline.plan import make_plan

CORPUS = {
    "source": "texts", "unigram_entropy_nats": 3.0,
    "splits": {"train": {"tokens": 900}, "validation": {"tokens": 100}},
}  # fmt: skip
LAYERS = (1, 4)
STEPS = 2


def run(folder, capsys, ep, loads):
    """Console text of a run of :data:`STEPS` steps whose expert loads, one [layers, E] list a step, are ``loads``."""
    config = resolve(
        from_mapping({"run": {"dir": str(folder)}, "parallel": {"dp": 4, "ep": ep}, "train": {"steps": STEPS}}),
        vocab_size=257,
    )
    throughput = Throughput(flops_per_token=1e6, tokens_per_step=8, peak_flops_per_s=None, num_devices=8)
    monitor = RunMonitor(config, make_plan(config), CORPUS, throughput)
    monitor.start(resume_step=0)
    for step, load_LE in enumerate(loads, start=1):
        monitor.expert_loads(step, LAYERS, torch.tensor(load_LE, dtype=torch.float64))
        monitor.log(
            {
                "step": step, "tokens": 8 * step, "loss": 2.0, "loss_main": 2.0, "loss_mtp_1": 2.0, "lr": 0.1,
                "step_time": 0.5, "load_max_violation": 0.5, "router_bias_norm": 0.25,
            }
        )  # fmt: skip
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
