"""Whether a point has to be trained, and that nothing else was trained in its place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, OptimConfig, RunConfig, TrainConfig, to_dict
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_TERMINATED, ConfigError
from dist_mtp.monitor.result import write_result
from dist_mtp.monitor.sweep_points import RECORDS, read_records
from dist_mtp.run_folder import lock_run_folder
from dist_mtp.sweep import task
from dist_mtp.sweep.definition import define
from dist_mtp.sweep.folder import STOP_FILE, claimed

POINT = Config(train=TrainConfig(steps=10), optim=OptimConfig(lr=1e-3))


def write_run(folder: Path, config: Config, objective: float | None = 1.5, status: str = "done") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, run=RunConfig(dir=str(folder)))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    write_result(folder, status, 0, {"step": config.train.steps}, objective, None)


def changed(**values: Any) -> Config:
    return dataclasses.replace(POINT, **values)


class TestFinished:
    """A finished run is left alone only if it learnt what its point would learn now."""

    def test_same(self, tmp_path: Path) -> None:
        write_run(tmp_path, changed(resume="never"))
        assert task.finished(tmp_path, POINT) == 1.5

    @pytest.mark.parametrize(
        ("objective", "status"), [(None, "done"), (float("nan"), "done"), (1.5, "diverged"), (1.5, "interrupted")]
    )
    def test_not_done(self, objective: float | None, status: str, tmp_path: Path) -> None:
        write_run(tmp_path, POINT, objective, status)
        assert task.finished(tmp_path, POINT) is None

    def test_never_started(self, tmp_path: Path) -> None:
        assert task.finished(tmp_path / "missing", POINT) is None

    def test_more_steps(self, tmp_path: Path) -> None:
        write_run(tmp_path, POINT)
        longer, shorter = (changed(train=TrainConfig(steps=steps)) for steps in (20, 5))
        assert task.finished(tmp_path, longer) is None, "a longer run has to be trained on"
        with pytest.raises(ConfigError, match=r"train\.steps 10 -> 5"):
            task.finished(tmp_path, shorter)

    def test_other_settings(self, tmp_path: Path) -> None:
        write_run(tmp_path, changed(optim=OptimConfig(lr=2e-3)))
        with pytest.raises(ConfigError, match=r"other settings \(optim\.lr 0\.002 -> 0\.001\)"):
            task.finished(tmp_path, POINT)


def run_points(
    overrides: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, train: Any
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code of a sweep whose points are trained by ``train(run folder, arguments)``, and their records."""
    from dist_mtp.cli.sweep import sweep

    def run_process(command: list[str], sweep_folder: Path, record: Any, log: Path | None) -> int:
        return train(sweep_folder / record.name, command)

    monkeypatch.setattr(task, "run_process", run_process)
    monkeypatch.chdir(folder)
    code = sweep([*overrides, "run.name=s"])
    return code, {record.name: dataclasses.asdict(record) for record in read_records(folder / "sweeps" / "s")}


class TestPoints:
    """Points that do not end well are noted, and the others run."""

    def test_default_configuration_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A launcher that lost the overrides would train the default at every point and report plausible losses."""

        default = compose([])

        def train_default(folder: Path, command: list[str]) -> int:
            write_run(folder, default)
            return EXIT_DONE

        code, records = run_points(["mtp.depth=2,3"], tmp_path, monkeypatch, train_default)
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}"
        for name, record in records.items():
            assert record["objective"] is None, f"{name} has an objective of another configuration: {record}"
            assert "was trained with other settings than its point has: mtp.depth 1 -> " in record["message"], record

    def test_what_a_point_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told = []

        def note(folder: Path, command: list[str]) -> int:
            told.append(command[command.index("train") + 1 :])
            return 5

        code, records = run_points(["optim.lr=1e-3", "mtp.depth=0,1"], tmp_path, monkeypatch, note)
        assert code == 5, f"exited {code}, expected that of the first point"
        for depth, arguments in enumerate(told):
            expected = {"optim.lr=0.001", f"mtp.depth={depth}", f"run.dir='sweeps/s/mtp.depth={depth}'"}
            assert expected <= set(arguments), f"{arguments} lacks {expected - set(arguments)}"
        assert [record["exit_code"] for record in records.values()] == [5, 5], records

    def test_refused_points_do_not_stop_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        configs = {name: compose([name]) for name in ("mtp.depth=1", "mtp.depth=2")}

        def train_well(folder: Path, command: list[str]) -> int:
            write_run(folder, configs[folder.name])
            return EXIT_DONE

        code, records = run_points(["mtp.depth=-1,1,2"], tmp_path, monkeypatch, train_well)
        assert code == EXIT_CONFIG, f"exited {code}, expected {EXIT_CONFIG}"
        assert [record["status"] for record in records.values()] == ["failed", "done", "done"], records
        assert "mtp.depth=-1" in records["mtp.depth=-1"]["message"], records
        assert not (tmp_path / "sweeps" / "s" / "mtp.depth=-1").exists(), "a refused point left a folder"
        summary = json.loads((tmp_path / "sweeps" / "s" / "summary.json").read_text())
        assert [point["values"] for point in summary["points"]] == [{"mtp.depth": depth} for depth in (-1, 1, 2)]

    def test_stop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A signal ends the sweep also when the point under way could not save, and so ended with another code."""
        trained = []

        def stopped(folder: Path, command: list[str]) -> int:
            trained.append(folder)
            (folder.parent / RECORDS / STOP_FILE).write_text("15")
            return EXIT_DONE

        code, records = run_points(["mtp.depth=0,1,2"], tmp_path, monkeypatch, stopped)
        assert len(trained) == 1, f"trained {trained} after the signal"
        assert code == EXIT_TERMINATED, f"exited {code}, expected {EXIT_TERMINATED}"
        assert [record["status"] for record in records.values()][1:] == ["interrupted"] * 2, records


class TestFolder:
    """A sweep's folder holds points of one sweep, and one command fills it at a time."""

    def test_in_use(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with (
            claimed(define(["mtp.depth=0,1"])),
            pytest.raises(ConfigError, match="in use"),
            claimed(define(["mtp.depth=0,1"])),
        ):
            pass

    @pytest.mark.parametrize(
        ("again", "refused"),
        [
            (["mtp.depth=0,1", "optim.lr=2e-3"], True),
            (["mtp.depth=0,1", "train.steps=9"], True),
            (["mtp.depth=0,1", "train.steps=20"], False),
            (["mtp.depth=0,1,2"], False),
            (["mtp.depth=0,1", "launcher.threads_per_rank=1"], False),
            (["mtp.depth=0,1", "optim.lr=2e-3", "resume=never"], False),
        ],
        ids=str,
    )
    def test_other_settings(
        self, again: list[str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        common = ["run.name=s", "optim.lr=1e-3", "train.steps=10"]
        given = {override.partition("=")[0] for override in again}
        with claimed(define(["mtp.depth=0,1", *common])):
            pass
        second = define([*again, *(o for o in common if o.partition("=")[0] not in given)])
        if refused:
            with pytest.raises(ConfigError, match="holds a sweep of points with other settings"), claimed(second):
                pass
        else:
            with claimed(second):
                pass

    def test_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        sweep = dataclasses.replace(define(["mtp.depth=0,1"]), folder=tmp_path / "file" / "s")
        with pytest.raises(ConfigError, match="cannot be written"), claimed(sweep):
            pass

    def test_is_free_afterwards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        sweep = define(["mtp.depth=0,1"])
        with claimed(sweep):
            pass
        lock_run_folder(sweep.folder).close()
