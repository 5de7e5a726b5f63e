"""``dist-mtp train -m``, really run: each point is a run of its own, whoever starts it and however often."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launches import TIMEOUT_S, dist_mtp, overrides, train

from dist_mtp.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_TERMINATED
from dist_mtp.monitor.metrics import read_metrics
from dist_mtp.monitor.result import read_result
from dist_mtp.monitor.sweep_points import PointRecord, read_records

for extra in ("hydra_joblib_launcher", "hydra_optuna_sweeper"):
    pytest.importorskip(f"hydra_plugins.{extra}", reason="sweeps need dist-mtp[joblib,optuna]")

WHOLE_S = 3 * TIMEOUT_S
COMMON = ("parallel.pp=1", "train.steps=2", "train.micro_batches=2", "checkpoint.every=0")
SIDE_BY_SIDE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
WEIGHTS = ("0.1", "0.3", "1e38")
"""Of the MTP losses. The last one makes their sum infinite, but not in the model that has none."""
GRID = ("mtp.depth=0,1", f"mtp.loss_weight={','.join(WEIGHTS)}", *SIDE_BY_SIDE)
FAILING = "mtp.depth=1,mtp.loss_weight=1e+38"
TRIALS = 10
SEARCH = (
    "hydra/sweeper=optuna",
    f"hydra.sweeper.n_trials={TRIALS}",
    "optim.lr=tag(log,interval(1e-4,1e-1))",
    *SIDE_BY_SIDE,
)


@dataclass(frozen=True)
class Swept:
    """A sweep after one of its starts."""

    folder: Path
    code: int
    output: str
    statuses: dict[str, str]
    """Of its points, as this start left them."""

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


def sweep(
    root: Path, name: str, *swept: str, until: Callable[[Path], bool] | None = None, end: int = signal.SIGTERM
) -> Swept:
    """Start a sweep and wait for its end; if ``until`` is given, send the signal ``end`` as soon as that is so."""
    common = [override for override in overrides(root, "unused") if not override.startswith("run.dir=")]
    command = dist_mtp("-m", *swept, *common, *COMMON, f"run.name={name}")
    folder, output = root / "sweeps" / name, root / f"{name}.out"
    with output.open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        if until is not None:
            wait_until(lambda: until(folder) or process.poll() is not None, WHOLE_S, output)
            process.send_signal(end)
        code = process.wait(WHOLE_S)
        wait_until(lambda: not alive(folder), 60, output)
    finally:
        for pid in {process.pid, *alive(folder)}:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait(30)
    return Swept(folder, code, output.read_text(), statuses(folder))


def wait_until(reached: Callable[[], bool], timeout_s: float, output: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {timeout_s} s:\n{output.read_text()[-4000:]}"
        time.sleep(0.05)


def alive(folder: Path) -> list[int]:
    """Processes with the sweep's folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            found += [int(entry.name)] * (f"{folder.parent.name}/{folder.name}/".encode() in words)
    return found


def two_done(folder: Path) -> bool:
    return list(statuses(folder).values()).count("done") >= 2


def statuses(folder: Path) -> dict[str, str]:
    """Of the points so far, by name."""
    return {record.name: record.status for record in read_records(folder)}


