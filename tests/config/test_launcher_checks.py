"""What ``launcher.*`` refuses: pieces of shell commands, options in disguise, and keys that contradict each other.

Invariant: nothing of it reaches a command line, and each refusal names the thing and the fix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_mtp.config import Config, from_mapping
from dist_mtp.errors import ConfigError
from dist_mtp.launch.cluster import plan_cluster
from dist_mtp.launch.hosts import read_hostfile
from dist_mtp.launcher_checks import check_value, parse_endpoint

HOSTILE = {
    "substitution": "$(reboot)",
    "backquotes": "`reboot`",
    "option": "-oProxyCommand=reboot",
    "newline": "a\nb",
    "newline_at_end": "a\n",
    "nul": "a\0b",
    "space": "a b",
    "second_command": "a;reboot",
    "pipe": "a|reboot",
    "glob": "a*",
    "quote": "a'b",
    "user": "root@a",
    "port": "a:22",
    "path": "../a",
    "accent": "hôte",
    "dot_first": ".a",
    "two_dots": "a..b",
    "dash_at_end": "a-",
    "long": "a" * 254,
    "empty": "",
}


def launcher(**keys: Any) -> Config:
    return from_mapping({"launcher": keys})


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        launcher(**keys)
    return str(caught.value)


class TestHosts:
    @pytest.mark.parametrize("host", HOSTILE.values(), ids=HOSTILE)
    def test_are_names_only(self, host: str, tmp_path: Path) -> None:
        """In the list, in the file, and as the place to meet."""
        said = [refusal(name="torchrun", hosts=["good", host])]
        if host and "\n" not in host:  # which ends the name in a file, where an empty one is none
            file = tmp_path / "hosts"
            file.write_text(f"good slots=2\n{host} slots=2\n")
            file.chmod(0o600)
            with pytest.raises(ConfigError) as caught:
                read_hostfile(str(file))
            assert "line 2" in str(caught.value), caught.value
        if host != "a:22":
            said.append(refusal(name="torchrun", nodes=2, rendezvous=host))
        for text in said:
            assert repr(host) in text, text
            assert "is not a host: write letters, digits" in text, text

    @pytest.mark.parametrize("host", ["a", "node-7", "10.0.0.1", "a.b.example.org", "gpu_1", "7", "A" * 253])
    def test_real_names_pass(self, host: str, tmp_path: Path) -> None:
        assert launcher(name="torchrun", hosts=[host]).launcher.hosts == (host,)
        (tmp_path / "hosts").write_text(f"\n# ours\n  {host}   slots=4  # the big one\n\n")
        (tmp_path / "hosts").chmod(0o600)
        assert [(node.host, node.slots) for node in read_hostfile(str(tmp_path / "hosts"))] == [(host, 4)]

    @pytest.mark.parametrize(
        ("text", "mode", "words"),
        [
            ("a slots=2 max_slots=4\n", 0o600, ["line 1", "is not 'HOST slots=N'"]),
            ("a\nb slots=two\n", 0o600, ["line 2"]),
            ("a slots=0\n", 0o600, ["slots=0", "at least 1"]),
            ("a\na\n", 0o600, ["names a twice"]),
            ("# nobody\n", 0o600, ["names no host", "HOST slots=N"]),
            ("a\n", 0o622, ["written by others", "chmod go-w"]),
        ],
    )
    def test_files(self, text: str, mode: int, words: list[str], tmp_path: Path) -> None:
        file = tmp_path / "hosts"
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ConfigError) as caught:
            read_hostfile(str(file))
        assert all(word in str(caught.value) for word in words), caught.value

    def test_file_that_is_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "hosts"
        for content in (None, b"\xff\xfe"):
            if content is not None:
                file.write_bytes(content)
                file.chmod(0o600)
            with pytest.raises(ConfigError, match="cannot be read"):
                read_hostfile(str(file))


@pytest.mark.parametrize("port", ["0", "65536", "", "-1", "+1", " 1", "1:2", "x", "٣", "9" * 5000, "1\n"])
def test_ports(port: str) -> None:
    said = refusal(name="torchrun", nodes=2, rendezvous=f"a:{port}")
    assert "write HOST:PORT with a port from 1 to 65535" in said, said
    assert [parse_endpoint(text) for text in ("a:1", "a:65535", "a")] == [("a", 1), ("a", 65535), ("a", 29500)]


class TestEnvironment:
    @pytest.mark.parametrize("name", ["", "1A", "A B", "A=B", "A\nB", "A\0", "a.b", "A;B", "$(A)", "Ä"])
    def test_names(self, name: str) -> None:
        said = refusal(environment={name: "1"})
        assert repr(name) in said, said
        assert "write letters, digits and underscores" in said, said

    @pytest.mark.parametrize(
        "value", ["a\nb", "a\0", "\x1b[2J", "$HOME", "$(id)", "`id`", '"', "'", "\\", ";", "&", "|", "<", ">"]
    )
    def test_values(self, value: str) -> None:
        """The same ones that DeepSpeed's runner would export."""
        said = refusal(environment={"NCCL_X": value})
        assert repr(value) in said, said
        assert "remove it" in said or "write the value out" in said, said
        with pytest.raises(ConfigError, match="environment variable NCCL_X="):
            check_value("NCCL_X", value)

    @pytest.mark.parametrize(
        ("name", "fix"),
        [
            ("RANK", "remove it"),
            ("MASTER_ADDR", "remove it"),
            ("OMP_NUM_THREADS", "use launcher.threads_per_rank"),
            ("NCCL_SOCKET_IFNAME", "use launcher.interface"),
            ("LD_PRELOAD", "export it"),
            ("PYTHONPATH", "export it"),
        ],
    )
    def test_ones_that_would_be_overridden_or_come_too_late(self, name: str, fix: str) -> None:
        said = refusal(environment={name: "x"})
        assert name in said, said
        assert fix in said, said

    def test_ordinary_ones_pass(self) -> None:
        given = {
            "NCCL_DEBUG": "INFO",
            "NCCL_IB_GID_INDEX": 3,
            "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
            "_X": "",
            "CUDA_CACHE_PATH": "/tmp/a b",
        }
        assert launcher(environment=given).launcher.environment == {name: str(value) for name, value in given.items()}


