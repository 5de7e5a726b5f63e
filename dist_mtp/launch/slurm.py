"""Runs as Slurm batch jobs: one task per node, which starts that node's ranks.

SIGTERM comes ``launcher.slurm.stop_before_s`` before the time limit and ends the run with a checkpoint; the same command, or
Slurm itself after a node failed, continues it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_mtp.config import Config, config_hash
from dist_mtp.errors import EXIT_DONE, EXIT_RANK_FAILURE, ConfigError
from dist_mtp.launch.command import agent_command, shown
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.result import read_result
from dist_mtp.run_folder import CONFIG_FILE

SCRIPT, ARRAY, POINTS = "launch/job.sbatch", "launch/array.sbatch", "launch/points.tsv"

_NAME = re.compile(r"[\w.,:@+/-]+")
_VALID = {
    "partition": _NAME,
    "account": _NAME,
    "qos": _NAME,
    "reservation": _NAME,
    "constraint": re.compile(r"[\w.,:@+/&|*()\[\]-]+"),
    "time_limit": re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})"),
    "memory_per_node": re.compile(r"\d+[KMGT]?"),
}
_FOLDER = re.compile(r"[^\n\r\"'\\%$`]+")
"""Of output files: Slurm reads ``%`` as a pattern, and the file as a shell does."""

_BODY = """
set -euo pipefail
{setup}
# The first node, as Slurm itself reaches it. Jobs that share a node do not meet: each has a port of its own.
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')"
rendezvous="${{address:-$first}}:$((20000 + SLURM_JOB_ID % 10000))"
{point}
# Node launchers end each other; srun must not do it for them, or their exit codes would be lost.
exec srun --kill-on-bad-exit=0 --ntasks-per-node=1 bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' node \\
    {command} \\
    --nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$rendezvous"
