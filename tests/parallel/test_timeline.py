"""Measured steps: on real ranks, and what the clock does with the events of a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from support.parity import STEPS, Variant, make_config, write_corpus
from support.ranks import run_ranks
from support.timeline_world import LATE_S, LAYOUT, SLOW_S, memory_gib, world_of_4

import dist_mtp.trainer
from dist_mtp.config import from_mapping
from dist_mtp.monitor.metrics import comparable
from dist_mtp.parallel.timeline import Clock
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.trainer import Trainer

RANKS = range(LAYOUT.pp * LAYOUT.dp)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timeline")
    write_corpus(path / "text")
    run_ranks(f"{world_of_4.__module__}:{world_of_4.__name__}", len(RANKS), path / "ranks", timeout_s=180)
    return path / "ranks"


def read(folder: Path, name: str, rank: int) -> Any:
    return json.loads((folder / f"{name}.rank_{rank}.json").read_text())


class TestMeasuredSteps:
    """A measured step says when which rank computed what, and trains the same numbers."""

    @pytest.mark.parametrize("rank", RANKS)
    def test_measuring_changes_no_number(self, folder: Path, rank: int) -> None:
        plain, measured = (read(folder, name, rank)["rows"] for name in ("plain", "measured"))
        assert [comparable(row) for row in measured] == [comparable(row) for row in plain]
        measured_keys = {"bubble", "bubble_plan", "pipeline_time", "p2p_wait_s"}
        measured_keys |= {f"stage_{stage}_busy_share" for stage in range(4)}
        for row, other in zip(measured, plain, strict=True):
            assert row.keys() - other.keys() == measured_keys, row.keys() ^ other.keys()

    @pytest.mark.parametrize("rank", RANKS)
    def test_every_action_has_its_time(self, folder: Path, rank: int) -> None:
        """Each rank's computation in the plan's order, one after the other, none but waiting and computing before it."""
        plan = make_plan(make_config(folder, LAYOUT, Variant(1)))
        timelines = read(folder, "measured", rank)["timelines"]
        assert len(timelines) == STEPS, f"{len(timelines)} timelines of {STEPS} steps"
        for timeline in timelines:
            for line, actions in zip(timeline["ranks"], plan.table, strict=True):
                assert [name for name, *_ in line["actions"]] == list(map(str, actions))
                now = 0.0
                for name, waited, start, end in line["actions"]:
                    assert now <= start - waited + 1e-9 <= start + 1e-9 < end + 1e-9, f"{name} at {start}, after {now}"
                    now = end
                assert line["busy"] + line["waited"] <= timeline["step_time"], line

    @pytest.mark.parametrize("rank", RANKS)
    def test_metrics_are_means_over_replicas(self, folder: Path, rank: int) -> None:
        """Ranks 0 and 1 are of different replicas, of which the first is slow."""
        slow, other = (read(folder, "slow", replica)["timelines"][0] for replica in range(2))
        assert slow["bubble"] != other["bubble"], slow["bubble"]
        (row,) = read(folder, "slow", rank)["rows"]
        assert row["bubble"] == pytest.approx((slow["bubble"] + other["bubble"]) / 2, rel=1e-12), row
        waits = [line["waited"] for timeline in (slow, other) for line in timeline["ranks"]]
        assert row["p2p_wait_s"] == pytest.approx(sum(waits) / len(waits), rel=1e-12), row
        times = [timeline["step_time"] for timeline in (slow, other)]
        assert row["pipeline_time"] == pytest.approx(sum(times) / 2, rel=1e-12), f"{row}, not the mean of {times}"
        busy = sum(row[f"stage_{stage}_busy_share"] for stage in range(4))
        assert row["bubble"] == pytest.approx(1 - busy / LAYOUT.pp, rel=1e-9), row

    def test_waiting_is_no_work(self, folder: Path) -> None:
        """Stage 1 takes longer: its rank is busy, and rank 0 stands still, for the very action that needs the result."""
        ranks = read(folder, "slow", 0)["timelines"][0]["ranks"]
        assert ranks[1]["busy"] >= SLOW_S, ranks[1]["busy"]
        assert ranks[0]["busy"] < SLOW_S, f"rank 0 computed for {ranks[0]['busy']} s"
        waits = {name: waited for name, waited, _, _ in ranks[0]["actions"]}
        assert max(waits, key=waits.__getitem__) == "3F0", waits
        assert waits["3F0"] >= SLOW_S / 2, waits

    def test_ranks_begin_together(self, folder: Path) -> None:
        """A rank that comes late to the step, as after a slow read, shifts nothing: its replica's step is not longer."""
        step_time = read(folder, "slow", 0)["timelines"][0]["step_time"]
        assert step_time < LATE_S, f"{step_time} s, of which {LATE_S} s were before the step"

    def test_memory_is_by_pipeline_rank(self, folder: Path) -> None:
        """The largest of the data replicas of each pipeline rank, on all ranks: world ranks 0, 1 and 2, 3."""
        for rank in RANKS:
            row = read(folder, "plain", rank)["rows"][0]
            memory = {key: value for key, value in row.items() if key.startswith("memory_")}
            expected = {
                "memory_rank_0_gib": memory_gib(1),
                "memory_rank_1_gib": memory_gib(3),
                "memory_gib": memory_gib(3),
            }
            assert memory == expected, f"rank {rank}: {memory}"


@pytest.mark.parametrize(
    ("fp8", "start", "expected"), [(False, 13, [18, 28, 38]), (False, 10, [15, 25, 35]), (True, 10, [16, 26, 36])]
)
def test_trainer_measures_from_its_start(
    monkeypatch: pytest.MonkeyPatch, fp8: bool, start: int, expected: list[int]
) -> None:
    """A process that resumed after ``start``; in FP8 the steps 15, 25 and 35 have statistics, so the next are measured."""

    def start_clock(device: torch.device) -> None:
        raise InterruptedError

    monkeypatch.setattr(dist_mtp.trainer, "Clock", start_clock)
    trainer = Trainer.__new__(Trainer)
    trainer.config = from_mapping({"precision": {"fp8_statistics_every": 5}, "monitor": {"timeline_every": 10}})
    trainer.fp8 = MagicMock() if fp8 else None
    trainer.runtime, trainer.mesh, trainer.beat, trainer.start = MagicMock(), MagicMock(), MagicMock(), start
    measured = []
    for trainer.step in range(start + 1, 40):
        try:
            trainer._run_pipeline([])
        except InterruptedError:
            measured.append(trainer.step)
    assert measured == expected, measured


def test_device_clock_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA nothing is read while the step runs: marks are events, ms from the first one, after one wait for the last."""
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.number, Event.made = Event.made, Event.made + 1

        def record(self) -> None:
            log.append(f"record {self.number}")

        def synchronize(self) -> None:
            log.append(f"wait {self.number}")

        def elapsed_time(self, end: Event) -> float:
            return 10.0 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("drain"))
    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    clock = Clock(torch.device("cuda", 0))
    for _ in range(6):
        clock.mark()
    assert log == ["drain", "barrier", *(f"record {number}" for number in range(7))], log
    seconds = clock.seconds()
    assert log[-1] == "wait 6", log
    torch.testing.assert_close(seconds, torch.tensor([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]], dtype=torch.float64))
