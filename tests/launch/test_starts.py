"""Four ranks on this machine, started in every way, and as two nodes whose launchers meet over loopback.

Invariant: how ranks are started changes no bit of what they compute; and when one node loses a rank, its launcher or is
told to stop, the other node ends with it, with one cause and one exit code. A breach would show as metrics that differ, or
as a node that trains, or waits, alone.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil
import pytest
from support import launches
from support.launches import BIN, Ended, Running, overrides, processes_of

from dist_mtp.errors import EXIT_DONE, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.monitor.metrics import comparable
from dist_mtp.monitor.result import read_result

STEPS = 4
ORPHAN_S = 20.0
"""Ranks whose launcher is gone end when they notice that their peers are."""
LAYOUT = ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", f"train.steps={STEPS}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """By which other machines would reach this one; that of the loopback interface if it has no other."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")


class Runs:
    """The same run under several launchers; each trains once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def overrides(self, run: str, *more: str) -> list[str]:
        return overrides(self.folder, run, *LAYOUT, *more)

    def train(self, run: str, *start: str, more: tuple[str, ...] = ()) -> Ended:
        ended = launches.train([*start, *self.overrides(run, *more)], self.folder / run)
        assert ended.code == EXIT_DONE, ended.output
        return ended

    @cached_property
    def local(self) -> list[dict[str, float]]:
        return [comparable(row) for row in self.train("local", *launches.dist_mtp()).rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("starts"))


@pytest.mark.parametrize("way", ["torchrun", "deepspeed", "dist-mtp with deepspeed"])
def test_every_way_gives_the_same_numbers(way: str, runs: Runs) -> None:
    start = {
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "4", "-m", "dist_mtp.train"],
        "deepspeed": [
            *(str(BIN / "deepspeed"), "--num_accelerators", "4", "--master_port", str(free_port())),
            *("--module", "dist_mtp.train"),
        ],
    }.get(way, launches.dist_mtp())
    more = ("launcher=deepspeed",) if way.startswith("dist-mtp") else ()
    ended = runs.train(way.replace(" ", "-"), *start, more=more)
    got = [comparable(row) for row in ended.rows]
    assert got == runs.local, f"{way} ends with {got[-1]}, the local launcher with {runs.local[-1]}"


@contextmanager
def two_nodes(folder: Path, *more: str) -> Iterator[tuple[Running, Running]]:
    """The same command twice: two nodes of two ranks each, which know the first one by different names."""
    where = ["launcher=torchrun", "launcher.nodes=2", f"launcher.rendezvous=127.0.0.1:{free_port()}"]
    command = launches.dist_mtp(*overrides(folder, "run", *LAYOUT, *where, "launcher.ranks_per_node=2", *more))
    for name in ("run", "other"):
        (folder / name).mkdir(exist_ok=True)
    nodes: list[Running] = []
    try:
        nodes.append(Running([*command, "launcher.node_rank=0"], folder / "run"))
        other = [word.replace("rendezvous=127.0.0.1", "rendezvous=localhost") for word in command]
        nodes.append(Running([*other, "launcher.node_rank=1"], folder / "other"))
        yield nodes[0], nodes[1]
    finally:
        for pid in processes_of(folder / "run"):
            os.kill(pid, signal.SIGKILL)
        for node in nodes:
            node.clean_up()


def end_both(first: Running, second: Running) -> list[int]:
    codes = [node.process.wait(60) for node in (first, second)]
    deadline = time.monotonic() + ORPHAN_S
    while left := processes_of(first.folder):
        assert time.monotonic() < deadline, f"{left} of the run are still alive"
        time.sleep(0.1)
    return codes


class TestTwoNodes:
    """Both nodes end for the same reason."""

    def test_a_rank_dies(self, tmp_path: Path) -> None:
        with two_nodes(tmp_path, "train.steps=5000") as (first, second):
            first.wait_for_step(2)
            os.kill(first.rank_pids()[3], signal.SIGKILL)
            codes = end_both(first, second)
            assert codes == [EXIT_RANK_FAILURE] * 2, f"{first.output}\n{second.output}"
            for node in (first, second):
                assert "error: rank 3 was killed by SIGKILL" in node.output
            log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
            assert "Thread" in log or "broken" in log or "Connection" in log, "rank 0 left no trace of where it stood"

    def test_a_launcher_dies(self, tmp_path: Path) -> None:
        with two_nodes(tmp_path, "train.steps=5000") as (first, second):
            first.wait_for_step(2)
            second.process.kill()
            codes = end_both(first, second)
            assert codes == [EXIT_RANK_FAILURE, -signal.SIGKILL], first.output
            assert "error: the launcher on node 1" in first.output
            assert "ended without a word" in first.output

    def test_one_is_told_to_stop(self, tmp_path: Path) -> None:
        with two_nodes(tmp_path, "train.steps=5000") as (first, second):
            first.wait_for_step(2)
            second.process.send_signal(signal.SIGTERM)
            codes = end_both(first, second)
            assert codes == [EXIT_TERMINATED] * 2, f"{first.output}\n{second.output}"
        result = read_result(tmp_path / "run")
        assert result is not None
        assert result["status"] == "interrupted"
        assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1

    @pytest.mark.parametrize(
        ("moment", "number"),
        [("met", signal.SIGTERM), ("rank", signal.SIGTERM), ("met", signal.SIGKILL)],
        ids=["stopped before ranks start", "stopped while they start", "killed before they start"],
    )
    def test_the_end_before_training(self, moment: str, number: int, tmp_path: Path) -> None:
        """Nobody is left waiting for ranks that will not come, and both say why."""
        with two_nodes(tmp_path, "train.steps=5000") as (first, second):
            if moment == "met":
                first.wait_until(lambda: "run folder" in first.output, "the meeting")
            else:
                first.wait_until(lambda: len(processes_of(first.folder)) >= 4, "the first ranks")
            second.process.send_signal(number)
            codes = end_both(first, second)
            stopped = number == signal.SIGTERM
            expected = [EXIT_TERMINATED] * 2 if stopped else [EXIT_RANK_FAILURE, -signal.SIGKILL]
            assert codes == expected, f"{first.output}\n{second.output}"
            words = "stopped by a signal before training began" if stopped else "ended without a word"
            assert words in first.output, first.output
        result = read_result(tmp_path / "run")
        assert result is not None, first.output
        assert (result["status"], result["exit_code"]) == ("interrupted" if stopped else "failed", codes[0]), result


def test_fewer_nodes_continue_the_run(tmp_path: Path) -> None:
    """Two nodes train a few steps and stop; the next start finds one node only and trains the same rows per step."""
    rows = ("train.rows_per_step=16", "launcher.min_nodes=1", "launcher.join_timeout_s=4")
    layout = [o for o in overrides(tmp_path, "run", *rows) if not o.startswith("train.micro_batches=8")]
    where = [
        "launcher=torchrun",
        "launcher.nodes=2",
        "launcher.ranks_per_node=2",
        "parallel.pp=2",
        "checkpoint.every=2",
    ]
    command = launches.dist_mtp(*layout, *where, f"launcher.rendezvous=127.0.0.1:{free_port()}", "train.steps=2")
    nodes = [
        Running([*command, f"launcher.node_rank={rank}"], tmp_path / name) for rank, name in enumerate(("run", "b"))
    ]
    codes = [node.process.wait(90) for node in nodes]
    assert codes == [EXIT_DONE, EXIT_DONE], nodes[0].output
    # A machine whose own name means 127.0.1.1 to it does not recognise itself by its address.
    command = [word.replace("127.0.0.1", own_address()) for word in command]
    command = [word.replace("train.steps=2", "train.steps=4") for word in command]
    alone = launches.train([*command, "launcher.node_rank=0"], tmp_path / "run")
    assert alone.code == EXIT_DONE, alone.output
    assert "resumed after step 2" in alone.output
    tokens = [row["tokens"] for row in alone.rows]
    assert tokens == [16 * 32 * step for step in (1, 2, 3, 4)], f"steps had {tokens} tokens"
