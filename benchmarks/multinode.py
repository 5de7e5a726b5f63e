"""Runs of four and six ranks on hosts in network namespaces: equal numbers, the cost of a slow link, and broken links.

    sudo .venv/bin/python benchmarks/multinode.py            # about six minutes on two cores

Needs root, sshd and pdsh; see ``tests/support/hosts.py`` for the hosts. Three questions, answered in
``benchmarks/results/multinode.json``, and what the broken runs printed in ``multinode.log`` beside it:

- ``launchers``: one run, started on one host and on two in every way. Are all metrics bitwise equal?
- ``link``: the pipeline crosses two hosts; runs on the full and on the limited link take turns. What does the limit cost?
- ``cut``: a cable is pulled in the middle of a run. How long until every launcher has ended, which link is named, and does
  the run go on to the same losses when the link is back?

Exit code 1 unless metrics are equal everywhere, and every cut is noticed, named and survived with nothing left running.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import host_runs, launches  # noqa: E402 - imports below need the path of this checkout
from support.host_runs import STEPS, Commands, by_deepspeed, by_hand, by_mpirun, by_ssh, on_each, rows  # noqa: E402
from support.hosts import Host, Hosts, needs_sshd, unavailable  # noqa: E402

from dist_mtp.monitor.metrics import read_metrics  # noqa: E402

RATE_MBIT, LATENCY_MS = 100.0, 2.0
ROUNDS = 3
"""Of turns between the full and the limited link."""
NODE_TIMEOUT_S = 5.0
END_S = 60.0
Starter = Callable[[Hosts, Sequence[str]], dict[Host, list[str]]]
WIDE = ("train.seq_len=128", "train.micro_batch_size=4", "train.micro_batches=4", "parallel.pp=2", "parallel.dp=2")
"""Hidden states of 256 KiB per message between stages, where most of the time still goes into computing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "multinode.json")
    arguments = parser.parse_args()
    if problem := needs_sshd() or unavailable("pdsh", "mpirun"):
        print(f"not run: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dist_mtp_multinode_") as temporary:
        folder = Path(temporary)
        log: list[str] = []
        results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("torch", "deepspeed")},
            "launchers": compare_launchers(folder),
            "link": compare_links(folder),
            "cut": [
                cut(folder, log, nodes=2, start=on_each),
                cut(folder, log, nodes=2, start=by_ssh),
                cut(folder, log, nodes=3, start=on_each, edge=(1, 2)),
            ],
        }
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    arguments.output.with_suffix(".log").write_text("\n".join(log).replace(f"{ROOT}/", "").replace(f"{temporary}/", ""))
    print(json.dumps(results, indent=2))
    equal = all(way["equal"] for way in results["launchers"]["ways"].values()) and results["link"]["equal"]
    survived = all(
        broken["named"] and broken["left_behind"] == 0 and broken["continued_equal"] for broken in results["cut"]
    )
    return 0 if equal and survived else 1


def compare_launchers(folder: Path) -> dict[str, Any]:
    """The run on one host, and on two in every way."""
    alone = run_alone(folder, "alone", host_runs.settings(folder, "alone"))
    ways = {}
    with Hosts(2, rate_mbit=RATE_MBIT, latency_ms=LATENCY_MS, own_name="loopback") as cluster:
        cluster.start_sshd()
        starters: tuple[Starter, ...] = (by_ssh, on_each, by_hand, by_deepspeed, by_mpirun)
        for start in starters:
            name = start.__name__
            print(f"launchers: {name}", file=sys.stderr)
            run(cluster, start(cluster, host_runs.settings(folder, name)), folder, name)
            ways[name] = {"equal": rows(folder / name) == alone, "last_loss": rows(folder / name)[-1]["loss"]}
    return {"steps": STEPS, "ranks": "2 hosts x 2, pp=2 dp=2 ep=2", "alone_last_loss": alone[-1]["loss"], "ways": ways}


