"""Killed at any instant, a run finds the previous or the new checkpoint; failing ranks strand nobody."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoint.rank_threads import WEIGHT, cut, filled, save_outcomes, save_ranks

from dist_mtp.checkpoint.folder import committed, newest_first
from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.load import CheckpointReader, find_latest
from dist_mtp.errors import CheckpointError

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
"""System calls between which a kill leaves different states on disk; ``shutil.rmtree`` uses the last two."""


class Killed(BaseException):
    """Stands for SIGKILL: no ``except Exception`` sees it."""


class Fuse:
    """Lets ``calls`` system calls pass, then fails every further one on every rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
        self.left = calls
        lock = threading.Lock()

        def wrap(function):
            def call(*args, **kwargs):
                with lock:
                    self.left -= 1
                    if self.left < 0:
                        raise error
                return function(*args, **kwargs)

            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def value_of(path: Path) -> float:
    """The number that fills the checkpoint's weight; fails if it is a mix."""
    values = set(CheckpointReader(path).read_full("param", WEIGHT).reshape(-1).tolist())
    assert len(values) == 1, f"{path} mixes {values}"
    return values.pop()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scenario", ["next step", "same step"])
def test_kill_at_every_system_call(scenario, world_size, tmp_path):
    """After a kill before system call n, for all n, an intact checkpoint is found: the old one or the new one.

    ``keep=1`` is the hardest case, since the old one is deleted. The following save succeeds and clears all litter.
    """
    step = 2 if scenario == "next step" else 1
    found = []
    for calls in range(1000):
        folder = tmp_path / str(calls)
        save_ranks(folder, 1, filled(1.0, world_size), keep=1)
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, calls, Killed())
            outcomes = save_outcomes(folder, step, filled(2.0, world_size), keep=1)
        latest = find_latest(newest_first(folder), report=pytest.fail)
        assert latest is not None, f"killed before call {calls}: nothing loadable in {names(folder)}"
        found.append(value_of(latest))
        for _, path in committed(folder):
            CheckpointReader(path)  # a half-deleted checkpoint under a committed name would be refused here
        assert found[-1] in (1.0, 2.0), f"killed before call {calls}: {latest} holds {found[-1]}"
        save_ranks(folder, 3, filled(3.0, world_size), keep=1)
        assert names(folder) == ["step_00000003"], f"killed before call {calls}: litter in {names(folder)}"
        if fuse.left >= 0:
            assert all(outcome.error is None for outcome in outcomes), f"{outcomes} failed without a kill"
            break
    # Two mkdirs, fsyncs of parent, shard, sidecar, manifest, its hash, folder and parent, unlink and rename; deletions.
    assert calls >= 11, f"only {calls} system calls were intercepted"
    assert found == sorted(found), f"an earlier kill found the new checkpoint, a later one the old: {found}"
    assert set(found) == {1.0, 2.0}


@pytest.mark.parametrize("world_size", [1, 3])
def test_full_disk_at_every_system_call(world_size, tmp_path):
    """With ENOSPC from system call n on, no rank hangs, errors are CheckpointErrors, and a checkpoint is loadable.

    Unless the new checkpoint is committed, rank 0 raises: training must not go on as if it were.
    """
    for calls in range(1000):
        folder = tmp_path / str(calls)
        save_ranks(folder, 1, filled(1.0, world_size), keep=1)
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, calls, OSError(errno.ENOSPC, "No space left on device"))
            outcomes = save_outcomes(folder, 2, filled(2.0, world_size), keep=1)
        latest = find_latest(newest_first(folder), report=pytest.fail)
        assert latest is not None, f"call {calls}: nothing loadable in {names(folder)}"
        assert value_of(latest) in (1.0, 2.0)
        for rank, outcome in enumerate(outcomes):
            assert outcome.error is None or isinstance(outcome.error, CheckpointError), (
                f"rank {rank}: {outcome.error!r}"
            )
        if fuse.left >= 0:
            break
        if outcomes[0].error is None:
            assert latest == outcomes[0].path, f"call {calls}: rank 0 returned {outcomes[0].path}, found {latest}"
        save_ranks(folder, 3, filled(3.0, world_size), keep=1)
        assert names(folder) == ["step_00000003"], f"call {calls}: litter in {names(folder)}"
    assert calls >= 11, f"only {calls} system calls were intercepted"


