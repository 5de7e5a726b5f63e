"""Batch jobs on a real Slurm cluster of two nodes, both on this machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import launches
from support.launches import overrides
from support.slurm_cluster import SlurmCluster, unavailable

from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_TERMINATED
from dist_mtp.monitor.metrics import comparable, read_metrics
from dist_mtp.monitor.result import read_result

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TEMPLATE = Path(__file__).resolve().parents[2] / "launchers" / "slurm.sbatch"
JOB = (
    *("launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=1", "device=cpu"),
    *("launcher.slurm.time_limit=10", "launcher.slurm.exclusive=false"),
)
JOB_S = 120.0
"""Of one job, its wait in the queue included; 15 s on an idle machine."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=2) as running:
        yield running


def submit(cluster: SlurmCluster, folder: Path, run: str, *more: str) -> subprocess.CompletedProcess[str]:
    """``dist-mtp train launcher=slurm`` for a job of two nodes with one CPU rank each."""
    arguments = overrides(folder, run, *JOB, "parallel.pp=2", *more)
    if "-m" in more:
        arguments = [argument for argument in arguments if not argument.startswith("run.dir=")]
    return subprocess.run(
        launches.dist_mtp(*arguments),
        env=cluster.environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def wait_until(reached: Callable[[], object], what: str, cluster: SlurmCluster, folder: Path) -> None:
    deadline = time.monotonic() + JOB_S
    while not reached():
        if time.monotonic() > deadline:
            outputs = "\n".join(path.read_text(errors="replace")[-3000:] for path in folder.rglob("slurm-*.out"))
            queue = cluster.run("squeue").stdout
            raise AssertionError(f"no {what} within {JOB_S:.0f} s\n{queue}\n{outputs}")
        time.sleep(0.2)


class TestJob:
    """A job on two nodes trains what the local launcher trains, and a signal from Slurm ends it with a checkpoint."""

    def test_two_nodes_train_as_one_machine(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        done = submit(cluster, tmp_path, "job", "train.steps=3")
        assert done.returncode == EXIT_DONE, f"exited {done.returncode}:\n{done.stderr}"
        assert "queued as job" in done.stdout, done.stdout
        local = launches.train(launches.dist_mtp(*overrides(tmp_path, "local", "train.steps=3")), tmp_path / "local")
        assert local.code == EXIT_DONE, local.output
        wait_until(lambda: read_result(tmp_path / "job"), "result.json", cluster, tmp_path)
        result = read_result(tmp_path / "job")
        assert result is not None
        assert result["status"] == "done", f"result.json says {result}"
        got, expected = (
            [comparable(row) for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("job", "local")
        )
        assert got == expected, f"the job measured {got[-1]}, the local run {expected[-1]}"
        output = next((tmp_path / "job" / "logs").glob("slurm-*.out")).read_text()
        assert "2 ranks on 2 nodes" in output, output

    def test_the_template_trains(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        options = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10", f"--output={tmp_path}/slurm-template.out"]
        arguments = overrides(tmp_path, "template", "parallel.pp=2", "device=cpu", "train.steps=2")
        environment = {"NPROC": "1", "PATH": f"{launches.BIN}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["sbatch", "--wait", *options, str(TEMPLATE), *arguments],
            env=cluster.environment | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=JOB_S,
        )
        output = (tmp_path / "slurm-template.out").read_text() if done.returncode else ""
        assert done.returncode == EXIT_DONE, f"exited {done.returncode}: {done.stderr}\n{output}"
        result = read_result(tmp_path / "template")
        assert result is not None
        assert result["status"] == "done", f"result.json says {result}"

    def test_slurms_signal_saves(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        """As before the time limit: SIGTERM to the tasks and to what they started, the launchers and the ranks."""
        done = submit(cluster, tmp_path, "stopped", "train.steps=5000")
        assert done.returncode == EXIT_DONE, done.stderr
        job = done.stdout.split("queued as job ")[1].split(";")[0]
        metrics = tmp_path / "stopped" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, "third step", cluster, tmp_path)
        cluster.run("scancel", "--signal=TERM", job)
        wait_until(lambda: read_result(tmp_path / "stopped"), "result.json", cluster, tmp_path)
        result = read_result(tmp_path / "stopped")
        assert result is not None
        got = (result["status"], result["exit_code"])
        assert got == ("interrupted", EXIT_TERMINATED), f"result.json says {result}"
        saved = [path.name for path in (tmp_path / "stopped" / "checkpoints").glob("step_*")]
        assert len(saved) == 1, f"checkpoints {saved}, expected the one of the stop"
        wait_until(lambda: job not in cluster.run("squeue", "-h").stdout, "end of the job", cluster, tmp_path)
        code = cluster.run("scontrol", "show", "job", job).stdout.split("ExitCode=")[1].split()[0]
        assert code == f"{EXIT_TERMINATED}:0", f"Slurm saw {code}, expected {EXIT_TERMINATED}:0"

    def test_waiting_for_a_job(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        """Who waits for a job and is told to stop lets it save, and ends as it does."""
        run = tmp_path / "waited"
        arguments = overrides(tmp_path, "waited", *JOB, "parallel.pp=2", "train.steps=5000", "launcher.slurm.wait=true")
        waiting = subprocess.Popen(
            launches.dist_mtp(*arguments),
            env=cluster.environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            metrics = run / "metrics.jsonl"
            wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, "steps", cluster, tmp_path)
            waiting.terminate()
            output, _ = waiting.communicate(timeout=JOB_S)
        finally:
            waiting.kill()
        assert waiting.returncode == EXIT_TERMINATED, output
        result = read_result(run)
        assert result is not None
        assert result["status"] == "interrupted", f"result.json says {result}"
        assert cluster.run("squeue", "-h").stdout.strip() == "", "the job goes on"

    def test_refused_job(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        done = submit(cluster, tmp_path, "refused", "launcher.slurm.partition=nowhere")
        assert done.returncode == EXIT_CONFIG, f"exited {done.returncode}, expected {EXIT_CONFIG}:\n{done.stderr}"
        assert "invalid partition specified: nowhere" in done.stderr, done.stderr


class TestArray:
    """A sweep is one array of jobs, in which every task trains its own point."""

    def test_two_points(self, cluster: SlurmCluster, tmp_path: Path) -> None:
        swept = ["-m", "train.steps=2", "run.name=array", "mtp.depth=0,1", "launcher.slurm.array_limit=1"]
        done = submit(cluster, tmp_path, "unused", *swept)
        assert done.returncode == EXIT_DONE, f"exited {done.returncode}:\n{done.stderr}"
        assert "queued 2 points as array" in done.stdout, done.stdout
        points = [tmp_path / "sweeps" / "array" / f"mtp.depth={depth}" for depth in (0, 1)]
        wait_until(lambda: all(read_result(point) for point in points), "two results", cluster, tmp_path)
        for depth, point in enumerate(points):
            result, last = read_result(point), read_metrics(point / "metrics.jsonl")[-1]
            assert result is not None
            assert result["status"] == "done", f"{point} says {result}"
            assert ("loss_mtp_1" in last) == (depth == 1), f"{point} measured {sorted(last)}"
