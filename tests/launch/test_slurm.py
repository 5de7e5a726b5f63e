"""Batch jobs without a cluster: programs of Slurm's names stand in for it.

Invariant: a job that Slurm starts again, with whatever nodes, continues its run; whoever waits for a job ends as the run
does. A breach would show as a requeued job that is refused or begins anew, or as a wrong exit code.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from support import launches
from support.launches import Running, overrides

from dist_mtp.cli.compose import compose
from dist_mtp.cli.sweep import sweep
from dist_mtp.cli.train import train
from dist_mtp.config import Config, resolve
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.launch import slurm
from dist_mtp.run_folder import CONFIG_FILE, prepare_run_folder, read_config

TEMPLATE = Path(__file__).resolve().parents[2] / "launchers" / "slurm.sbatch"
NODES = ("launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=1", "device=cpu", "parallel.pp=1")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of programs that are found before all others; ``sbatch`` there queues every job as number 7."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    write_program(folder / "sbatch", "echo 7")
    return folder


def write_program(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def started_with(script: str) -> Config:
    """What a job reads, which checks that it is what was submitted."""
    words = shlex.split(script, comments=True)
    return read_config(Path(words[words.index("--config") + 1]), words[words.index("--config-hash") + 1])


class TestStartedAgain:
    """Slurm runs the same script again after a node failed."""

    def test_after_a_start_with_fewer_nodes(self, programs: Path, tmp_path: Path) -> None:
        """The first node writes what came of it into ``config.yaml``."""
        rows = [o for o in overrides(tmp_path, "run") if not o.startswith("train.micro_batches")]
        submitted = train(compose([*rows, *NODES, "launcher.min_nodes=1", "train.rows_per_step=8"]))
        assert submitted == EXIT_DONE
        config = started_with((tmp_path / "run" / slurm.SCRIPT).read_text())
        parallel = dataclasses.replace(config.parallel, dp=None)
        fewer = resolve(dataclasses.replace(config, parallel=parallel), vocab_size=257, world_size=1)
        prepare_run_folder(fewer)
        assert yaml.safe_load((tmp_path / "run" / CONFIG_FILE).read_text())["parallel"]["dp"] == 1
        assert started_with((tmp_path / "run" / slurm.SCRIPT).read_text()) == config

    def test_after_the_old_run_was_set_aside(self, programs: Path, tmp_path: Path) -> None:
        arguments = [*overrides(tmp_path, "run"), *NODES]
        train(compose(arguments))
        assert train(compose([*arguments, "resume=never"])) == EXIT_DONE
        config = started_with((tmp_path / "run" / slurm.SCRIPT).read_text())
        prepare_run_folder(config)
        assert config.resume == "auto", "the job would set aside its own folder"
        assert [path.name for path in tmp_path.glob("run.old-*")] == ["run.old-1"]

    def test_points_of_an_array(self, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        arguments = [o for o in overrides(tmp_path, "run") if not o.startswith("run.dir=")]
        assert sweep([*arguments, *NODES, "resume=never", "run.name=grid", "mtp.depth=0,1"]) == EXIT_DONE
        points = (tmp_path / "sweeps" / "grid" / slurm.POINTS).read_text().splitlines()
        configs = [read_config(Path(file), digest) for file, _, digest in (point.split("\t") for point in points)]
        assert [(config.mtp.depth, config.resume) for config in configs] == [(0, "auto"), (1, "auto")]


class TestWaiting:
    """``launcher.slurm.wait=true`` ends as the run does, and tells why if that never began."""

    @pytest.mark.parametrize(
        ("job", "code"), [(2, EXIT_CONFIG), (1, EXIT_RANK_FAILURE), (0, EXIT_RANK_FAILURE)], ids=["refused", "1", "0"]
    )
    def test_without_a_result(
        self, job: int, code: int, programs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        write_program(programs / "sbatch", f"echo 7; exit {job}")
        assert train(compose([*overrides(tmp_path, "run"), *NODES, "launcher.slurm.wait=true"])) == code
        told = capfd.readouterr().err
        assert f"error: job 7 ended with exit code {job}" in told
        assert f"see {tmp_path}/run/logs/slurm-7.out" in told

    def test_stopped_but_not_saved(self, programs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """The job was killed while it saved: not the same as a stop before anything was trained."""
        run, script = (
            tmp_path / "run",
            f"echo 7; sleep 1; echo '{{}}' > {tmp_path}/run/plan.json; kill -INT $PPID; sleep 1",
        )
        write_program(programs / "sbatch", f"{script}; exit 1")
        for name in ("scancel", "squeue"):
            write_program(programs / name, "true")
        assert train(compose([*overrides(tmp_path, "run"), *NODES, "launcher.slurm.wait=true"])) == EXIT_RANK_FAILURE
        assert "before a checkpoint was committed" in capfd.readouterr().err, run

    @pytest.mark.parametrize("state", ["running", "begun", "queued"])
    def test_told_to_stop(self, state: str, programs: Path, tmp_path: Path) -> None:
        """A job that runs is signalled, once, when it has a step, and waited for; one in the queue is cancelled, which
        ``sbatch --wait`` calls 0."""
        is_queued = state == "queued"
        run, said = tmp_path / "run", tmp_path / "scancel.txt"
        end = "exit 0" if is_queued else f"sleep 0.5; cp {tmp_path}/result.json {run}; exit 143"
        (tmp_path / "result.json").write_text(
            '{"status": "interrupted", "exit_code": 143, "objective": null, "message": null, "metrics": {}}'
        )
        word = "PENDING" if is_queued else "TERM"
        write_program(programs / "sbatch", f"echo 7; until grep -qs {word} {said}; do sleep 0.05; done; {end}")
        write_program(programs / "scancel", f'echo "$@" >> {said}')
        steps = {"running": "echo 7.batch 7.0", "begun": f"[ $(wc -l < {said}) -lt 2 ] || echo 7.0", "queued": "true"}
        write_program(programs / "squeue", steps[state])
        running = Running(launches.dist_mtp(*overrides(tmp_path, "run"), *NODES, "launcher.slurm.wait=true"), run)
        running.wait_until(lambda: "queued as job 7" in running.output, "the queue")
        running.process.send_signal(signal.SIGINT)
        ended = running.end(30)
        asked = said.read_text().splitlines()
        assert asked[0] == "--state=PENDING 7", asked
        assert asked.count("--signal=TERM 7.0") == (not is_queued), asked
        assert "7.batch" not in " ".join(asked), "the job's script would die and leave its ranks to be killed"
        assert ended.code == (EXIT_INTERRUPTED if is_queued else EXIT_TERMINATED), ended.output


class TestScript:
    """A shell reads paths as they are, however odd, and lists of nodes however long."""

    def test_odd_paths(self, programs: Path, tmp_path: Path) -> None:
        odd = tmp_path / "corpus '\"$(touch broken) `touch broken`"
        setup = tmp_path / "set up; touch broken"
        setup.write_text("export SET_UP=yes\n")
        more = [f"launcher.slurm.setup_script='{setup}'", "run.name='a $(touch broken)'", "parallel.dp=2"]
        config = resolve(compose([*NODES, *more, f"run.dir={tmp_path}/run"]), vocab_size=259)
        write_program(programs / "scontrol", "echo node0 NodeAddr=10.0.0.1 x")
        # In place of what would run on a node, its words, after those of srun itself.
        show = (
            """line="printf '%s|' \\"\\$SET_UP\\"${5#exec}"; shift 6; SLURM_NODEID=1 exec bash -c "$line" node "$@\""""
        )
        write_program(programs / "srun", show)
        environment = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        script = slurm.job_script(config, odd)
        ran = subprocess.run(
            ["bash"], input=script, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
        )
        words = ran.stdout.split("|")
        assert ran.returncode == 0, ran.stderr
        assert words[0] == "yes", ran.stdout
        assert words[words.index("--corpus") + 1] == str(odd), ran.stdout
        assert words[-7:] == ["--nodes", "2", "--rendezvous", "10.0.0.1:20007", "--node-rank", "1", ""], ran.stdout
        assert not list(tmp_path.rglob("broken")), "a shell ran what stands in a name"

    @pytest.mark.parametrize("kind", ["job", "template"])
    def test_many_nodes(self, kind: str, programs: Path, tmp_path: Path) -> None:
        """``scontrol`` must not be cut off while it still writes: its end by SIGPIPE would be the job's."""
        config = resolve(compose([*NODES, f"run.dir={tmp_path}/run", "parallel.dp=2"]), vocab_size=259)
        script = slurm.job_script(config, tmp_path) if kind == "job" else TEMPLATE.read_text()
        (line,) = re.findall(r"^first=.*$", script, re.MULTILINE)
        write_program(programs / "scontrol", "exec seq -f node%.0f 100000")
        body = f'set -euo pipefail\nSLURM_JOB_NODELIST=n\n{line}\necho "$first"'
        ran = subprocess.run(["bash"], input=body, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "node1\n")

    def test_the_template_waits_as_long_as_the_launcher(self) -> None:
        waits = compose(list(NODES)).launcher.join_timeout_s
        assert f" launcher.join_timeout_s={waits:g} " in TEMPLATE.read_text()