def test_what_the_rename_publishes_is_durable(tmp_path, monkeypatch):
    """Every file and the folder are fsynced before the rename, the parent after it: a power cut loses nothing.

    A breach is a committed name over empty files, which only shows after a real power cut.
    """
    events: list[object] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(source, target) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    path = save_ranks(tmp_path, 1, filled(1.0))
    commit = events.index("rename")
    for published in (*path.iterdir(), path):
        assert published.stat().st_ino in events[:commit], f"{published} was not fsynced before the rename"
    assert events[commit - 1] == path.stat().st_ino, "the folder must be fsynced after its last change"
    assert events[commit + 1] == tmp_path.stat().st_ino, "the parent must be fsynced right after the rename"


def test_failing_rank_fails_all_and_hangs_none(tmp_path):
    """One rank's error reaches every rank: the failing one raises its own, the others say that another failed."""

    def broken():
        raise OSError(errno.EIO, "Input/output error")
        yield

    save_ranks(tmp_path, 1, filled(1.0, 3))
    ranks = filled(2.0, 3)
    ranks[2] = broken()
    errors = [str(outcome.error) for outcome in save_outcomes(tmp_path, 2, ranks)]
    assert "rank 2 of 3 left no rank_00002.json" in errors[0], errors[0]
    assert "another rank failed" in errors[1], errors[1]
    assert "Input/output error" in errors[2], errors[2]
    assert names(tmp_path) == ["step_00000001"], f"litter in {names(tmp_path)}"


class TestSaveRefuses:
    """Slices that do not tile the tensors are a layout bug: they are named, and nothing is committed."""

    def refused(self, folder, ranks, reason, **options) -> None:
        outcomes = save_outcomes(folder, 1, ranks, **options)
        errors = [str(outcome.error) for outcome in outcomes]
        assert all(isinstance(outcome.error, CheckpointError) for outcome in outcomes), (
            f"not all ranks refused: {errors}"
        )
        assert any(reason in error for error in errors), f"expected {reason!r} in {errors}"
        assert names(folder) == [], f"left {names(folder)}"

    def test_replica_saved_twice(self, tmp_path):
        [[piece]] = filled(1.0, 1)
        reason = "elements [0, 12) are in both rank_00000.safetensors and rank_00001.safetensors"
        self.refused(tmp_path, [[piece], [piece]], reason)

    def test_overlap_within_a_rank(self, tmp_path):
        [[piece]] = filled(1.0, 1)
        self.refused(tmp_path, [[piece, piece]], "was passed twice")

    def test_partial_overlap(self, tmp_path):
        weight = torch.ones(12)
        ranks = [cut("param", WEIGHT, weight, [0, 7]), cut("param", WEIGHT, weight, [6, 12])]
        self.refused(tmp_path, ranks, "elements [6, 7) are in both")

    @pytest.mark.parametrize(("bounds", "missing"), [([1, 12], 0), ([0, 11], 11)])
    def test_gap(self, tmp_path, bounds, missing):
        ranks = [cut("param", WEIGHT, torch.ones(12), bounds)]
        self.refused(tmp_path, ranks, f"element {missing} of 12 is in no file")

    def test_gap_inside(self, tmp_path):
        weight = torch.ones(12)
        ranks = [cut("param", WEIGHT, weight, [0, 5]), cut("param", WEIGHT, weight, [7, 12])]
        self.refused(tmp_path, ranks, "element 5 of 12 is in no file")

    def test_ranks_disagree_on_shape(self, tmp_path):
        ranks = [
            [TensorSlice("param", WEIGHT, (3, 4), 0, torch.ones(6))],
            [TensorSlice("param", WEIGHT, (4, 3), 6, torch.ones(6))],
        ]
        self.refused(tmp_path, ranks, "[4, 3] float32 in rank_00001.safetensors, [3, 4] float32")

    def test_ranks_disagree_on_dtype(self, tmp_path):
        ranks = [
            [TensorSlice("param", WEIGHT, (12,), 0, torch.ones(6))],
            [TensorSlice("param", WEIGHT, (12,), 6, torch.ones(6, dtype=torch.bfloat16))],
        ]
        self.refused(tmp_path, ranks, "bfloat16")

    def test_slices_of_one_rank_disagree(self, tmp_path):
        pieces = [
            TensorSlice("param", WEIGHT, (12,), 0, torch.ones(6)),
            TensorSlice("param", WEIGHT, (12,), 6, torch.ones(6, dtype=torch.bfloat16)),
        ]
        self.refused(tmp_path, [pieces], "disagree: [12] float32 and [12] bfloat16")

    def test_ranks_disagree_on_run(self, tmp_path):
        self.refused(tmp_path, filled(1.0), "belongs to run 'b' step 1", run_ids=["a", "b"])

    @pytest.mark.parametrize(
        ("piece", "reason"),
        [
            (TensorSlice("param", "a", (4,), 1, torch.ones(4)), "elements [1, 5) are outside its shape [4]"),
            (TensorSlice("param", "a", (4,), -1, torch.ones(4)), "elements [-1, 3) are outside"),
            (TensorSlice("param", "a", (2, 2), 0, torch.ones(2, 2)), "expected 1-D"),
            (TensorSlice("a/b", "a", (4,), 0, torch.ones(4)), "without '/'"),
            (TensorSlice("param", "a", (4,), 0, torch.ones(4, dtype=torch.complex64)), "complex64 cannot be stored"),
        ],
    )
    def test_bad_slice(self, tmp_path, piece, reason):
        self.refused(tmp_path, [[piece]], reason)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1, 2}])
    def test_state_that_is_not_json(self, tmp_path, value):
        self.refused(tmp_path, filled(1.0, 1), "cannot be written as JSON", state={"x": value})


