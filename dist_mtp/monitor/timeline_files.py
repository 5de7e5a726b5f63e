"""``timelines/step_XXXXXXXX.json`` and ``timeline.png``: measured steps as files of a run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dist_mtp.errors import DataError
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.plots import Pipeline, plot_timeline
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.timeline import MeasuredTimeline

FOLDER, TIMELINE_PICTURE = "timelines", "timeline.png"


def write_timeline(plan: Plan, step: int, timeline: MeasuredTimeline, folder: Path) -> None:
    """Add the step's numbers to ``folder``, and draw it over the picture of the step that was measured before.

    Raises:
        OSError: the folder cannot be written.
    """
    pipeline = Pipeline.of(plan)
    planned = dataclasses.asdict(pipeline)
    predicted = {key: planned.pop(key) for key in ("step_time", "bubble")}
    content = {"step": step, "plan": planned, "predicted": predicted} | timeline.to_json()
    replace_text(timeline_file(folder, step), json.dumps(content) + "\n")
    plot_timeline(pipeline, step, timeline, folder / TIMELINE_PICTURE)


def draw_timeline(run: Path, step: int, picture: Path) -> None:
    """Draw one measured step of a run again.

    Raises:
        DataError: its file is damaged, or of another version.
        OSError: there is no such file, or the picture cannot be written.
    """
    path = timeline_file(run, step)
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        fields = content["plan"] | content["predicted"]
        pipeline = Pipeline(**fields | {"stage_to_rank": tuple(fields["stage_to_rank"])})
        timeline = MeasuredTimeline.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no measured step of this version of dist_mtp: {error!r}; delete it") from error
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_timeline(pipeline, step, timeline, picture)


def measured_steps(run: Path) -> list[int]:
    """Steps of a run that have a file, in order."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run / FOLDER).glob("step_*.json"))


def drop_timelines(run: Path, *, after: int) -> None:
    """Forget steps after a checkpoint, which will be trained again: another one of them may be measured then."""
    for step in measured_steps(run):
        if step > after:
            timeline_file(run, step).unlink()


def timeline_file(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}.json"