def compare_links(folder: Path) -> dict[str, Any]:
    """Median step times on the full and on the limited link, in turns."""
    limits: dict[str, dict[str, float]] = {
        "full": {},
        "limited": {"rate_mbit": RATE_MBIT, "latency_ms": LATENCY_MS},
    }
    alone = run_alone(folder, "wide", launches.overrides(folder, "wide", *WIDE, "train.steps=12"))
    step_s: dict[str, list[float]] = {name: [] for name in limits}
    is_equal = True
    for turn in range(ROUNDS):
        for name, limit in limits.items():
            print(f"link: {name}, {turn + 1} of {ROUNDS}", file=sys.stderr)
            run_name = f"{name}-{turn}"
            with Hosts(2, **limit) as cluster:  # type: ignore[arg-type]
                cluster.start_sshd()
                overrides = launches.overrides(folder, run_name, *WIDE, "train.steps=12")
                run(cluster, by_ssh(cluster, overrides), folder, run_name)
            is_equal &= rows(folder / run_name) == alone
            step_s[name] += [row["step_time"] for row in read_metrics(folder / run_name / "metrics.jsonl")[2:]]
    medians = {name: statistics.median(times) for name, times in step_s.items()}
    return {
        "limit": {"rate_mbit": RATE_MBIT, "latency_ms": LATENCY_MS},
        "overrides": WIDE,
        "median_step_s": {name: round(median, 4) for name, median in medians.items()},
        "limited_over_full": round(medians["limited"] / medians["full"], 3),
        "equal": is_equal,
    }


def cut(folder: Path, log: list[str], *, nodes: int, start: Starter, edge: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Pull a cable after step 4 of 8, wait for the end, plug it in and continue."""
    name = f"cut-{start.__name__}-{edge[0]}{edge[1]}"
    print(name, file=sys.stderr)
    layout = ["parallel.pp=2", f"parallel.dp={nodes}", f"train.steps={STEPS}", "checkpoint.every=2"]
    alone = run_alone(folder, f"{name}-alone", launches.overrides(folder, f"{name}-alone", *layout))
    overrides = launches.overrides(folder, name, *layout, f"launcher.node_timeout_s={NODE_TIMEOUT_S}")
    with Hosts(nodes) as cluster:
        cluster.start_sshd()
        ends = [cluster.hosts[end] for end in edge]
        with Commands(cluster, start(cluster, overrides), folder, name) as commands:
            commands.wait_for_step(folder / name, STEPS // 2)
            cluster.cut(*ends)
            cut_at = time.monotonic()
            ended = commands.end(END_S)
            left = commands.left_behind(3)
            log.append(f"===== {name}: cable pulled after step {STEPS // 2}\n{commands.output}")
        trained = len(rows(folder / name))
        cluster.restore(*ends)
        with Commands(cluster, by_ssh(cluster, overrides), folder, f"{name}-resumed") as commands:
            resumed = commands.end()
            log.append(f"===== {name}: cable back, the same run again\n{commands.output}")
    errors = [line for end in ended.values() for line in end.output.splitlines() if line.startswith("error: ")]
    return {
        "started": start.__name__,
        "hosts": nodes,
        "cable": " - ".join(host.name for host in ends),
        "node_timeout_s": NODE_TIMEOUT_S,
        "exit_codes": sorted({end.code for end in ended.values()}),
        "seconds_to_end": [round(end.ended_at - cut_at, 1) for end in ended.values()],
        "messages": sorted(set(errors)),
        "named": any(all(host.name in line for host in ends) for line in errors),
        "left_behind": sum(map(len, left.values())),
        "steps_before": trained,
        "resumed_exit_code": next(iter(resumed.values())).code,
        "continued_equal": rows(folder / name) == alone,
    }


def run_alone(folder: Path, name: str, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Metrics of a run on one host, without a network."""
    ended = launches.train(launches.dist_mtp(*overrides), folder / name)
    if ended.code != 0:
        raise RuntimeError(f"{name} ended with exit code {ended.code}:\n{ended.output}")
    return rows(folder / name)


def run(cluster: Hosts, commands: dict[Host, list[str]], folder: Path, name: str) -> None:
    """Train to the end on all hosts."""
    with Commands(cluster, commands, folder, name) as running:
        ended = running.end()
        if {end.code for end in ended.values()} != {0} or running.left_behind(3):
            raise RuntimeError(f"{name} did not end well:\n{running.output}")


if __name__ == "__main__":
    sys.exit(main())
