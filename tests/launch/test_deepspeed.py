"""Runs under DeepSpeed's launcher, which passes on no signal and tells little about how its ranks have ended.

Invariant: whatever ends such a run, no rank goes on without its launcher, what was trained is saved, and the exit code is the
documented one. A breach would show as processes that outlive ``dist-mtp``, or as an exit code that contradicts
``result.json``.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support import launches
from support.host_runs import Commands, by_deepspeed, by_mpirun
from support.hosts import Host, Hosts, needs_sshd, unavailable
from support.launches import Running, overrides, processes_of

from dist_mtp.cli.compose import compose
from dist_mtp.cli.train import train
from dist_mtp.config import Config, resolve
from dist_mtp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED, ConfigError
from dist_mtp.launch import deepspeed
from dist_mtp.launch.cluster import plan_cluster
from dist_mtp.launch.ranks import RANK_MODULE
from dist_mtp.launch.warden import NODE_LAUNCHER, OVER, processes, watch
from dist_mtp.monitor.result import read_result, write_result

GONE_S = 30.0
"""For ranks to save and end on a busy machine; a second on an idle one."""
HOSTS = ("launcher=deepspeed", "launcher.hosts=[node0,node1]", "launcher.ranks_per_node=1")
NO_HOSTS = needs_sshd() or unavailable("pdsh", "mpirun")


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + GONE_S
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"{left} of {folder} are alive after {GONE_S:g} s"
        time.sleep(0.1)


def ending(run: Path) -> tuple[str, int, int]:
    """Status, exit code and number of checkpoints that a run has left."""
    result = read_result(run)
    assert result is not None, "no result.json"
    return result["status"], result["exit_code"], len(list((run / "checkpoints").glob("step_*")))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with Hosts(2) as cluster:
        cluster.start_sshd()
        yield cluster


class TestOneMachine:
    """Two ranks here."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Iterator[Running]:
        arguments = overrides(tmp_path, "run", "launcher=deepspeed", "parallel.pp=2", "device=cpu", "train.steps=5000")
        running = Running(launches.dist_mtp(*arguments), tmp_path / "run")
        try:
            running.wait_for_step(2)
            yield running
        finally:
            running.clean_up()

    def test_told_to_stop(self, run: Running) -> None:
        run.process.send_signal(signal.SIGTERM)
        ended = run.end(GONE_S)
        assert ended.code == EXIT_TERMINATED, ended.output
        assert ending(run.folder) == ("interrupted", EXIT_TERMINATED, 1)

    def test_dist_mtp_is_killed(self, run: Running) -> None:
        run.process.kill()
        run.process.wait()
        wait_until_gone(run.folder)
        assert ending(run.folder) == ("interrupted", EXIT_TERMINATED, 1)

    def test_deepspeeds_own_process_is_killed(self, run: Running) -> None:
        """Its runner ends with 0 then; ranks end by themselves."""
        (launcher,) = processes(NODE_LAUNCHER, f"{run.folder}/config.yaml")
        launcher.kill()
        ended = run.end(GONE_S)
        assert ended.code == EXIT_RANK_FAILURE, ended.output
        assert "DeepSpeed's process that started it, died" in ended.output


@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
class TestSeveralHosts:
    """Two hosts with a rank each; neither pdsh nor mpirun passes signals on to ranks that would have time to save."""

    @pytest.mark.parametrize(
        ("start", "number", "code"),
        [(by_deepspeed, signal.SIGINT, EXIT_INTERRUPTED), (by_mpirun, signal.SIGTERM, EXIT_TERMINATED)],
        ids=["pdsh", "mpirun"],
    )
    def test_told_to_stop(
        self, start: Callable[..., dict[Host, list[str]]], number: int, code: int, cluster: Hosts, tmp_path: Path
    ) -> None:
        with Commands(cluster, self.two_ranks(start, cluster, tmp_path), tmp_path, "run") as commands:
            commands.wait_for_step(tmp_path / "run", 2)
            self.dist_mtp(cluster).send_signal(number)
            (ended,) = commands.end(GONE_S).values()
            assert commands.left_behind(1) == {}, ended.output
            assert ended.code == code, ended.output
        assert ending(tmp_path / "run") == ("interrupted", code, 1)

    def test_dist_mtp_is_killed(self, cluster: Hosts, tmp_path: Path) -> None:
        with Commands(cluster, self.two_ranks(by_deepspeed, cluster, tmp_path), tmp_path, "run") as commands:
            commands.wait_for_step(tmp_path / "run", 2)
            self.dist_mtp(cluster).kill()
            assert commands.left_behind(GONE_S) == {}, commands.output
        assert ending(tmp_path / "run") == ("interrupted", EXIT_TERMINATED, 1)

    def two_ranks(
        self, start: Callable[..., dict[Host, list[str]]], cluster: Hosts, folder: Path
    ) -> dict[Host, list[str]]:
        commands = start(cluster, overrides(folder, "run", "parallel.pp=2", "device=cpu", "train.steps=5000"))
        return {
            host: [word.replace("ranks_per_node=2", "ranks_per_node=1") for word in command]
            for host, command in commands.items()
        }

    def dist_mtp(self, cluster: Hosts) -> psutil.Process:
        found = [psutil.Process(pid) for pid in cluster.hosts[0].processes()]
        (process,) = [p for p in found if any(w.endswith("/dist-mtp") for w in p.cmdline()) and "-I" not in p.cmdline()]
        return process


