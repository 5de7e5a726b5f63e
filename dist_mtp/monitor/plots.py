"""A step as a Gantt chart: the plan's and the measured one. matplotlib is imported when a picture is drawn, never before."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_mtp.pipeline.plan import Plan
    from dist_mtp.pipeline.simulate import Event
    from dist_mtp.pipeline.timeline import MeasuredTimeline

_COLOURS = {"F": "#2f6fb2", "I": "#e08a1e", "W": "#3f9b5a", "B": "#c9573c"}
_NAMES = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "full backward"}
_ORDINALS = {1: "first", 2: "second", 3: "third"}
_IDLE, _INK, _FAINT = "#ececec", "#222222", "#666666"
_WAIT: dict[str, Any] = {"facecolor": _IDLE, "edgecolor": "#b0b0b0", "hatch": "//////", "linewidth": 0.0}

_DPI = 130
_NUMBER_SIZE = 6.0
_DIGIT_WIDTH = 3.9
"""Points; of the microbatch numbers."""
_MIN_EDGE_WIDTH = 2.5
"""Points below which a box gets no white edge, as the edge would hide it."""
_MIN_HATCH_WIDTH = 1.0
"""Points below which a wait is not hatched: nobody would see it, and hatching is what takes longest to draw."""


@dataclass(frozen=True)
class Pipeline:
    """What a picture says about the plan of its step."""

    schedule: str
    placement: str
    micro_batches: int
    stage_to_rank: tuple[int, ...]
    step_time: float
    """Predicted, in seconds."""
    bubble: float
    """Predicted."""

    @staticmethod
    def of(plan: Plan) -> Pipeline:
        timeline = plan.timeline
        return Pipeline(
            plan.schedule, plan.placement, plan.micro_batches, plan.stage_to_rank, timeline.step_time, timeline.bubble
        )

    @property
    def pp(self) -> int:
        return max(self.stage_to_rank) + 1

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank]


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draw the plan's predicted step as a Gantt chart and write it as PNG.

    One lane per rank; colour tells what is computed, tint the rank's first or a later virtual stage, the number the
    microbatch; grey is idle.
    """
    step_time = plan.timeline.step_time
    pipeline = Pipeline.of(plan)
    title = f"{_schedule(pipeline)}: predicted bubble {100 * pipeline.bubble:.1f} %, step {_shown(step_time)}"
    _draw(pipeline, plan.timeline.events, step_time, path, title=title, clock=plan.profile.name)


def plot_timeline(pipeline: Pipeline, step: int, timeline: MeasuredTimeline, path: str | Path) -> None:
    """Draw a measured step in the style of :func:`plot_plan`; hatched grey is the wait for a message."""
    title = (
        f"{_schedule(pipeline)}: measured step {step}, bubble {100 * timeline.bubble:.1f} % "
        f"(plan {100 * pipeline.bubble:.1f} %), {_shown(timeline.step_time)}"
    )
    waits = [(event.rank, event.start - event.waited, event.waited) for event in timeline.events if event.waited > 0]
    _draw(pipeline, timeline.events, timeline.step_time, path, title=title, clock="this run's devices", waits=waits)