@pytest.mark.parametrize("interface", ["", "-x", "a b", "eth0;id", "^docker", "a\n", "e" * 40])
def test_interfaces(interface: str) -> None:
    said = refusal(interface=interface)
    assert repr(interface) in said, said
    assert "such as eth0, or null" in said, said


@pytest.mark.parametrize("key", ["hostfile", "ssh_config"])
@pytest.mark.parametrize("path", ["-F/etc/x", "a\nb", "\0", "", "  "])
def test_paths(key: str, path: str) -> None:
    said = refusal(name="torchrun", **{key: path})
    assert f"launcher.{key}={path!r}" in said, said


CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": "local", "nodes": 2}, ["launcher=local", "set launcher=torchrun"]),
    ({"name": "local", "hosts": ["a"]}, ["launcher=local"]),
    ({"name": "local", "min_nodes": 1, "ranks_per_node": 1}, ["launcher=local"]),
    ({"name": "none", "rendezvous": "a"}, ["launcher=none"]),
    ({"name": "torchrun", "nodes": 2}, ["launcher.nodes=2", "launcher.rendezvous=HOST:PORT", "launcher.hosts"]),
    ({"name": "torchrun", "hosts": ["a"], "hostfile": "b"}, ["launcher.hosts and launcher.hostfile", "give one"]),
    ({"name": "torchrun", "hosts": ["a", "b"], "node_rank": 0}, ["launcher.node_rank", "remove it"]),
    ({"name": "torchrun", "nodes": 2, "rendezvous": "a", "node_rank": 2}, ["launcher.node_rank=2", "between 0 and 1"]),
    ({"name": "torchrun", "nodes": 2, "rendezvous": "a", "node_rank": -1}, ["launcher.node_rank=-1"]),
    (
        {"name": "torchrun", "nodes": 2, "rendezvous": "a", "min_nodes": 3, "ranks_per_node": 1},
        ["launcher.min_nodes=3", "launcher.nodes=2"],
    ),
    ({"name": "torchrun", "nodes": 2, "rendezvous": "a", "min_nodes": 1}, ["needs launcher.ranks_per_node"]),
    ({"name": "slurm", "hosts": ["a"]}, ["launcher=slurm", "remove launcher.hosts"]),
    ({"name": "slurm", "nodes": 2, "node_rank": 0}, ["launcher=slurm", "node_rank"]),
    ({"name": "deepspeed", "nodes": 2}, ["launcher=deepspeed", "launcher.hostfile"]),
    ({"name": "deepspeed", "hosts": ["a", "b"], "min_nodes": 1, "ranks_per_node": 1}, ["launcher.min_nodes", "torchrun"]),
    ({"name": "deepspeed", "node_rank": 0}, ["node_rank", "deepspeed"]),
    ({"name": "torchrun", "slurm": {"partition": "x"}}, ["launcher.slurm", "set launcher=slurm"]),
    ({"nodes": 0}, ["launcher.nodes=0", "at least 1"]),
    ({"threads_per_rank": 0}, ["launcher.threads_per_rank=0", "at least 1"]),
    ({"join_timeout_s": 0}, ["launcher.join_timeout_s=0", "greater than 0"]),
    ({"node_timeout_s": 2}, ["launcher.node_timeout_s=2", "at least 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "words"), CONTRADICTIONS)
def test_contradictions(keys: dict[str, Any], words: list[str]) -> None:
    said = refusal(**keys)
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in {said!r}"


def test_number_of_nodes_follows_from_their_names() -> None:
    """Checked where a hostfile has been read, still before anything is started."""
    for keys, words in (
        ({"nodes": 3}, "launcher.nodes=3, but 2 hosts are named: remove launcher.nodes"),
        ({"min_nodes": 3}, "launcher.min_nodes=3 exceeds the 2 nodes"),
    ):
        config = launcher(name="torchrun", hosts=["a", "b"], ranks_per_node=1, **keys)
        with pytest.raises(ConfigError, match=words):
            plan_cluster(config, gpus=0)


def test_elastic_start_decides_the_replicas() -> None:
    elastic = {"name": "torchrun", "nodes": 2, "rendezvous": "a", "min_nodes": 1, "ranks_per_node": 2}
    with pytest.raises(ConfigError, match=r"launcher\.min_nodes=1 .* leave parallel\.dp=null"):
        from_mapping({"launcher": elastic, "parallel": {"dp": 2}})
    assert from_mapping({"launcher": elastic}).launcher.min_nodes == 1