class TestRetention:
    """``keep`` newest checkpoints stay; what is deleted is always older than what was just committed."""

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_keeps_the_newest(self, tmp_path, keep):
        for step in (5, 10, 100, 1000):
            save_ranks(tmp_path, step, filled(float(step)), keep=keep)
        expected = [f"step_{step:08d}" for step in (5, 10, 100, 1000)][-keep:]
        assert names(tmp_path) == expected, f"keep={keep} left {names(tmp_path)}"

    def test_later_steps_survive_a_run_that_went_back(self, tmp_path):
        for step in (10, 20, 30):
            save_ranks(tmp_path, step, filled(float(step)), keep=3)
        save_ranks(tmp_path, 15, filled(15.0), keep=1)
        assert names(tmp_path) == ["step_00000015", "step_00000020", "step_00000030"], f"left {names(tmp_path)}"

    def test_same_step_is_replaced(self, tmp_path):
        save_ranks(tmp_path, 10, filled(1.0))
        path = save_ranks(tmp_path, 10, filled(2.0))
        assert value_of(path) == 2.0, f"{path} holds {value_of(path)}, saved 2.0"
        assert names(tmp_path) == ["step_00000010"], f"left {names(tmp_path)}"

    def test_same_step_again_after_a_kill_before_the_deletion(self, tmp_path):
        """Both the replaced and the replacing folder are there, and the step is saved a third time."""
        save_ranks(tmp_path, 10, filled(1.0)).rename(tmp_path / "step_00000010.old")
        save_ranks(tmp_path / "other", 10, filled(2.0)).rename(tmp_path / "step_00000010")
        (tmp_path / "other").rmdir()
        path = save_ranks(tmp_path, 10, filled(3.0))
        assert value_of(path) == 3.0, f"{path} holds {value_of(path)}, saved 3.0"
        assert names(tmp_path) == ["step_00000010"], f"left {names(tmp_path)}"

    def test_replaced_folder_counts_while_it_is_the_only_one_of_its_step(self, tmp_path):
        """After a kill between the two renames, the set-aside folder is the checkpoint of its step."""
        save_ranks(tmp_path, 10, filled(1.0)).rename(tmp_path / "step_00000010.old")
        save_ranks(tmp_path, 20, filled(2.0), keep=2)
        assert names(tmp_path) == ["step_00000010.old", "step_00000020"], f"left {names(tmp_path)}"
        save_ranks(tmp_path, 30, filled(3.0), keep=2)
        assert names(tmp_path) == ["step_00000020", "step_00000030"], f"left {names(tmp_path)}"

    def test_steps_sort_as_numbers(self, tmp_path):
        for step in (99_999_999, 100_000_000):
            save_ranks(tmp_path, step, filled(float(step)))
        latest = find_latest(newest_first(tmp_path), report=pytest.fail)
        assert latest == tmp_path / "step_100000000", f"found {latest}"

    def test_foreign_files_are_left_alone(self, tmp_path):
        for name in ("notes", "step_1", "step_00000001.bak", "best_step_00000001.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / "step_00000009.tmp").write_text("a file, not a folder")
        before = names(tmp_path)
        save_ranks(tmp_path, 10, filled(1.0), keep=1)
        assert names(tmp_path) == sorted([*before, "step_00000010"]), f"left {names(tmp_path)}"
