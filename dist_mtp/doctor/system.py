"""Processors, limits, shared memory, disk and clock."""

from __future__ import annotations

import contextlib
import os
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
_SLOW_CHECKPOINT_S = 300.0


def check_threads(cores: int, ranks: int, threads_per_rank: int, *, on_cpu: bool) -> Finding:
    """Threads of all ranks against the cores that this process may use."""
    what = f"{cores} cores for {ranks} ranks of {threads_per_rank} thread{'s' * (threads_per_rank > 1)}"
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


def check_disk_space(free_bytes: int, checkpoint_bytes: int, keep: int, folder: Path) -> Finding:
    """One checkpoint more than are kept exists while it is written."""
    what = f"{compact(free_bytes)}B free in {folder}, a checkpoint takes about {compact(checkpoint_bytes)}B"
    fix = "free space, set run.dir to another file system, or lower checkpoint.keep"
    if free_bytes < checkpoint_bytes:
        return Finding("disk space", "error", what, fix)
    if free_bytes < (keep + 1) * checkpoint_bytes:
        return Finding("disk space", "warning", f"{what}, and {keep + 1} must fit", fix)
    return Finding("disk space", "ok", what)


def check_disk_speed(bytes_per_s: float | None, checkpoint_bytes: int, folder: Path) -> Finding:
    """Args: ``bytes_per_s`` of one process that writes and syncs; None if it cannot write there."""
    if bytes_per_s is None:
        return Finding("disk speed", "error", f"{folder} cannot be written", "set run.dir to a folder of yours")
    seconds = checkpoint_bytes / bytes_per_s
    what = f"{compact(bytes_per_s)}B/s written and synced by one process: {duration(seconds)} for a checkpoint"
    if seconds > _SLOW_CHECKPOINT_S:
        return Finding("disk speed", "warning", what, "set run.dir to a faster file system, or raise checkpoint.every")
    return Finding("disk speed", "ok", what)


def check_clock(synchronised: str | None, *, several_nodes: bool) -> Finding:
    """Args: ``synchronised`` as ``timedatectl show -p NTPSynchronized --value`` says: yes, no, or None if nobody says."""
    answer = None if synchronised is None else synchronised.strip()
    if answer == "yes":
        return Finding("clock", "ok", "synchronised")
    what = "not synchronised" if answer == "no" else "unknown whether it is synchronised"
    if not several_nodes:
        return Finding("clock", "note", f"{what}; one node does not need it")
    return Finding(
        "clock",
        "warning",
        f"{what}: times in logs of different nodes may disagree",
        "start chrony or systemd-timesyncd",
    )


def system_findings(
    config: Config, ranks: int, checkpoint_bytes: int, *, on_cpu: bool, several_nodes: bool, has_infiniband: bool
) -> list[Finding]:
    """What this machine has.

    Args:
        ranks: that it would start.
        checkpoint_bytes: about.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or config.launcher.threads_per_rank)
    folder = existing_folder(Path(config.run_dir))
    return [
        check_threads(len(os.sched_getaffinity(0)), ranks, threads, on_cpu=on_cpu),
        check_shared_memory(_size(_SHARED_MEMORY), ranks=ranks, on_cpu=on_cpu),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband=has_infiniband),
        check_disk_space(shutil.disk_usage(folder).free, checkpoint_bytes, config.checkpoint.keep, folder),
        check_disk_speed(write_speed(folder), checkpoint_bytes, folder),
        check_clock(output_of("timedatectl", "show", "-p", "NTPSynchronized", "--value"), several_nodes=several_nodes),
    ]


def existing_folder(path: Path) -> Path:
    """The nearest folder above, or ``path`` itself, that exists; absolute."""
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def write_speed(folder: Path, num_bytes: int = _PROBE_BYTES) -> float | None:
    """Bytes per second of a file that is written, synced and removed again; None if that fails."""
    block = os.urandom(1 << 20)  # random, as some file systems compress
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(num_bytes >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - begin)
    return None


def _size(folder: Path) -> int | None:
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