class TestWarden:
    """It tells every rank of its run once, whenever that is started, and no other; who does not end is killed."""

    def test_watch(self, tmp_path: Path) -> None:
        (tmp_path / "dist_mtp").mkdir()
        (tmp_path / "dist_mtp" / "__init__.py").touch()
        wait = "import signal, sys, time\nif 'stubborn' in sys.argv: signal.signal(15, signal.SIG_IGN)\n"
        (tmp_path / "dist_mtp" / "train.py").write_text(wait + "print(flush=True)\ntime.sleep(60)\n")

        def rank(file: str, *more: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-u", "-m", RANK_MODULE, "--config", file, *more]
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        lines: queue.Queue[str | None] = queue.Queue()
        warden = threading.Thread(target=watch, args=("/run/config.yaml", 2.0, lines))
        warden.start()
        other, stubborn = rank("/other/config.yaml"), rank("/run/config.yaml", "stubborn")
        try:
            lines.put(str(int(signal.SIGTERM)))
            late = rank("/run/config.yaml")
            lines.put(OVER)
            warden.join(20)
            assert not warden.is_alive()
            assert (late.wait(5), stubborn.wait(5)) == (-signal.SIGTERM, -signal.SIGKILL)
            assert other.poll() is None
        finally:
            for process in (other, stubborn):
                process.kill()
                process.communicate()


class TestExitCode:
    """Ranks' own word counts more than what came through DeepSpeed's processes."""

    @pytest.mark.parametrize(
        ("code", "status", "said", "received", "expected"),
        [
            (0, "done", 0, [], EXIT_DONE),
            (0, None, None, [], EXIT_RANK_FAILURE),
            (0, "interrupted", 143, [], EXIT_RANK_FAILURE),
            (143, "interrupted", 143, [], EXIT_TERMINATED),
            (1, "interrupted", 130, [signal.SIGINT], EXIT_INTERRUPTED),
            (1, "done", 0, [signal.SIGTERM], EXIT_DONE),
            (1, "diverged", 4, [], 4),
            (3, None, None, [], 3),
            (247, None, None, [], EXIT_RANK_FAILURE),
            (-15, None, None, [signal.SIGTERM], EXIT_RANK_FAILURE),
        ],
    )
    def test_explain(
        self, code: int, status: str | None, said: int, received: list[int], expected: int, tmp_path: Path
    ) -> None:
        if status is not None:
            write_result(tmp_path, status, said, {}, None, None)
        outcome = deepspeed._explain(compose([f"run.dir={tmp_path}"]), code, received, trained=True)
        assert outcome.code == expected, outcome


class TestChecks:
    """A shell gets nothing that it could take for something else, and no host that is not there costs anything."""

    @pytest.mark.parametrize(
        ("setting", "environment", "words"),
        [
            ("x=1", {"PYTHON$(touch PWNED)": "1"}, "has a name that a shell on the nodes could run"),
            ("x=1", {"NCCL_DEBUG_FILE": "/tmp/%h"}, "NCCL_DEBUG_FILE='/tmp/%h' holds %"),
            ("launcher.ssh_config='x -oProxyCommand=touch_pwned'", {}, "'x -oProxyCommand=touch_pwned' has blanks"),
            ('launcher.ssh_config="a\'b"', {}, "has blanks or special characters"),
            ("run.dir=/runs/%h", {}, "'/runs/%h' has blanks or special characters"),
        ],
        ids=["name", "% in a value", "options of ssh", "quote", "% in a path"],
    )
    def test_refused(self, setting: str, environment: dict[str, str], words: str) -> None:
        config = compose([*HOSTS, *([] if setting == "x=1" else [setting])])
        with pytest.raises(ConfigError) as caught:
            deepspeed.check(config, plan_cluster(config, gpus=0), environment)
        assert words in str(caught.value)

    def test_no_hostfile_but_ours(self) -> None:
        """Without one, DeepSpeed takes the hosts of ``/job/hostfile``."""
        config: Config = resolve(compose(["launcher=deepspeed"]), vocab_size=259, world_size=2)
        command = deepspeed.command(config, plan_cluster(config, gpus=0), Path("corpus"))
        hostfile = command[command.index("--hostfile") + 1]
        assert not Path(hostfile).is_file(), f"it would read hosts from {hostfile}"

    def test_a_misspelt_host_sets_no_run_aside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bin").mkdir()
        for name in ("ssh", "pdsh"):
            (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 255\n")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("train: {steps: 1}\n")
        arguments = overrides(tmp_path, "run", *HOSTS, "parallel.pp=2", "device=cpu", "resume=never")
        with pytest.raises(ConfigError, match="node0 cannot be reached by ssh"):
            train(compose(arguments))
        assert not (tmp_path / "cache").exists(), "it has prepared the corpus"
        assert not list(tmp_path.glob("run.old-*")), "it has set the old run aside"
