"""Processors, limits, shared memory, disk and clock."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
import time
from pathlib import Path

from dist_mtp.config import Config
from dist_mtp.doctor.finding import Finding, output_of
from dist_mtp.monitor.formatting import compact, duration

_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_BYTES = 1 << 30
"""NCCL's buffers between GPUs that have no direct way; containers often have 64 MiB."""
_LEAST_FILES = 4096
"""Sockets to all peers, data files and logs."""
_PROBE_BYTES = 64 << 20
_PROBE_S = 3.0
"""No new piece of the probe is written afterwards."""
_SLOW_CHECKPOINT_S = 300.0
_CHECKPOINT = re.compile(r"step_\d{8,}")
"""Committed: as :mod:`dist_mtp.checkpoint.folder`, which imports torch, says."""


def check_threads(cores: int, ranks: int, threads_per_rank: int, *, on_cpu: bool) -> Finding:
    """Threads of all ranks against the cores that this process may use."""
    what = f"{_count(cores, 'core')} for {_count(ranks, 'rank')} of {_count(threads_per_rank, 'thread')}"
    if on_cpu and ranks * threads_per_rank > cores:
        fix = "lower launcher.threads_per_rank (or OMP_NUM_THREADS), or the number of ranks"
        return Finding("CPU", "warning", f"{what}: they take turns, which is slower than fewer threads", fix)
    return Finding("CPU", "ok", what)


def check_shared_memory(size_bytes: int | None, *, ranks: int, on_cpu: bool) -> Finding:
    """Args: ``size_bytes`` of ``/dev/shm``, None if it is missing."""
    if on_cpu or ranks == 1:
        return Finding("/dev/shm", "ok", "missing, and not needed" if size_bytes is None else f"{compact(size_bytes)}B")
    if size_bytes is None or size_bytes < _LEAST_SHARED_BYTES:
        what = "missing" if size_bytes is None else f"{compact(size_bytes)}B is little for NCCL"
        fix = "docker run --ipc=host (or --shm-size=8g); in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return Finding("/dev/shm", "warning", what, fix)
    return Finding("/dev/shm", "ok", f"{compact(size_bytes)}B")


def check_open_files(soft: int, hard: int) -> Finding:
    """``ulimit -n``."""
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        return Finding("open files", "ok", _limit(soft))
    can_raise = hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES
    fix = f"ulimit -n {_limit(hard)}" if can_raise else "raise nofile in /etc/security/limits.conf and log in again"
    return Finding("open files", "warning", f"at most {soft}: large runs open more", fix)


def check_locked_memory(soft: int, *, has_infiniband: bool) -> Finding:
    """``ulimit -l``: adapters lock the memory that they read and write."""
    if has_infiniband and soft != resource.RLIM_INFINITY:
        fix = "set memlock unlimited in /etc/security/limits.conf (docker run --ulimit memlock=-1)"
        return Finding("locked memory", "warning", f"at most {compact(soft)}B, InfiniBand needs more", fix)
    shown = _limit(soft) if soft == resource.RLIM_INFINITY else f"{compact(soft)}B"
    return Finding("locked memory", "ok", shown)


def check_disk_space(free_bytes: int, checkpoint_bytes: int, keep: int, folder: Path, *, existing: int = 0) -> Finding:
    """One checkpoint more than are kept exists while it is written.

    Args:
        existing: checkpoints of this run that take their space already.
    """
    to_come = keep + 1 - min(existing, keep)
    what = f"{compact(free_bytes)}B free in {folder}, a checkpoint takes about {compact(checkpoint_bytes)}B"
    fix = "free space, set run.dir to another file system, or lower checkpoint.keep"
    if free_bytes < checkpoint_bytes:
        return Finding("disk space", "error", what, fix)
    if free_bytes < to_come * checkpoint_bytes:
        return Finding("disk space", "warning", f"{what}, and {to_come} more must fit", fix)
    return Finding("disk space", "ok", what)