def _draw(
    pipeline: Pipeline,
    events: Sequence[Event],
    step_time: float,
    path: str | Path,
    *,
    title: str,
    clock: str,
    waits: Sequence[tuple[int, float, float]] = (),
) -> None:
    """The Gantt chart of ``events``; ``waits`` are (rank, start, seconds), ``clock`` names what the times are of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale, unit = _time_unit(step_time)
    actions = max(Counter(event.rank for event in events).values())
    width = min(max(10.0, 0.15 * actions), 32.0)
    text = 8 + 0.2 * (width - 10)  # a wide picture is looked at from further away
    figure = Figure(
        figsize=(width, 1.4 + 0.06 * text + (0.3 + 0.012 * width) * pipeline.pp), dpi=_DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(0, step_time * scale)
    axes.set_ylim(pipeline.pp - 0.5, -0.5)  # rank 0 on top
    figure.draw_without_rendering()  # settles the layout, so that the width of a lane in points is known
    points = axes.get_window_extent().width * 72 / _DPI / step_time

    lanes: dict[tuple[int, str, int], list[Event]] = defaultdict(list)
    order = {stage: pipeline.stages_of(rank).index(stage) for stage, rank in enumerate(pipeline.stage_to_rank)}
    for event in events:
        lanes[event.rank, event.action.kind.value, order[event.action.stage]].append(event)
    number_width = _DIGIT_WIDTH * len(str(pipeline.micro_batches - 1)) + 0.5
    for rank in range(pipeline.pp):
        axes.broken_barh([(0, step_time * scale)], (rank - 0.4, 0.8), facecolor=_IDLE, zorder=0)
        axes.broken_barh(
            [
                (start * scale, seconds * scale)
                for waiting, start, seconds in waits
                if waiting == rank and seconds * points > _MIN_HATCH_WIDTH
            ],
            (rank - 0.4, 0.8),
            **_WAIT,
            zorder=0.5,
        )
    for (rank, kind, stage), line in lanes.items():
        box_width = statistics.median(event.end - event.start for event in line) * points
        axes.broken_barh(
            [(event.start * scale, (event.end - event.start) * scale) for event in line],
            (rank - 0.4, 0.8),
            facecolor=_tint(kind, stage),
            edgecolor="white",
            linewidth=0.35 if box_width > _MIN_EDGE_WIDTH else 0.0,
            zorder=1,
        )
        for event in line:
            if (event.end - event.start) * points > number_width:
                axes.text(
                    (event.start + event.end) / 2 * scale,
                    rank,
                    str(event.action.microbatch),
                    ha="center",
                    va="center_baseline",
                    fontsize=_NUMBER_SIZE,
                    color="white" if stage == 0 else _INK,
                )

    # The layout needs the labels around the lanes, and would measure thousands of boxes and numbers inside them.
    for artist in (*axes.collections, *axes.texts):
        artist.set_in_layout(False)
    lanes_of = range(pipeline.pp)
    axes.set_yticks(lanes_of, [_lane_label(pipeline, rank) for rank in lanes_of], fontsize=text, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=text, colors=_FAINT)
    axes.set_xlabel(f"time in {unit} on {clock}", fontsize=text, color=_FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, loc="left", fontsize=1.3 * text, color=_INK)
    _add_legend(figure, {(kind, stage) for _, kind, stage in lanes}, text, waits=bool(waits))
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _schedule(pipeline: Pipeline) -> str:
    return f"{pipeline.schedule} on {pipeline.placement} placement, P={pipeline.pp}, M={pipeline.micro_batches}"


def _lane_label(pipeline: Pipeline, rank: int) -> str:
    stages = pipeline.stages_of(rank)
    return f"rank {rank}   stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def _add_legend(figure: Any, drawn: set[tuple[str, int]], text: float, *, waits: bool) -> None:
    """One column per kind, one row per stage of a rank, below the picture."""
    from matplotlib.patches import Patch

    several = max(stage for _, stage in drawn) > 0
    patches = []
    for kind, stage in sorted(drawn, key=lambda item: (list(_COLOURS).index(item[0]), item[1])):
        place = f", {_ORDINALS.get(stage + 1, f'{stage + 1}th')} stage" if several else ""
        patches.append(Patch(facecolor=_tint(kind, stage), label=f"{kind}  {_NAMES[kind]}{place}"))
    patches.append(Patch(facecolor=_IDLE, label="idle"))
    if waits:
        patches.append(Patch(**_WAIT, label="idle: waiting for a message"))
    columns = len({kind for kind, _ in drawn}) + 1
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=text, frameon=False)


def _tint(kind: str, stage: int) -> tuple[float, float, float]:
    """The kind's colour for a rank's first stage, paler for each later one."""
    from matplotlib.colors import to_rgb

    paleness = 1 - 0.5**stage
    red, green, blue = (channel + (1 - channel) * paleness for channel in to_rgb(_COLOURS[kind]))
    return red, green, blue


def _shown(seconds: float) -> str:
    scale, unit = _time_unit(seconds)
    return f"{seconds * scale:.4g} {unit}"


def _time_unit(seconds: float) -> tuple[float, str]:
    """Factor from seconds to a unit in which ``seconds`` is at least 1, and its name."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return scale, unit
    return 1e6, "µs"
