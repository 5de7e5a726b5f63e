"""How many nodes and ranks a command line asks for, and what DeepSpeed and Slurm are told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config, resolve
from dist_mtp.errors import ConfigError
from dist_mtp.launch import deepspeed, slurm
from dist_mtp.launch.cluster import Cluster, plan_cluster
from dist_mtp.launch.dry_run import dry_run

SSH = "launcher=torchrun"
TWO = "launcher.hosts=[node0,node1]"


def resolved(*overrides: str) -> Config:
    return resolve(compose(list(overrides)), vocab_size=259)


class TestNumbers:
    """Nodes times ranks is the world; what is not given follows from the rest, and a contradiction names its numbers."""

    @pytest.mark.parametrize(
        ("overrides", "gpus", "expected"),
        [
            ([SSH, "launcher.nodes=3", "launcher.rendezvous=node0", "launcher.ranks_per_node=2"], 0, ((), 3, 2)),
            ([SSH, TWO, "parallel.dp=4"], 0, (("node0", "node1"), 2, 4)),
            ([SSH, TWO], 8, (("node0", "node1"), 2, 8)),
            ([SSH], 0, ((), 1, 2)),
        ],
        ids=["given", "from dp", "from GPUs", "one replica"],
    )
    def test_derived(self, overrides: list[str], gpus: int, expected: tuple[tuple[str, ...], int, int]) -> None:
        cluster = plan_cluster(compose([*overrides, "parallel.pp=2"]), gpus=gpus)
        assert (cluster.hosts, cluster.nodes, cluster.ranks_per_node) == expected

    def test_slots_of_a_hostfile(self, tmp_path: Path) -> None:
        file = tmp_path / "hosts"
        file.write_text("# comment\nnode0 slots=4\n\nnode1 slots=4  # rack 2\n")
        cluster = plan_cluster(compose([SSH, f"launcher.hostfile={file}", "parallel.pp=2"]), gpus=0)
        assert cluster == Cluster(("node0", "node1"), 2, 4, True)
        file.write_text("node0 slots=4\nnode1 slots=2\n")
        with pytest.raises(ConfigError, match="equally many slots, got node0 4, node1 2"):
            plan_cluster(compose([SSH, f"launcher.hostfile={file}"]), gpus=0)

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            ([TWO, "launcher.nodes=3"], "launcher.nodes=3, but 2 hosts are named"),
            ([TWO, "launcher.ranks_per_node=2", "parallel.pp=2", "parallel.dp=4"], "2 nodes x 2 ranks are 4, but"),
            ([TWO, "parallel.pp=3", "parallel.dp=1"], "3 ranks do not spread evenly over 2 nodes"),
            ([TWO], "cannot tell how many ranks each of 2 nodes starts"),
            (["launcher.hosts=[node0,node0]"], "launcher.hosts names node0 twice"),
            (["launcher.hosts=[localhost,node1]"], "where each of the others would find itself"),
            (["launcher.hosts=[127.0.0.1,node1]"], "where each of the others would find itself"),
        ],
        ids=["nodes", "product", "uneven", "unknown", "twice", "localhost", "loopback"],
    )
    def test_contradictions(self, overrides: list[str], words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            plan_cluster(compose([SSH, *overrides]), gpus=0)
        assert words in str(caught.value)


class TestDeepSpeed:
    """Whatever DeepSpeed would hand to a shell in double quotes is refused if the shell could take it for a command."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PYTHONPATH", "/a:$(touch broken)"),
            ("NCCL_DEBUG", "INFO\nrm"),
            ("LD_LIBRARY_PATH", "`id`"),
            ("PATH", 'a"b'),
        ],
        ids=["$()", "newline", "backquote", "quote"],
    )
    def test_exported_variables(self, name: str, value: str) -> None:
        config = compose(["launcher=deepspeed", TWO, "launcher.ranks_per_node=1"])
        cluster = plan_cluster(config, gpus=0)
        with pytest.raises(ConfigError, match=f"environment variable {name}="):
            deepspeed.check(config, cluster, {name: value})

    def test_its_own_file_of_variables(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nNCCL_IB_HCA=$(reboot)\n")
        config = compose(["launcher=deepspeed", TWO, "launcher.ranks_per_node=1"])
        with pytest.raises(ConfigError, match=r"NCCL_IB_HCA in .*deepspeed_env"):
            deepspeed.check(config, plan_cluster(config, gpus=0), {})

    def test_folders_with_blanks(self, tmp_path: Path) -> None:
        config = compose(["launcher=deepspeed", TWO, "launcher.ranks_per_node=1", f"run.dir='{tmp_path}/my run'"])
        with pytest.raises(ConfigError, match="my run' has blanks or special characters"):
            deepspeed.check(config, plan_cluster(config, gpus=0), {})


class TestSlurm:
    """The batch script is one that a shell can read, and says to Slurm what ``launcher.slurm`` says."""

    def script(self, tmp_path: Path, *overrides: str) -> str:
        common = ["launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=8", "parallel.pp=2", "parallel.dp=8"]
        config = resolved(*common, f"run.dir={tmp_path}/run", *overrides)
        return slurm.job_script(config, tmp_path / "corpus folder")

    def test_options(self, tmp_path: Path) -> None:
        more = ("slurm.partition=gpu", "slurm.time_limit=1-12:00:00", "slurm.stop_before_s=120", "slurm.requeue=true")
        script = self.script(tmp_path, "device=cuda", *(f"launcher.{key}" for key in more))
        for line in (
            "nodes=2",
            "ntasks-per-node=1",
            "gpus-per-node=8",
            "partition=gpu",
            "time=1-12:00:00",
            "signal=TERM@120",
            "requeue",
        ):
            assert f"#SBATCH --{line}\n" in script, script
        assert "--gpus" not in self.script(tmp_path, "device=cpu")

    def test_a_shell_reads_it(self, tmp_path: Path) -> None:
        script = self.script(tmp_path, "run.name='a \"b\" $(touch broken)'")
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        # In place of srun, what it would run on a node.
        shim = 'srun() { shift 2; SLURM_NODEID=1 "$@"; }\nscontrol() { echo node0; }\nexec() { "$@"; }\n'
        body = script.replace("exec srun", "srun").replace("set -euo pipefail", f"set -euo pipefail\n{shim}", 1)
        body = body.replace('\'exec "$@"', '\'printf "%s|" "$@"')
        ran = subprocess.run(
            ["bash"],
            input=body,
            text=True,
            capture_output=True,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "SLURM_JOB_NODELIST": "n",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NUM_NODES": "2",
            },
        )
        words = ran.stdout.split("|")
        assert str(tmp_path / "corpus folder") in words, f"{ran.stdout}\n{ran.stderr}"
        assert not (tmp_path / "broken").exists(), "a shell ran a part of the run folder's name"
        assert words[-3:] == ["--node-rank", "1", ""], words

    @pytest.mark.parametrize(
        "override",
        ["partition='a b'", "time_limit=soon", "memory_per_node='1 GB'", "account='x\n#SBATCH --uid=0'", "qos='$(id)'"],
    )
    def test_refused_values(self, override: str, tmp_path: Path) -> None:
        config = compose(["launcher=slurm", f"launcher.slurm.{override}"])
        with pytest.raises(ConfigError, match=rf"launcher\.slurm\.{override.partition('=')[0]}="):
            slurm.check(config)


def test_dry_run_prints_commands_for_every_launcher(tmp_path: Path) -> None:
    for launcher, words in {
        "none": ["python -m dist_mtp.train"],
        "local": ["torchrun --rdzv-backend c10d", "--nproc-per-node 2"],
        "torchrun": ["on node0:", "on node1: ssh", "--nnodes 2"],
        "deepspeed": ["-m deepspeed.launcher.runner --hostfile", "--launcher pdsh"],
        "slurm": ["sbatch --parsable", "#SBATCH --nodes=2"],
    }.items():
        nodes = {"slurm": ["launcher.nodes=2", "launcher.ranks_per_node=1"], "none": ["parallel.pp=1"], "local": []}
        overrides = [f"launcher={launcher}", *nodes.get(launcher, [TWO, "launcher.ranks_per_node=1"])]
        config = resolved("parallel.dp=1", "parallel.pp=2", *overrides)
        cluster = None if launcher in ("none", "local") else plan_cluster(config, gpus=0)
        printed = dry_run(config, cluster)
        for word in words:
            assert word in printed, f"{launcher}:\n{printed}"
