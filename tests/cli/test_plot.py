"""``dist-mtp plot``: where pictures go, and what a user reads when there is nothing to draw."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from dist_mtp.cli.main import main
from dist_mtp.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two runs in ``runs/`` and one that has not done its first step."""
    for name in ("a", "lr=0.1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            '{"step": 1, "loss_main": 2.0}\n{"step": 2, "loss_main": 1.0}\n'
        )
    (tmp_path / "runs" / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "picture"),
    [
        (["runs/a"], "runs/a/plots/losses.png"),
        (["runs/a", "runs/lr=0.1"], "plots/losses.png"),
        (["runs/a", "out=figures/paper"], "figures/paper/losses.png"),
    ],
)
def test_pictures_are_where_the_user_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], picture: str
) -> None:
    assert main(["plot", *arguments]) == EXIT_DONE
    said = capsys.readouterr().out
    assert said == f"written: {picture}\n", said
    assert (folder / picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], EXIT_CONFIG, "give at least one run"),
        (["runs/a", "--out", "x"], EXIT_CONFIG, "dist-mtp plot has no option --out"),
        (["runs/a", "out="], EXIT_CONFIG, "at most one folder for the pictures"),
        (["runs/b"], EXIT_CONFIG, "there is no run folder runs/b: dist-mtp plot RUN"),
        (["a"], EXIT_CONFIG, "there is no run folder a: did you mean runs/a?"),
        (["runs/new"], EXIT_DATA, "runs/new has no metrics yet"),
        (["runs/a", "out=runs/a/metrics.jsonl"], EXIT_CONFIG, "runs/a/metrics.jsonl cannot be written (File exists)"),
        (["sweep"], EXIT_CONFIG, "dist-mtp plot sweep takes one folder, got 0"),
        (["sweep", "sweeps/x"], EXIT_CONFIG, "there is no folder sweeps/x"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistakes(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, error = main(["plot", *arguments]), capsys.readouterr().err
    assert (found, message in error) == (code, True), f"exit code {found}, expected {code} and {message!r}: {error}"


def test_run_without_numbers_to_draw(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["plot", "runs/a"]) == EXIT_DATA
    assert "runs/a: no metric in it has a chart" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_sweep_prints_its_summary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = types.ModuleType("dist_mtp.monitor.sweep_report")
    report.write_summary = lambda folder: f"summary of {folder!r}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, report.__name__, report)
    assert main(["plot", "sweep", "runs"]) == EXIT_DONE
    assert capsys.readouterr().out == f"summary of {Path('runs')!r}\n"