def by_name(swept: Swept) -> dict[str, PointRecord]:
    return {record.name: record for record in read_records(swept.folder)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def grid(root: Path) -> tuple[Swept, Swept]:
    """Six points, side by side, that SIGTERM stops after the first two, and the same command again."""
    return sweep(root, "grid", *GRID, until=two_done), sweep(root, "grid", *GRID)


@pytest.fixture(scope="module")
def search(root: Path) -> tuple[Swept, Swept]:
    """Ten trials of Optuna, side by side, killed after the first two, and the same command again."""
    return sweep(root, "search", *SEARCH, until=two_done, end=signal.SIGKILL), sweep(root, "search", *SEARCH)


class TestGrid:
    """Two values times three. One point diverges, which is a result and ends no other."""

    def test_stop(self, grid: tuple[Swept, Swept]) -> None:
        """SIGTERM ends points under way and starts no others."""
        stopped, _ = grid
        assert stopped.code == EXIT_TERMINATED, f"exited {stopped.code}, expected {EXIT_TERMINATED}:\n{stopped.output}"
        found = list(stopped.statuses.values())
        assert 2 <= found.count("done") < 6, f"after the stop: {stopped.statuses}"
        assert set(found) <= {"done", "interrupted"}, f"after the stop: {stopped.statuses}"

    def test_resume(self, grid: tuple[Swept, Swept]) -> None:
        """What was done is not trained again, and the rest is."""
        stopped, whole = grid
        assert len(whole.statuses) == 6, whole.statuses
        for name, status in whole.statuses.items():
            done_before = stopped.statuses.get(name) == "done"
            expected = "finished before" if done_before else "diverged" if name == FAILING else "done"
            assert status == expected, f"{name} is {status}, expected {expected}"
        assert whole.code == EXIT_DIVERGED, f"exited {whole.code}, expected that of its failed point, {EXIT_DIVERGED}"

    def test_each_trained_its_own_configuration(self, grid: tuple[Swept, Swept]) -> None:
        _, whole = grid
        points = [(depth, weight) for depth in (0, 1) for weight in WEIGHTS]
        for number, (depth, weight) in enumerate(points):
            name = f"mtp.depth={depth},mtp.loss_weight={float(weight)}"
            record = by_name(whole)[name]
            assert record.number == number, f"{name} is point {record.number}, expected {number}"
            config = yaml.safe_load((whole.folder / name / "config.yaml").read_text())
            trained = (config["mtp"]["depth"], config["mtp"]["loss_weight"], config["train"]["steps"])
            assert trained == (depth, float(weight), 2), f"{name} trained {trained}"
            rows = read_metrics(whole.folder / name / "metrics.jsonl")
            if name != FAILING:
                assert [row["step"] for row in rows] == [1, 2], f"{name} trained steps {rows}"
                assert ("loss_mtp_1" in rows[0]) == (depth == 1), f"{name} measured {sorted(rows[0])}"

    def test_objectives(self, grid: tuple[Swept, Swept]) -> None:
        """The held-out main loss, to the bit. A model without MTP has one whatever the weight; another weight, another model."""
        _, whole = grid
        objectives = {}
        for name, record in by_name(whole).items():
            last = read_metrics(whole.folder / name / "metrics.jsonl")
            expected = None if name == FAILING else last[-1]["eval_loss_main"]
            assert record.objective == expected, f"{name}: objective {record.objective}, expected {expected}"
            objectives[name] = record.objective
        first, second, third, fourth, fifth, failed = objectives.values()
        assert first == second == third, f"without MTP: {objectives}"
        assert len({first, fourth, fifth}) == 3, f"with MTP: {objectives}"
        assert failed is None, objectives

    def test_summary(self, grid: tuple[Swept, Swept]) -> None:
        _, whole = grid
        summary = whole.summary
        assert summary["swept"] == ["mtp.depth", "mtp.loss_weight"], summary["swept"]
        ended = {point["name"]: point["objective"] for point in summary["points"] if point["objective"] is not None}
        assert len(summary["points"]) == 6, f"{len(summary['points'])} points"
        assert len(ended) == 5, f"points with an objective: {ended}"
        assert ended[summary["best"]] == min(ended.values()), f"best {summary['best']} of {ended}"
        failed = next(point for point in summary["points"] if point["name"] == FAILING)
        assert (failed["status"], failed["exit_code"]) == ("diverged", EXIT_DIVERGED), failed
        assert (whole.folder / "summary.png").read_bytes().startswith(b"\x89PNG"), "no picture"
        assert FAILING in whole.output.split("objective  steps")[1], f"the table does not say why:\n{whole.output}"

    def test_is_what_a_single_run_is(self, grid: tuple[Swept, Swept], root: Path) -> None:
        """A point is the run that ``dist-mtp train`` gives with its keys."""
        _, whole = grid
        settings = overrides(root, "alone", *COMMON, "mtp.depth=1", "mtp.loss_weight=0.3")
        alone = train(dist_mtp(*settings), root / "alone")
        assert alone.code == EXIT_DONE, alone.output
        objective = (read_result(alone.folder) or {})["objective"]
        found = by_name(whole)["mtp.depth=1,mtp.loss_weight=0.3"].objective
        assert found == objective, f"objective {found} in the sweep, {objective} alone"


class TestSearch:
    """Each trial has a learning rate of its own, and the same ones are proposed whenever the sweep is started."""

    def test_ten_trials(self, search: tuple[Swept, Swept]) -> None:
        killed, whole = search
        assert whole.code == EXIT_DONE, f"exited {whole.code}:\n{whole.output}"
        rates = set()
        for name, record in by_name(whole).items():
            rate = yaml.safe_load((whole.folder / name / "config.yaml").read_text())["optim"]["lr"]
            assert name == f"optim.lr={rate}", f"{name} trained with {rate}"
            rates.add(rate)
            last = read_metrics(whole.folder / name / "metrics.jsonl")[-1]
            assert record.objective == last["eval_loss_main"], f"{name}: {record.objective}, {last['eval_loss_main']}"
            expected = "finished before" if killed.statuses.get(name) == "done" else "done"
            assert record.status == expected, f"{name} is {record.status}, expected {expected}"
        assert len(rates) == TRIALS, f"learning rates {sorted(rates)}"
        assert all(1e-4 <= rate <= 1e-1 for rate in rates), f"learning rates {sorted(rates)}"

    def test_again_trains_nothing(self, search: tuple[Swept, Swept], root: Path) -> None:
        _, whole = search
        before = whole.summary
        again = sweep(root, "search", *SEARCH)
        assert list(again.statuses.values()) == ["finished before"] * TRIALS, again.statuses
        assert again.summary["points"] == before["points"], "the summary changed"
