"""``dist-mtp plot``: the charts of runs, or the summary of a sweep, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.errors import ConfigError, DataError
from dist_mtp.monitor.metrics import METRICS, read_metrics

USAGE = (
    "dist-mtp plot RUN [RUN ...] [out=FOLDER], or dist-mtp plot sweep FOLDER, where RUN is a folder such as runs/tiny"
)
FOLDER = "plots"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    runs: tuple[Path, ...]
    sweep: Path | None
    out: Path


def main(arguments: list[str]) -> int:
    """Draw what :data:`USAGE` says; returns 0.

    Raises:
        ConfigError: no such run, or the pictures cannot be written.
        DataError: a run has no metrics yet, or damaged or unknown ones.
    """
    request = parse(arguments)
    if request.sweep is not None:
        return _sweep(request.sweep)
    runs = {name: _rows(run) for name, run in zip(_names(request.runs), request.runs, strict=True)}

    from dist_mtp.monitor.run_pictures import draw_runs

    try:
        written = draw_runs(runs, request.out)
        if len(request.runs) == 1:  # spreads of several runs cannot lie over each other
            written += _spreads(request.runs[0], request.out)
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
    runs = tuple(Path(argument) for argument in arguments if not argument.startswith(("out=", "-")))
    if unknown := [argument for argument in arguments if argument.startswith("-")]:
        raise ConfigError(f"dist-mtp plot has no option {unknown[0]}: {USAGE}")
    if not runs or len(outs) > 1 or outs == [Path()]:
        raise ConfigError(f"give at least one run, and at most one folder for the pictures: {USAGE}")
    default = runs[0] / FOLDER if len(runs) == 1 else Path(FOLDER)
    return Request(runs, None, outs[0] if outs else default)


def _sweep(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: {USAGE}")
    from dist_mtp.monitor.sweep_report import write_summary

    print(write_summary(folder))
    return 0


def _spreads(run: Path, out: Path) -> list[Path]:
    """The picture of the experts' loads, if the run has TensorBoard's histograms of them."""
    from dist_mtp.monitor.load_pictures import NAME, draw_spreads, read_spreads

    spreads = read_spreads(run / "tensorboard")
    if not spreads:
        return []
    path = out / f"{NAME}.png"
    draw_spreads(spreads, path)
    return [path]


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
