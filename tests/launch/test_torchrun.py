"""One command for all hosts: what it makes of how each host's launcher ended. Here each is a line of shell."""

from __future__ import annotations

import pytest

from dist_mtp.cli.compose import compose
from dist_mtp.errors import EXIT_CONFIG, EXIT_RANK_FAILURE, EXIT_TERMINATED
from dist_mtp.launch import torchrun
from dist_mtp.launch.agent import BEGAN
from dist_mtp.launch.cluster import Cluster

HOSTS = ("node0", "node1")
MET = f"echo '{BEGAN}' >&2"
UNKNOWN = "echo 'ssh: Could not resolve hostname node0: Name or service not known' >&2"


@pytest.mark.parametrize(
    ("first", "second", "code", "words"),
    [
        ("exit 0", f"{MET}; exit 0", 0, ""),
        ("sleep 0.5; exit 143", f"{MET}; sleep 0.5; exit 143", EXIT_TERMINATED, ""),
        (
            "sleep 0.5; exit 255",
            f"{MET}; sleep 1; exit 143",
            EXIT_RANK_FAILURE,
            "connection to node0 was lost after the run",
        ),
        ("exit 255", "cat > /dev/null; exit 143", EXIT_CONFIG, "node0 cannot be reached by ssh"),
        ("cat > /dev/null; exit 143", f"{UNKNOWN}; exit 255", EXIT_CONFIG, "node1 cannot be reached by ssh"),
        ("exit 2", "echo 'error: torch differs' >&2; exit 2", EXIT_CONFIG, "node1: error: torch differs"),
    ],
    ids=["done", "stopped", "lost", "first unknown", "second unknown", "refused"],
)
def test_exit_code(
    first: str, second: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad configuration only if the run never began: scripts that start runs again take it for final."""
    monkeypatch.setattr(torchrun, "node_commands", lambda *_: [["sh", "-c", line] for line in (first, second)])
    config = compose(["launcher=torchrun", f"launcher.hosts=[{','.join(HOSTS)}]", "launcher.ranks_per_node=1"])
    got = torchrun.run(config, Cluster(HOSTS, 2, 1, is_elsewhere=True))
    said = capsys.readouterr().err
    assert got == code, f"exited {got}, expected {code}: {said}"
    assert words in said, said
