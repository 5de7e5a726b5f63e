"""``timelines/step_XXXXXXXX.json`` and ``timeline.png``: measured steps as files of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.plots import plot_timeline
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.timeline import MeasuredTimeline

FOLDER, TIMELINE_PICTURE = "timelines", "timeline.png"


def write_timeline(plan: Plan, step: int, timeline: MeasuredTimeline, folder: Path) -> None:
    """Add the step's numbers to ``folder``, and draw it over the picture of the step that was measured before.

    Raises:
        OSError: the folder cannot be written.
    """
    content = {"step": step, "predicted": {"step_time": plan.timeline.step_time, "bubble": plan.timeline.bubble}}
    text = json.dumps(content | timeline.to_json())
    replace_text(folder / FOLDER / f"step_{step:08d}.json", text + "\n")
    plot_timeline(plan, step, timeline, folder / TIMELINE_PICTURE)
