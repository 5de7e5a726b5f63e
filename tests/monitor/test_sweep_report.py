"""The summary of a sweep says how every point stands, whatever state its files are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_mtp.errors import ConfigError
from dist_mtp.monitor import sweep_plot
from dist_mtp.monitor.result import write_result
from dist_mtp.monitor.sweep_points import RECORDS, PointRecord, write_record
from dist_mtp.monitor.sweep_report import PointSummary, best, summarise, swept_keys, table, write_summary
from dist_mtp.run_folder import lock_run_folder


def write_run(folder: Path, config: dict[str, Any], objective: float | None = None, status: str | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 2}, "run": {"dir": str(folder)}, **config}))
    rows = [{"step": step, "loss_main": 3.0 - step, "step_time": 1.5, "bubble": 0.1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is not None:
        code, message = (0, None) if status == "done" else (4, "step 2: loss nan")
        write_result(folder, status, code, rows[-1], objective, message)


def write_sweep(folder: Path) -> None:
    """Two done, one diverged, one under way and one refused, in this order."""
    for number, (rate, objective, status) in enumerate(
        [(0.1, 2.5, "done"), (0.02, 2.25, "done"), (10.0, None, "diverged"), (0.003, None, None)]
    ):
        write_run(folder / f"optim.lr={rate}", {"optim": {"lr": rate}}, objective, status)
        code = {"done": 0, "diverged": 4, None: None}[status]
        record = PointRecord(number, f"optim.lr={rate}", (f"optim.lr={rate}",), code, status or "running", objective)
        (folder / RECORDS).mkdir(exist_ok=True)
        write_record(folder, record)
    refused = PointRecord(4, "optim.lr=-1", ("optim.lr=-1",), 2, "failed", message="optim.lr=-1 must be positive")
    write_record(folder, refused)


class TestSummary:
    def test_states(self, tmp_path: Path) -> None:
        write_sweep(tmp_path)
        with lock_run_folder(tmp_path / "optim.lr=0.003"):
            points = summarise(tmp_path)
        found = [(p.number, p.values["optim.lr"], p.status, p.exit_code, p.objective, p.steps) for p in points]
        assert found == [
            (0, 0.1, "done", 0, 2.5, 2),
            (1, 0.02, "done", 0, 2.25, 2),
            (2, 10.0, "diverged", 4, None, 2),
            (3, 0.003, "running", None, None, 2),
            (4, -1, "failed", 2, None, 0),
        ], found
        assert summarise(tmp_path)[3].status == "unfinished", "nobody holds its folder any more"
        chosen = best(points)
        assert chosen is points[1], f"best is {chosen}"
        assert points[0].training_seconds == 3.0, points[0].training_seconds
        assert points[0].metrics == {"step": 2, "loss_main": 1.0}, points[0].metrics

    def test_table_and_files(self, tmp_path: Path) -> None:
        write_sweep(tmp_path)
        text = write_summary(tmp_path)
        assert [line.split() for line in text.splitlines()[:3]] == [
            ["optim.lr", "objective", "steps", "time", "status"],
            ["1", "0.1", "2.5000", "2/2", "3s", "done"],
            ["2", "0.02", "2.2500", "2/2", "3s", "done", "best"],
        ], text
        assert "3  optim.lr=10.0: step 2: loss nan" in text, text
        assert "5  optim.lr=-1: optim.lr=-1 must be positive" in text, text
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["best"], summary["swept"]) == ("optim.lr=0.02", ["optim.lr"]), summary
        assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")

    def test_any_folder_of_runs(self, tmp_path: Path) -> None:
        """Without a sweep's notes: in natural order, by what differs; runs that were set aside are left out."""
        for depth in (10, 2):
            write_run(tmp_path / f"d{depth}", {"mtp": {"depth": depth}, "optim": {"lr": 0.1}}, 1.0, "done")
        write_run(tmp_path / "d2.old-1", {"mtp": {"depth": 3}}, 0.5, "done")
        points = summarise(tmp_path)
        assert [(point.name, point.values) for point in points] == [
            ("d2", {"mtp.depth": 2}),
            ("d10", {"mtp.depth": 10}),
        ], points

    def test_section_chosen_by_name_is_one_key(self, tmp_path: Path) -> None:
        for name, size in (("small", 512), ("tiny", 128)):
            write_run(tmp_path / name, {"model": {"name": name, "hidden_size": size, "num_layers": size}}, 1.0, "done")
        assert swept_keys(summarise(tmp_path)) == ["model"]

    @pytest.mark.parametrize("file", ["result.json", "metrics.jsonl", "config.yaml"])
    def test_damaged_point(self, file: str, tmp_path: Path) -> None:
        """The others are shown, and the damage with them."""
        write_sweep(tmp_path)
        (tmp_path / "optim.lr=0.1" / file).write_text("{\n{")
        points = summarise(tmp_path)
        assert len(points) == 5, f"{len(points)} points"
        assert points[1].objective == 2.25, points[1]
        assert file == "config.yaml" or "damaged" in str(points[0].message), points[0]

    def test_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no runs"):
            write_summary(tmp_path)


