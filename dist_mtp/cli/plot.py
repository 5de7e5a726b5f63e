"""``dist-mtp plot``: the charts of runs, or the summary of a sweep, as PNG files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_mtp.errors import ConfigError, DataError
from dist_mtp.monitor.metrics import METRICS, read_metrics
from dist_mtp.run_folder import CONFIG_FILE

USAGE = (
    "dist-mtp plot RUN [RUN ...] [out=FOLDER] [step=K], or dist-mtp plot sweep FOLDER, where RUN is a folder such as "
    "runs/tiny and step=K chooses a measured step of one run"
)
FOLDER = "plots"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    runs: tuple[Path, ...]
    sweep: Path | None
    out: Path
    step: int | None = None
    """Measured step to draw; None: the last one."""


def main(arguments: list[str]) -> int:
    """Draw what :data:`USAGE` says; returns 0.

    Raises:
        ConfigError: no such run, a step that was not measured, or the pictures cannot be written.
        DataError: a run has no metrics yet, or damaged or unknown ones.
    """
    request = parse(arguments)
    if request.sweep is not None:
        return _sweep(request.sweep)
    from dist_mtp.monitor.run_charts import Run
    from dist_mtp.monitor.run_pictures import draw_runs

    names = _names(request.runs)
    runs = {name: Run(_rows(run), _num_layers(run)) for name, run in zip(names, request.runs, strict=True)}
    try:
        written = draw_runs(runs, request.out)
        if len(request.runs) == 1:  # pictures of several runs that cannot lie over each other
            (run,) = request.runs
            written += [*_spreads(run, request.out), *_plan(run, request.out), *_timeline(run, request)]
    except OSError as error:
        raise ConfigError(f"{request.out} cannot be written ({error.strerror}): choose another out=FOLDER") from error
    if not written:
        raise DataError(f"{', '.join(map(str, request.runs))}: no metric in it has a chart")
    print("written: " + ", ".join(str(path) for path in written))
    return 0


def parse(arguments: Sequence[str]) -> Request:
    """What the arguments ask for; looks at no file.

    Raises:
        ConfigError: they do not fit :data:`USAGE`.
    """
    if arguments[:1] == ["sweep"]:
        if len(arguments) != 2:
            raise ConfigError(f"dist-mtp plot sweep takes one folder, got {len(arguments) - 1}: {USAGE}")
        return Request((), Path(arguments[1]), Path(arguments[1]))
    outs = [Path(argument.removeprefix("out=")) for argument in arguments if argument.startswith("out=")]
    steps = [argument.removeprefix("step=") for argument in arguments if argument.startswith("step=")]
    runs = tuple(Path(argument) for argument in arguments if not argument.startswith(("out=", "step=", "-")))
    if unknown := [argument for argument in arguments if argument.startswith("-")]:
        raise ConfigError(f"dist-mtp plot has no option {unknown[0]}: {USAGE}")
    if not runs or len(outs) > 1 or outs == [Path()]:
        raise ConfigError(f"give at least one run, and at most one folder for the pictures: {USAGE}")
    if steps and (len(steps) > 1 or len(runs) > 1 or not steps[0].isdecimal()):
        raise ConfigError(f"step={','.join(steps)} must be one number, and be asked of one run: {USAGE}")
    default = runs[0] / FOLDER if len(runs) == 1 else Path(FOLDER)
    return Request(runs, None, outs[0] if outs else default, int(steps[0]) if steps else None)


def _sweep(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: {USAGE}")
    from dist_mtp.monitor.sweep_report import write_summary

    print(write_summary(folder))
    return 0


def _spreads(run: Path, out: Path) -> list[Path]:
    """The picture of the experts' loads, if the run has experts."""
    from dist_mtp.monitor.expert_loads import EXPERT_LOADS, read_spreads
    from dist_mtp.monitor.load_pictures import NAME, draw_spreads

    spreads = read_spreads(run / EXPERT_LOADS)
    if not spreads:
        return []
    path = out / f"{NAME}.png"
    draw_spreads(spreads, path, _num_layers(run))
    return [path]


def _plan(run: Path, out: Path) -> list[Path]:
    """The run folder's picture of the plan."""
    from dist_mtp.monitor.plan_files import PICTURE

    if not (run / PICTURE).exists():
        return []
    if not (out / PICTURE).exists() or not (out / PICTURE).samefile(run / PICTURE):  # out=RUN
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / PICTURE, out / PICTURE)
    return [out / PICTURE]


def _timeline(run: Path, request: Request) -> list[Path]:
    """The measured step that was asked for, or the last one if there is any."""
    from dist_mtp.monitor.timeline_files import TIMELINE_PICTURE, draw_timeline, measured_steps

    measured, step = measured_steps(run), request.step
    if step is not None and step not in measured:
        raise ConfigError(f"step {step} of {run} was not measured: {', '.join(map(str, measured)) or 'no step'} was")
    if not measured:
        return []
    name = TIMELINE_PICTURE if step is None else f"timeline_step_{step}.png"
    try:
        draw_timeline(run, measured[-1] if step is None else step, request.out / name)
    except DataError as error:
        if step is not None:
            raise
        print(f"not drawn: {error}", file=sys.stderr)  # nobody asked for just this one
        return []
    return [request.out / name]


def _num_layers(run: Path) -> int | None:
    """Of the trunk, as the run's configuration says."""
    try:
        config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        return int(config["model"]["num_layers"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):  # metrics alone are enough for pictures
        return None


def _rows(run: Path) -> list[dict[str, float]]:
    if not run.is_dir():
        guess = Path("runs") / run
        hint = f"did you mean {guess}?" if guess.is_dir() else USAGE
        raise ConfigError(f"there is no run folder {run}: {hint}")
    try:
        rows = read_metrics(run / METRICS)
    except FileNotFoundError:
        rows = []
    if not rows:
        raise DataError(f"{run} has no metrics yet: {run / METRICS} gets a line when a step is done")
    return rows


def _names(runs: Sequence[Path]) -> list[str]:
    """Names of folders, or whole paths where two folders have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
