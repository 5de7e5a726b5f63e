"""What a benchmark of pipelines writes down, and how it starts its ranks."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))


def start_ranks(function: str, num_ranks: int, folder: Path, *, timeout_s: float) -> None:
    """Run ``module:function`` of this folder's parent on ``num_ranks`` CPU ranks, one thread each, with ``folder``.

    Raises:
        AssertionError: a rank failed or the timeout passed; with all output and stacks. No rank is left behind.
    """
    from support.ranks import run_ranks

    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    run_ranks(function, num_ranks, folder, timeout_s=timeout_s)


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """Median and interquartile range beside the values themselves."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "iqr": high - low, "values": list(values)}


def circumstances() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 2)},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")
