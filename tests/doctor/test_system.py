"""Numbers of a machine and what is said about them: each bound from both sides."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from dist_mtp.cli.compose import compose
from dist_mtp.doctor import system
from dist_mtp.doctor.finding import Finding

UNLIMITED = resource.RLIM_INFINITY
GB = 10**9


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (system.check_threads(4, 2, 2, on_cpu=True), "ok 4 cores for 2 ranks of 2 threads"),
        (system.check_threads(4, 2, 3, on_cpu=True), "warning 4 cores for 2 ranks of 3 threads: they take turns"),
        (system.check_threads(4, 8, 1, on_cpu=False), "ok"),
        (system.check_shared_memory(64 << 20, ranks=8, on_cpu=False), "warning 67.1MB is little"),
        (system.check_shared_memory(None, ranks=8, on_cpu=False), "warning missing"),
        (system.check_shared_memory(64 << 20, ranks=8, on_cpu=True), "ok"),
        (system.check_shared_memory(1 << 30, ranks=8, on_cpu=False), "ok"),
        (system.check_open_files(1024, 1 << 20), "warning at most 1024"),
        (system.check_open_files(4096, 4096), "ok"),
        (system.check_open_files(UNLIMITED, UNLIMITED), "ok unlimited"),
        (system.check_locked_memory(65536, has_infiniband=True), "warning at most 65.5kB"),
        (system.check_locked_memory(65536, has_infiniband=False), "ok"),
        (system.check_locked_memory(UNLIMITED, has_infiniband=True), "ok unlimited"),
        (system.check_disk_space(9 * GB, 10 * GB, 2, Path("/runs")), "error 9.0GB free in /runs"),
        (system.check_disk_space(29 * GB, 10 * GB, 2, Path("/runs")), "warning 29.0GB free in /runs"),
        (system.check_disk_space(30 * GB, 10 * GB, 2, Path("/runs")), "ok 30.0GB"),
        (system.check_disk_space(19 * GB, 10 * GB, 2, Path("/runs"), existing=1), "warning 19.0GB"),
        (system.check_disk_space(20 * GB, 10 * GB, 2, Path("/runs"), existing=1), "ok 20.0GB"),
        (system.check_disk_space(10 * GB, 10 * GB, 2, Path("/runs"), existing=5), "ok 10.0GB"),
        (system.check_disk_space(9 * GB, 10 * GB, 2, Path("/runs"), existing=5), "error 9.0GB"),
        (system.check_disk_speed(1e9, 10 * GB, Path("/runs")), "ok 1.0GB/s written and synced by one process: 10s"),
        (system.check_disk_speed(1e6, 10 * GB, Path("/runs")), "warning 1.0MB/s"),
        (system.check_disk_speed("Read-only file system", 1, Path("/runs")), "error /runs cannot be written: Read-only"),
        (system.check_clock("yes\n", several_nodes=True), "ok synchronised"),
        (system.check_clock("no\n", several_nodes=True), "warning not synchronised"),
        (system.check_clock("no\n", several_nodes=False), "note not synchronised"),
        (system.check_clock(None, several_nodes=True), "note timedatectl"),
    ],
)  # fmt: skip
def test_what_is_said(found: Finding, expected: str) -> None:
    assert f"{found.level} {found.what}".startswith(expected), found
    assert bool(found.fix) == (found.level in ("warning", "error")), f"a fix belongs to what is wrong: {found}"


def test_checkpoints_that_exist(tmp_path: Path) -> None:
    """Committed ones of this run, unless it will set them aside."""
    assert system.existing_checkpoints(compose([f"run.dir={tmp_path}"])) == 0
    for name in ("step_00000010", "step_00000020", "step_00000030.tmp", "step_00000005.trash", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = {
        resume: system.existing_checkpoints(compose([f"run.dir={tmp_path}", f"resume={resume}"]))
        for resume in ("auto", "never")
    }
    assert found == {"auto": 2, "never": 0}


def test_existing_checkpoints_are_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the two that are kept are there, so room for one more is enough."""
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(system.shutil, "disk_usage", lambda path: usage._replace(free=10 * GB))
    config = compose([f"run.dir={tmp_path}", "checkpoint.keep=2"])
    found = system.system_findings(config, 10 * GB, several_nodes=False, has_infiniband=False)
    assert [finding.level for finding in found if finding.name == "disk space"] == ["ok"], found


def test_nearest_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for below in ("", "runs/new", "file/run"):
        assert system.existing_folder(tmp_path / below) == tmp_path, below


def test_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is up after the first of eight pieces; nothing is left in the folder."""
    synced = []
    monkeypatch.setattr(system, "_PROBE_S", 0.0)
    monkeypatch.setattr(system.os, "fsync", lambda file: synced.append(system.os.fstat(file).st_size))
    speed = system.write_speed(tmp_path)
    assert synced == [8 << 20], "one piece is written in any case, or there would be no speed"
    assert isinstance(speed, float), speed
    assert speed > 0
    assert list(tmp_path.iterdir()) == []