"""
_READ_POINT = """
IFS=$'\\t' read -r config corpus hash < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {points})
"""


def check(config: Config) -> None:
    """Refuse values that are none of Slurm's.

    Raises:
        ConfigError: names the key and what it may be.
    """
    slurm = config.launcher.slurm
    for key, pattern in _VALID.items():
        value = getattr(slurm, key)
        if value is not None and not pattern.fullmatch(value):
            raise ConfigError(
                f"launcher.slurm.{key}={value!r} is not what sbatch takes there: letters, digits and {_SIGNS[key]}"
            )
    for key in ("stop_before_s", "gpus_per_node"):
        number = getattr(slurm, key)
        if number is not None and number < 0:
            raise ConfigError(f"launcher.slurm.{key}={number} must not be negative")
    for key in ("cpus_per_node", "array_limit"):
        number = getattr(slurm, key)
        if number is not None and number < 1:
            raise ConfigError(f"launcher.slurm.{key}={number} must be at least 1")
    if slurm.setup_script is not None and not Path(slurm.setup_script).is_file():
        raise ConfigError(
            f"launcher.slurm.setup_script={slurm.setup_script} is not a file: every node would fail to source it"
        )
    _output(Path(config.run_dir))


_SIGNS = dict.fromkeys(("partition", "account", "qos", "reservation"), "_ . , : @ + / -") | {
    "constraint": "_ . , : @ + / - & | * ( ) [ ]",
    "time_limit": "the form days-hours:minutes:seconds, or a part of it",
    "memory_per_node": "K, M, G or T at the end",
}


def job_script(config: Config, corpus: Path, *, min_nodes: int | None = None) -> str:
    """The batch script of one run.

    Args:
        config: resolved; what the run folder's ``config.yaml`` holds.
        min_nodes: that suffice when Slurm does not have all.
    """
    folder = Path(config.run_dir).absolute()
    command = shown(agent_command(config, folder / CONFIG_FILE, corpus.absolute()))
    options = _options(config, min_nodes) | {"output": _output(folder) + "/logs/slurm-%j.out"}
    return _script(config, options, command, point="")


def array_script(config: Config, count: int, folder: Path) -> str:
    """The batch script of ``count`` runs that ``folder``'s list of points names, one per task of an array.

    Args:
        config: of any of them; all have the same ``launcher`` section and number of ranks.
    """
    limit = config.launcher.slurm.array_limit
    array = f"0-{count - 1}" + (f"%{limit}" if limit is not None else "")
    folder = folder.absolute()
    options = _options(config, None) | {"array": array, "output": _output(folder) + "/launch/slurm-%A_%a.out"}
    agent = shown([sys.executable, "-u", "-m", "dist_mtp.launch.agent"])
    command = f'{agent} --config "$config" --corpus "$corpus" --config-hash "$hash"'
    return _script(config, options, command, point=_READ_POINT.format(points=shlex.quote(str(folder / POINTS))))


def submit(config: Config, corpus: Path, *, min_nodes: int | None = None) -> int:
    """Queue a run whose folder is prepared; returns 0 once it is queued, or its exit code with ``launcher.slurm.wait``.

    Raises:
        ConfigError: Slurm is not there or refuses the job, in its own words.
    """
    folder = Path(config.run_dir)
    (folder / "logs").mkdir(exist_ok=True)
    script = folder / SCRIPT
    replace_text(script, job_script(config, corpus, min_nodes=min_nodes))
    if not config.launcher.slurm.wait:
        job = _sbatch([], script)
        print(f"queued as job {job}; output: {folder / 'logs' / f'slurm-{job}.out'}; stop with: scancel {job}")
        return EXIT_DONE
    _sbatch(["--wait"], script, may_fail=True)
    result = read_result(folder)
    return EXIT_RANK_FAILURE if result is None else int(result["exit_code"])


def submit_array(configs: Sequence[Config], corpora: Sequence[Path], folder: Path) -> int:
    """Queue the points of a sweep, whose run folders are prepared, as one job array; returns 0.

    Args:
        configs: resolved, one per point.
        corpora: their tokenised corpora.
        folder: of the sweep.

    Raises:
        ConfigError: points differ in ``launcher`` or in their number of ranks, or Slurm refuses the job.
    """
    first = configs[0]
    for config in configs:
        if config.launcher != first.launcher or config.world_size != first.world_size:
            raise ConfigError(
                f"points of a job array must ask for the same nodes, but {config.run_dir} has {config.world_size} ranks on "
                f"{config.launcher.nodes} nodes and {first.run_dir} {first.world_size} on {first.launcher.nodes}: sweep over "
                "what does not change launcher.* and parallel.pp x parallel.dp"
            )
    lines = [
        "\t".join([str((Path(config.run_dir) / CONFIG_FILE).absolute()), str(corpus.absolute()), config_hash(config)])
        for config, corpus in zip(configs, corpora, strict=True)
    ]
    replace_text(folder / POINTS, "".join(f"{line}\n" for line in lines))
    replace_text(folder / ARRAY, array_script(first, len(configs), folder))
    wait = first.launcher.slurm.wait
    job = _sbatch(["--wait"] if wait else [], folder / ARRAY, may_fail=wait)
    if not wait:
        print(f"queued {len(configs)} points as array {job}; output: {folder / 'launch'}; stop with: scancel {job}")
        return EXIT_DONE
    results = [read_result(config.run_dir) for config in configs]
    codes = [EXIT_RANK_FAILURE if result is None else int(result["exit_code"]) for result in results]
    return next((code for code in codes if code), EXIT_DONE)


def _options(config: Config, min_nodes: int | None) -> dict[str, str | int]:
    """``sbatch`` options by name."""
    slurm, nodes = config.launcher.slurm, config.launcher.nodes
    gpus = slurm.gpus_per_node
    if gpus is None and config.device != "cpu":
        gpus = config.world_size // nodes
    options: dict[str, str | int | None] = {
        "job-name": re.sub(r"[^\w.-]", "_", config.run_name),
        "nodes": f"{min_nodes}-{nodes}" if min_nodes is not None and min_nodes < nodes else nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus or None,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory_per_node,
        "time": slurm.time_limit,
        "signal": f"TERM@{slurm.stop_before_s}" if slurm.stop_before_s else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclusive": "" if slurm.exclusive else None,
        "requeue" if slurm.requeue else "no-requeue": "",
        "open-mode": "append",
    }
    return {name: value for name, value in options.items() if value is not None}


def _script(config: Config, options: dict[str, str | int], command: str, point: str) -> str:
    lines = [
        f"#SBATCH --{name}={_quoted(value)}" if value != "" else f"#SBATCH --{name}" for name, value in options.items()
    ]
    setup = config.launcher.slurm.setup_script
    # Slurm runs a copy of this file, so paths in it are absolute.
    source = f"source {shlex.quote(str(Path(setup).absolute()))}\n" if setup is not None else ""
    body = _BODY.format(setup=source, point=point, command=command)
    return "\n".join(["#!/usr/bin/env bash", *lines, re.sub(r"\n\n+", "\n\n", body).rstrip(), ""])


def _quoted(value: str | int) -> str:
    text = str(value)
    return f'"{text}"' if " " in text or "&" in text or "|" in text else text


def _output(folder: Path) -> str:
    if not _FOLDER.fullmatch(str(folder)):
        raise ConfigError(
            f"launcher=slurm writes output into {str(folder)!r}, but a path with quotes, %, $ or \\ means something else "
            "to Slurm: choose another run.dir"
        )
    return str(folder)


def _sbatch(options: Sequence[str], script: Path, *, may_fail: bool = False) -> str:
    """Number of the job that ``sbatch`` has queued."""
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(
            "launcher=slurm needs sbatch, which is not installed on this machine: give the command on a login node of the "
            "cluster, or use launcher=torchrun"
        ) from error
    if done.returncode != 0 and not (may_fail and done.stdout.strip()):
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"sbatch refuses {script}: {said}; see launcher.slurm.*")
    return done.stdout.strip().partition(";")[0]
