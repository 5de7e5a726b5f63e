"""``dist-mtp plot``: where pictures go, and what a user reads when there is nothing to draw."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dist_mtp.cli.main import main
from dist_mtp.config import from_mapping, resolve
from dist_mtp.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE
from dist_mtp.monitor.plan_files import write_plan
from dist_mtp.monitor.timeline_files import write_timeline
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.timeline import from_marks


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


class TestOneRun:
    """``out=`` of one run has the plan and a measured step, too, so that the folder is complete."""

    @pytest.fixture
    def run(self, folder: Path) -> Path:
        run, plan = folder / "runs" / "a", make_plan(resolve(from_mapping({}), vocab_size=257, world_size=2))
        events = [[event for event in plan.timeline.events if event.rank == rank] for rank in range(plan.pp)]
        for step, late in ((5, 0.0), (15, 1.0)):
            marks = [[(e.start, e.start + late, e.end + late) for e in line] for line in events]
            write_timeline(plan, step, from_marks(plan.table, marks), run)
        write_plan(plan, run)
        return run

    def titles(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
        """Of the pictures with a single pair of axes."""
        found: list[str] = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure,
            "savefig",
            lambda self, *a, **k: (found.append(self.axes[0].get_title(loc="left")), save(self, *a, **k)),
        )
        assert main(["plot", "runs/a", *arguments]) == EXIT_DONE
        return [title for title in found if "measured step" in title]

    @pytest.mark.parametrize(
        ("arguments", "step", "name"), [((), 15, "timeline.png"), (("step=5",), 5, "timeline_step_5.png")]
    )
    def test_plan_and_measured_step(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], step: int, name: str
    ) -> None:
        (title,) = self.titles(monkeypatch, "out=figures", *arguments)
        assert f"measured step {step}, " in title, title
        assert sorted(path.name for path in Path("figures").iterdir()) == ["losses.png", "plan.png", name]
        assert Path("figures/plan.png").read_bytes() == (run / "plan.png").read_bytes()

    def test_picture_of_the_run_is_drawn_again(self, run: Path) -> None:
        """From the numbers alone comes the picture that the run drew, also over itself."""
        drawn = (run / "timeline.png").read_bytes()
        assert main(["plot", "runs/a", "out=runs/a"]) == EXIT_DONE
        assert (run / "timeline.png").read_bytes() == drawn

    @pytest.mark.usefixtures("run")
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["runs/a", "step=6"], "step 6 of runs/a was not measured: 5, 15 was"),
            (["runs/a", "step=x"], "step=x must be one number"),
            (["runs/a", "runs/lr=0.1", "step=5"], "be asked of one run"),
            (["runs/lr=0.1", "step=5"], "was not measured: no step was"),
        ],
    )
    def test_steps_that_are_not_there(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = main(["plot", *arguments])
        said = capsys.readouterr().err
        assert (code, message in said) == (EXIT_CONFIG, True), said

    def test_damaged_file(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run / "timelines" / "step_00000015.json").write_text('{"step": 15}')
        """It ends the command only if it is what was asked for, not the charts of a run that an older version measured."""
        for arguments, code in ((["step=15"], EXIT_DATA), ([], EXIT_DONE)):
            assert main(["plot", "runs/a", *arguments]) == code
            assert "step_00000015.json is no measured step" in capsys.readouterr().err