def point(number: int, objective: float | None, **values: Any) -> PointSummary:
    keys = {key.replace("__", "."): value for key, value in values.items()}
    status, code = ("done", 0) if objective is not None else ("diverged", 4)
    return PointSummary(number, f"p{number}", keys, status, code, objective, None, 1, 1, 1.0, {})


class TestPicture:
    """Whatever was swept becomes a picture, with every point in it."""

    @pytest.mark.parametrize(
        ("swept", "is_search"),
        [
            ([{}], False),
            ([{"optim__lr": rate} for rate in (1e-4, 1e-3, 1e-2)], False),
            ([{"mtp__depth": d, "optim__lr": r} for d in (0, 1, 2) for r in (1e-3, 3e-3)], False),
            ([{"mtp__depth": d, "train__seed": s} for d in range(4) for s in range(4)], False),
            ([{"model": m, "moe": x} for m in ("tiny", "small") for x in ("a", "b")], False),
            ([{"a": i % 2, "b": i % 3, "c": None if i == 3 else i} for i in range(6)], False),
            ([{"optim__lr": 10.0**-i, "model": "tiny", "mtp__depth": i % 2} for i in range(8)], True),
            ([{"optim__lr": None}, {"optim__lr": 1.0}], True),
        ],
    )
    @pytest.mark.parametrize("failed", ["none", "last", "all"])
    def test_draws(self, swept: list[dict[str, Any]], is_search: bool, failed: str, tmp_path: Path) -> None:
        last = len(swept) - 1
        points = [
            point(i, None if failed == "all" or (failed == "last" and i == last) else 1.0 + i, **values)
            for i, values in enumerate(swept)
        ]
        sweep_plot.plot_sweep(points, swept_keys(points), is_search, tmp_path / "x.png", "sweep")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_lines_are_the_objectives(self) -> None:
        from matplotlib.figure import Figure

        points = [point(0, 2.5, optim__lr=0.1), point(1, None, optim__lr=10.0), point(2, 2.0, optim__lr=0.02)]
        axes = Figure().add_subplot()
        sweep_plot._draw_grid(axes, points, "optim.lr")
        line, cross = axes.get_lines()
        drawn = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert drawn == [(0.02, 2.0), (0.1, 2.5)], f"drawn {drawn}"
        assert (cross.get_marker(), list(cross.get_xdata())) == ("x", [10.0]), (
            "the failed point is a cross at its value"
        )

    def test_best_so_far(self) -> None:
        from matplotlib.figure import Figure

        points = [point(0, None, a=1), point(1, 2.0, a=2), point(2, 3.0, a=3), point(3, 1.0, a=4)]
        axes = Figure().add_subplot()
        sweep_plot._draw_trials(axes, points)
        (steps,) = [line for line in axes.get_lines() if line.get_label() == "best so far"]
        drawn = [float(value) for value in steps.get_ydata()]
        assert drawn[1:] == [2.0, 2.0, 1.0], f"drawn {drawn}"
        assert drawn[0] != drawn[0], "nothing is best before a trial has an objective"


def test_table_without_swept_keys() -> None:
    assert table([point(0, 1.5)]).splitlines()[1].split() == ["1", "p0", "1.5000", "1/1", "1s", "done", "best"]
