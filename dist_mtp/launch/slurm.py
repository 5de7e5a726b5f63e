"""Runs as Slurm batch jobs: one task per node, which starts that node's ranks.

SIGTERM comes ``launcher.slurm.stop_before_s`` before the time limit and ends the run with a checkpoint; the same command, or
Slurm itself after a node failed, continues it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from dist_mtp.config import Config, config_hash, to_dict
from dist_mtp.errors import EXIT_DONE, EXIT_RANK_FAILURE, ConfigError
from dist_mtp.launch.command import agent_command, shown
from dist_mtp.launch.outcome import SAID, explain_stop, training_began
from dist_mtp.launch.sbatch import EndedJob, queue_job, run_job
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.result import read_result

SUBMITTED = "launch/submitted.yaml"
"""In the run folder: what the job starts with. ``config.yaml`` follows the nodes that came (``launcher.min_nodes``), and Slurm
may start the job again."""
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
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
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
        config: resolved.
        min_nodes: that suffice when Slurm does not have all.
    """
    folder = Path(config.run_dir).absolute()
    command = shown(agent_command(config, folder / SUBMITTED, corpus.absolute()))
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
    _write_submitted(config)
    replace_text(script, job_script(config, corpus, min_nodes=min_nodes))
    if config.launcher.slurm.wait:
        before = training_began(config)
        job = run_job(script)
        output = folder / "logs" / f"slurm-{job.number}.out"
        return _code(config, job, job.code, output, trained=training_began(config) != before)
    number = queue_job(script)
    print(f"queued as job {number}; output: {folder / 'logs' / f'slurm-{number}.out'}; stop with: scancel {number}")
    return EXIT_DONE


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
        "\t".join([str(_write_submitted(config)), str(corpus.absolute()), config_hash(config)])
        for config, corpus in zip(configs, corpora, strict=True)
    ]
    replace_text(folder / POINTS, "".join(f"{line}\n" for line in lines))
    replace_text(folder / ARRAY, array_script(first, len(configs), folder))
    if first.launcher.slurm.wait:
        before = [training_began(config) for config in configs]
        job = run_job(folder / ARRAY)
        codes = []
        for task, config in enumerate(configs):
            output = folder / "launch" / f"slurm-{job.number}_{task}.out"
            codes.append(_code(config, job, None, output, trained=training_began(config) != before[task]))
        return next((code for code in codes if code), EXIT_DONE)
    number = queue_job(folder / ARRAY)
    print(f"queued {len(configs)} points as array {number}; output: {folder / 'launch'}; stop with: scancel {number}")
    return EXIT_DONE


def _write_submitted(config: Config) -> Path:
    file = (Path(config.run_dir) / SUBMITTED).absolute()
    replace_text(file, yaml.safe_dump(to_dict(config), sort_keys=False))
    return file


def _code(config: Config, job: EndedJob, code: int | None, output: Path, *, trained: bool) -> int:
    """Exit code of a run whose job has ended: its own, if it left a result.

    Args:
        code: of its script; None if it is one of several.
        trained: its ranks had begun to train.
    """
    result = read_result(config.run_dir)
    if result is not None:
        return int(result["exit_code"])
    if job.stopped_by is not None:
        outcome = explain_stop(config, job.stopped_by, trained=trained)
        print(f"job {job.number}: {outcome.message}", file=sys.stderr)
        return outcome.code
    ended = "ended" if code is None else f"ended with exit code {code}"
    print(f"error: job {job.number} {ended} without a result of {config.run_dir}: see {output}", file=sys.stderr)
    return code if code in SAID else EXIT_RANK_FAILURE


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
