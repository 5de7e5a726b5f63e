"""What ``dist-mtp plot`` draws from ``metrics.jsonl``: which charts there are, and which lines of a run each one has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_mtp.monitor.depths import by_depth, expected_tokens_per_step

Row = Mapping[str, float]
EXPECTED_TOKENS = "expected_tokens_per_step"


@dataclass(frozen=True)
class Line:
    """One quantity of one run against the step."""

    label: str
    """What it is, alike in all runs."""
    steps: tuple[float, ...]
    values: tuple[float, ...]
    sparse: bool
    """Known at some steps only, so that its points are marked."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    ``patterns`` name its metrics: label -> regular expression of the key; a number that the expression captures replaces
    ``{k}`` in the label. Several keys under one label are reduced to the largest value.
    """

    title: str
    patterns: Mapping[str, str]
    factor: float = 1.0
    """From the metric's unit to the chart's."""
    log_scale: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture, ``NAME.png``."""

    name: str
    panels: tuple[Panel, ...]


def _fp8(title: str, quantity: str) -> Panel:
    roles = {"inputs": "input", "weights": "weight", "gradients": "grad"}
    return Panel(title, {label: rf"fp8_{quantity}_\w+_{role}" for label, role in roles.items()}, 100, log_scale=True)


CHARTS: tuple[Chart, ...] = (
    Chart(
        "losses",
        (
            Panel("training loss, nats/token", {"main": "loss_main", "mtp {k}": r"loss_mtp_(\d+)"}),
            Panel("held-out loss, nats/token", {"main": "eval_loss_main", "mtp {k}": r"eval_loss_mtp_(\d+)"}),
        ),
    ),
    Chart(
        "acceptance",
        (
            Panel("agreement with the main head in training, %", {"mtp {k}": r"accept_mtp_(\d+)"}, 100),
            Panel("on held-out text, %", {"mtp {k}": r"eval_accept_mtp_(\d+)"}, 100),
            Panel("expected tokens per decoding step", {"all depths": EXPECTED_TOKENS}),
        ),
    ),
    Chart(
        "expert_load",
        (
            Panel("largest load over the mean load, minus 1", {"layer {k}": r"load_violation_layer_(\d+)"}),
            Panel("in the worst layer", {"worst layer": "load_max_violation"}),
            Panel("norm of the router biases", {"all routers": "router_bias_norm"}),
        ),
    ),
    Chart(
        "all_to_all",
        (
            Panel("all-to-all, MiB per step, all ranks", {"sent": "all_to_all_bytes"}, 2**-20),
            Panel("wait for the all-to-all, s, slowest rank", {"waited": "all_to_all_wait_s"}),
        ),
    ),
    Chart(
        "throughput",
        (
            Panel("tokens/s", {"all ranks": "tokens_per_s"}),
            Panel("share of the peak (MFU), %", {"each device": "mfu"}, 100),
        ),
    ),
    Chart(
        "optimizer",
        (Panel("learning rate", {"all groups": "lr"}), Panel("gradient norm", {"before clipping": "grad_norm"})),
    ),
    Chart("memory", (Panel("peak memory so far, GiB", {"pipeline rank {k}": r"memory_rank_(\d+)_gib"}),)),
    Chart(
        "bubble",
        (
            Panel("bubble, %", {"measured": "bubble", "plan": "bubble_plan"}, 100),
            Panel("time in which a stage is computed, %", {"stage {k}": r"stage_(\d+)_busy_share"}, 100),
            Panel("wait for messages, s, mean rank", {"waited": "p2p_wait_s"}),
        ),
    ),
    Chart(
        "fp8",
        (
            _fp8("values that become 0, %, worst kind of layer", "underflow"),
            _fp8("values beyond the largest, %, worst kind", "saturation"),
            _fp8("relative error, %, worst kind", "error"),
        ),
    ),
)


def with_derived(row: Row) -> Row:
    """The row with what follows from it and is drawn."""
    rates = by_depth(row, "accept_mtp_")
    return {**row, EXPECTED_TOKENS: expected_tokens_per_step(rates)} if rates else row


def lines(panel: Panel, rows: Sequence[Row]) -> list[Line]:
    r"""The panel's lines for one run, in order of its patterns and of their numbers; quantities never measured have none.

    >>> rows = [{"step": 1, "loss_mtp_1": 5.0, "loss_mtp_2": 6.0}, {"step": 2, "loss_mtp_1": 4.0}]
    >>> [(line.label, line.values) for line in lines(Panel("loss", {"mtp {k}": r"loss_mtp_(\d+)"}), rows)]
    [('mtp 1', (5.0, 4.0)), ('mtp 2', (6.0,))]
    """
    keys = {key for row in rows for key in row}
    found = []
    for label, pattern in panel.patterns.items():
        matches = sorted(filter(None, map(re.compile(pattern).fullmatch, keys)), key=_number)
        for shown, group in _by_label(label, matches).items():
            points = [(row["step"], max(row[key] for key in group if key in row)) for row in rows if group & row.keys()]
            steps, values = zip(*points, strict=True)
            found.append(Line(shown, steps, tuple(panel.factor * v for v in values), sparse=len(points) < len(rows)))
    return found


def _number(match: re.Match[str]) -> int:
    return int(match[1]) if match.re.groups else 0


def _by_label(label: str, matches: Iterable[re.Match[str]]) -> dict[str, set[str]]:
    """Label -> the keys that it stands for."""
    groups: dict[str, set[str]] = {}
    for match in matches:
        groups.setdefault(label.format(k=_number(match)), set()).add(match[0])
    return groups
