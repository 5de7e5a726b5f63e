"""``plan.json`` and ``plan.png``: the plan as files of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.plots import plot_plan
from dist_mtp.pipeline.plan import Plan

PLAN, PICTURE = "plan.json", "plan.png"


def write_plan(plan: Plan, folder: Path) -> str:
    """Write both files into ``folder``, which is created if needed; returns the text of ``plan.json``."""
    text = json.dumps(plan.to_json(), indent=2)
    replace_text(folder / PLAN, text + "\n")
    plot_plan(plan, folder / PICTURE)
    return text