def check_disk_speed(measured: float | str, checkpoint_bytes: int, folder: Path) -> Finding:
    """Args: ``measured`` bytes per second of one process that writes and syncs, or why it cannot write there."""
    if isinstance(measured, str):
        what = f"{folder} cannot be written: {measured}"
        return Finding(
            "disk speed", "error", what, "set run.dir to a folder of yours, on a file system with free space"
        )
    seconds = checkpoint_bytes / measured
    what = f"{compact(measured)}B/s written and synced by one process: {duration(seconds)} for a checkpoint"
    if seconds > _SLOW_CHECKPOINT_S:
        return Finding("disk speed", "warning", what, "set run.dir to a faster file system, or raise checkpoint.every")
    return Finding("disk speed", "ok", what)


def check_clock(synchronised: str | None, *, several_nodes: bool) -> Finding:
    """Args: ``synchronised`` as ``timedatectl show -p NTPSynchronized --value`` says: yes, no, or None if nobody says."""
    answer = None if synchronised is None else synchronised.strip()
    if answer == "yes":
        return Finding("clock", "ok", "synchronised")
    what = "not synchronised" if answer == "no" else "timedatectl, which knows whether it is synchronised, does not say"
    if not several_nodes:
        return Finding("clock", "note", f"{what}; one node does not need it")
    if answer != "no":  # as in most containers, whose host takes care of it
        return Finding("clock", "note", f"{what}; where launcher.hosts names several, their clocks are compared")
    what = f"{what}: times in logs of different nodes may disagree"
    return Finding("clock", "warning", what, "start chrony or systemd-timesyncd")


def node_findings(config: Config, ranks: int, *, on_cpu: bool) -> list[Finding]:
    """What a machine has that trains ``ranks``."""
    exported = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is one number per nested level
    threads = int(exported) if exported.isdecimal() else config.launcher.threads_per_rank
    return [
        check_threads(len(os.sched_getaffinity(0)), ranks, threads, on_cpu=on_cpu),
        check_shared_memory(_size(_SHARED_MEMORY), ranks=ranks, on_cpu=on_cpu),
    ]


def system_findings(
    config: Config, checkpoint_bytes: int, *, several_nodes: bool, has_infiniband: bool
) -> list[Finding]:
    """What any machine has.

    Args:
        checkpoint_bytes: about.
    """
    folder = existing_folder(Path(config.run_dir))
    free, existing = shutil.disk_usage(folder).free, existing_checkpoints(config)
    return [
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband=has_infiniband),
        check_disk_space(free, checkpoint_bytes, config.checkpoint.keep, folder, existing=existing),
        check_disk_speed(write_speed(folder), checkpoint_bytes, folder),
        check_clock(output_of("timedatectl", "show", "-p", "NTPSynchronized", "--value"), several_nodes=several_nodes),
    ]


def existing_checkpoints(config: Config) -> int:
    """Whose space the run will use again; with ``resume=never`` they are set aside instead."""
    if config.resume == "never":
        return 0
    found = Path(config.run_dir).glob("checkpoints/step_*")
    return sum(_CHECKPOINT.fullmatch(path.name) is not None for path in found)


def existing_folder(path: Path) -> Path:
    """The nearest folder above, or ``path`` itself, that exists; absolute."""
    folder = path.absolute()
    while not os.path.isdir(folder):  # unlike Path.is_dir, False where a folder above may not be entered
        folder = folder.parent
    return folder


def write_speed(folder: Path) -> float | str:
    """Bytes per second of a file that is written, synced and removed again, or why it cannot be written."""
    block = os.urandom(_PROBE_BYTES // 8)  # random, as some file systems compress
    wanted = min(_PROBE_BYTES, shutil.disk_usage(folder).free // 2)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begin, written = time.perf_counter(), 0
            while not written or (written < wanted and time.perf_counter() - begin < _PROBE_S):
                written += file.write(block[: max(wanted - written, 1)])
                file.flush()
                os.fsync(file.fileno())
            return written / (time.perf_counter() - begin)
    except OSError as error:
        return error.strerror or str(error)


def _size(folder: Path) -> int | None:
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
