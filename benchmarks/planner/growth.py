"""What planning costs: seconds of ``make_plan`` and its parts, memory, and both of ``dist-mtp plan``; on Linux."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any
from unittest.mock import patch

from peers.results import ROOT

from dist_mtp.pipeline import choice
from dist_mtp.pipeline.plan import make_plan
from planner.configs import v3_config

TIMEOUT_S = 600.0
COMMAND_SECONDS, COMMAND_BYTES = 10.0, 2**30
"""What :func:`measure_command` may take."""
COMMAND = (
    "plan",
    "model=deepseek_v3",
    "mtp.depth=1",
    "precision=bf16",
    "train.seq_len=4096",
    "train.micro_batch_size=1",
    "train.micro_batches=120",
    "pipeline.device_profile=h100",
    "parallel.pp=16",
    "parallel.dp=128",
    "parallel.ep=64",
)
_PEAK_OF_CHILD = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
"""Starts a command from a small process: Linux counts what a process was before its exec as a peak of what it became."""


@dataclass(frozen=True)
class Size:
    """What is planned."""

    num_ranks: int
    micro_batches: int
    num_layers: int

    @property
    def num_units(self) -> int:
        return 2 * self.num_layers + 2


@dataclass(frozen=True)
class Sweep:
    """Sizes that differ in what ``varied`` names."""

    varied: str
    sizes: tuple[Size, ...]

    def values(self) -> list[int]:
        return [getattr(size, self.varied) for size in self.sizes]


LAYERS = 61
SWEEPS = (
    Sweep("num_ranks", tuple(Size(p, 8 * p, LAYERS) for p in (2, 4, 8, 16))),
    Sweep("micro_batches", tuple(Size(8, m, LAYERS) for m in (8, 32, 120))),
    Sweep("num_units", tuple(Size(8, 32, layers) for layers in (15, 30, LAYERS))),
)
QUICK_SWEEPS = (Sweep("micro_batches", (Size(2, 4, 15), Size(2, 8, 15))),)


def measure_sweeps(sweeps: Iterable[Sweep], repetitions: int) -> list[dict[str, Any]]:
    """Costs of each sweep's sizes, with the slope of each cost; every size is measured once."""
    measured: dict[Size, dict[str, float]] = {}
    result = []
    for sweep in sweeps:
        for size in sweep.sizes:
            if size not in measured:
                measured[size] = in_fresh_process(size, repetitions)
        costs = [measured[size] for size in sweep.sizes]
        result.append(
            {
                "varied": sweep.varied,
                "values": sweep.values(),
                "costs": [{**asdict(size), **measured[size]} for size in sweep.sizes],
                "log_log_slopes": {name: slope(sweep.values(), [cost[name] for cost in costs]) for name in costs[0]},
            }
        )
    return result


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the logarithms: 1 where costs grow in proportion to sizes, 0 where they do not grow."""
    return linear_regression([math.log(s) for s in sizes], [math.log(max(c, 1e-9)) for c in costs]).slope


def in_fresh_process(size: Size, repetitions: int) -> dict[str, float]:
    """:func:`measure` in a process of its own, whose memory is that of this one plan."""
    command = [sys.executable, "-m", "planner.growth", json.dumps([asdict(size), repetitions])]
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def measure(size: Size, repetitions: int) -> dict[str, float]:
    """Medians of seconds: all of ``make_plan``, cutting into stages, searching, and the rest; and bytes by which memory grew."""
    config = v3_config(size.num_ranks, size.micro_batches, f"model.num_layers={size.num_layers}")
    before = _status_bytes("VmRSS")
    seconds = defaultdict(list)
    for _ in range(repetitions):
        spent: dict[str, float] = defaultdict(float)
        started = time.perf_counter()
        with _timed("partition_candidates", spent), _timed("search", spent):
            make_plan(config)
        whole = time.perf_counter() - started
        seconds["make_plan_s"].append(whole)
        seconds["partition_s"].append(spent["partition_candidates"])
        seconds["search_s"].append(spent["search"])
        seconds["rest_s"].append(whole - sum(spent.values()))
    return {**{name: median(values) for name, values in seconds.items()}, "bytes": _status_bytes("VmHWM") - before}


def measure_command(folder: Path) -> dict[str, Any]:
    """``dist-mtp plan`` of DeepSeek-V3 on 16 pipeline ranks x 128 replicas, start of Python, table and picture included."""
    command = [sys.executable, "-m", "dist_mtp", *COMMAND, f"run.dir={folder / 'run'}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    wrapped = [sys.executable, "-S", "-c", _PEAK_OF_CHILD, *command]
    output = subprocess.run(wrapped, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True).stdout
    seconds = time.perf_counter() - started
    code, cpu_seconds, kilobytes = json.loads(output)
    if code != 0:
        raise SystemExit(f"dist-mtp {' '.join(COMMAND)} ended with code {code}")
    predicted = json.loads((folder / "run" / "plan.json").read_text())["predicted"]
    return {
        "command": ["dist-mtp", *COMMAND],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "max_rss_bytes": 1024 * kilobytes,
        "within_limits": seconds <= COMMAND_SECONDS and 1024 * kilobytes <= COMMAND_BYTES,
        "predicted_bubble": predicted["bubble"],
    }


@contextmanager
def _timed(name: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds to ``spent`` the seconds of a function that :mod:`dist_mtp.pipeline.choice` calls."""
    function: Callable[..., Any] = getattr(choice, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - started

    with patch.object(choice, name, timed):
        yield


def _status_bytes(key: str) -> int:
    """A figure of this process: ``VmRSS`` is its memory now, ``VmHWM`` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith(f"{key}:"))


if __name__ == "__main__":
    described, count = json.loads(sys.argv[1])
    print(json.dumps(measure(Size(**described), count)))
