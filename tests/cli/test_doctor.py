"""``dist-mtp doctor`` as a user meets it: everything is checked, what is wrong has a fix, and nothing ends in a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_mtp.cli.gpus import Gpu, chosen_gpus
from dist_mtp.doctor.system import write_speed
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE

TIMEOUT_S = 60.0
QUICK_S = 15.0
HOSTS = ["launcher=torchrun", "launcher.ranks_per_node=1"]

SSH = """#!{python}
import json, subprocess, sys
host, line = sys.argv[-2:]
if host == "node-that-is-down":
    print("ssh: connect to host node-that-is-down port 22: No route to host", file=sys.stderr)
    sys.exit(255)
done = subprocess.run(["sh", "-c", line], capture_output=True)
out = done.stdout.decode()
if "launch.facts" in line:
    facts = json.loads(out)
    facts["time"] += {ahead}
    facts["torch"] = {torch!r} or facts["torch"]
    out = json.dumps(facts)
sys.stdout.buffer.write(b"Bienvenue \\xe9\\n" + out.encode())
sys.exit(done.returncode)
"""
"""Hosts that are this machine, with other clocks and versions, and a greeting in Latin-1."""

NVIDIA_SMI = """#!/bin/sh
case "$1" in
--query-gpu=index,uuid,name) printf '0, GPU-a, H100\\n1, GPU-b, H100\\n' ;;
--query-gpu=*) printf '0, H100, 570.1, 9.0, 81920, 81000\\n1, H100, 570.1, 9.0, 81920, 1000\\n' ;;
topo) printf '\\tGPU0\\tGPU1\\nGPU0\\tX\\tNV18\\nGPU1\\tNV18\\tX\\n' ;;
nvlink) printf 'GPU 0: H100\\n\\t Link 0: 26.562 GB/s\\nGPU 1: H100\\n\\t Link 0: <inactive>\\n' ;;
esac
"""


def doctor(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output; programs in ``folder`` come first."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dist_mtp", "doctor", f"run.dir={folder / 'run'}", *overrides],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stderr == "", done.stderr
    assert time.monotonic() - started < QUICK_S, f"took {time.monotonic() - started:.0f} s"
    return done.returncode, done.stdout


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def own_address() -> str:
    """By which other machines would reach this one, and the hosts that are this machine do."""
    addresses = (
        entry.address for found in psutil.net_if_addrs().values() for entry in found if entry.family == socket.AF_INET
    )
    found = next((address for address in addresses if not address.startswith("127.")), None)
    return found if found is not None else pytest.skip("this machine has no address but those of loopback")


def finding(output: str, name: str) -> str:
    """Level, text and fix of a check, in one line."""
    found = re.search(rf"^{re.escape(name)}  +(.*(?:\n +.*)*)", output, flags=re.MULTILINE)
    assert found is not None, f"no {name!r} in\n{output}"
    return " ".join(found[1].split())


def test_this_machine(tmp_path: Path) -> None:
    """Everything that training needs is named, and a list of threads, which OpenMP allows, is no reason to crash."""
    code, output = doctor(tmp_path, env={"OMP_NUM_THREADS": "9,2"})
    assert code == EXIT_DONE, output
    for name in ("torch", "deepspeed", "import deepspeed", "gloo all-reduce", "disk space", "disk speed"):
        assert finding(output, name).startswith("ok"), output
    for name in ("GPUs", "InfiniBand", "port 29500", "port 6006", "interfaces", "CPU", "clock"):
        finding(output, name)
    assert "2 ranks of 9 threads" in finding(output, "CPU"), output
    assert not (tmp_path / "run").exists(), "it only looks"


def test_gpus_that_torch_cannot_use(tmp_path: Path) -> None:
    """The driver shows two GPUs; the torch that runs these tests, or this machine, cannot use them."""
    program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    # By names that no real GPU has, so that torch sees none wherever this runs.
    code, output = doctor(tmp_path, "device=cuda", env={"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})
    assert code == EXIT_CONFIG, output
    for expected in (
        "ok       2 x H100, 80 GiB, compute capability 9.0, driver 570.1",
        "GPU 1 has 1 GiB of 80 GiB free",
        "joins all 1 pairs of GPUs (1 NV18)",
        "1 of 2 links are down",
    ):
        assert expected in output, output
    assert finding(output, "torch GPUs").startswith("error torch sees 0 of 2 GPUs"), output


def test_gpus_of_others(tmp_path: Path) -> None:
    """The second GPU is in use and its link is down, but ``CUDA_VISIBLE_DEVICES`` names the first only."""
    program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    _, output = doctor(tmp_path, "device=cuda", env={"CUDA_VISIBLE_DEVICES": "GPU-a"})
    assert finding(output, "GPUs").startswith("ok 1 x H100"), output
    assert "GPU 1" not in output, output
    assert "joins" not in output, output
    assert finding(output, "NVLink state").startswith("ok 1 links up"), output
    assert finding(output, "torch GPUs").startswith("error torch sees 0 of 1 GPUs"), output


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("MIG-2f", ["1 part"]),
        ("MIG-2f,MIG-1e", ["1 part"]),
        ("MIG-GPU-aa/3/0", ["0 part"]),
        ("MIG-none", []),
        ("GPU-bb", ["1"]),
        ("1,0", ["1", "0"]),
    ],
)
def test_names_in_cuda_visible_devices(
    visible: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of divided GPUs are listed below them; CUDA shows one part at most."""
    listing = "".join(
        f"GPU {n}: A100 (UUID: GPU-{u * 2})\\n  MIG 1g.5gb Device 0: (UUID: MIG-{n + 1}{p})\\n"
        for n, u, p in ((0, "a", "e"), (1, "b", "f"))
    )
    program(tmp_path, "nvidia-smi", f"#!/bin/sh\nprintf '{listing}'\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus = [Gpu(0, "GPU-aa", "A100"), Gpu(1, "GPU-bb", "A100")]
    found = [f"{gpu.index}{' part' * gpu.is_divided}" for gpu in chosen_gpus(gpus, visible)]
    assert found == expected


NOT_OF_A_LOGIN_NODE = (
    "GPUs",
    "torch GPUs",
    "InfiniBand",
    "CPU",
    "/dev/shm",
    "nccl all-reduce",
    "interfaces",
    "port 29500",
)


def test_login_node_of_a_slurm_cluster(tmp_path: Path) -> None:
    """Neither GPUs nor the port are needed where the command is given; what queues the job is."""
    for name in ("sbatch", "srun"):
        program(tmp_path, name, "#!/bin/sh\n")
    nodes = ["launcher=slurm", "device=cuda", "launcher.nodes=2", "launcher.ranks_per_node=8"]
    code, output = doctor(tmp_path, *nodes)
    assert code == EXIT_DONE, output
    assert finding(output, "this machine").startswith("note ranks run on nodes that Slurm chooses, not here"), output
    judged = [name for name in NOT_OF_A_LOGIN_NODE if re.search(rf"^{name}  ", output, flags=re.MULTILINE)]
    assert not judged, output
    finding(output, "disk speed")


def test_machine_that_only_starts_others(tmp_path: Path) -> None:
    """Named hosts train, this one does not: GPUs and interface are looked for there, under whatever name ssh knows them."""
    program(tmp_path, "ssh", SSH.format(python=sys.executable, ahead=0.0, torch=""))
    nodes = ["device=cuda", "launcher.hosts=[node-b]", "launcher.interface=no-such-if"]
    code, output = doctor(tmp_path, *HOSTS, *nodes)
    assert code == EXIT_CONFIG, output
    assert "the named hosts, not here" in finding(output, "this machine"), output
    judged = [name for name in NOT_OF_A_LOGIN_NODE if re.search(rf"^{name}  ", output, flags=re.MULTILINE)]
    assert not judged, output
    assert finding(output, "node-b: GPUs").startswith("error none, but device=cuda"), output
    assert finding(output, "node-b: interfaces").startswith("error launcher.interface=no-such-if"), output
    assert finding(output, "gloo all-reduce").startswith("ok"), output


def test_hosts(tmp_path: Path) -> None:
    """One host is down, one's clock is wrong, its torch is another; all three are findings, whatever shells greet with."""
    program(tmp_path, "ssh", SSH.format(python=sys.executable, ahead=100.0, torch="2.1.0"))
    code, output = doctor(tmp_path, *HOSTS, f"launcher.hosts=[{own_address()},node-b,node-that-is-down]")
    assert code == EXIT_CONFIG, output
    assert "cannot be reached by ssh" in finding(output, "node-that-is-down"), output
    assert re.match(r"warning (99|100)\.\d\d s ahead of this machine's", finding(output, "node-b: clock")), output
    assert "fix: start chrony" in finding(output, "node-b: clock"), output
    assert re.search(
        r"error torch differs between nodes: .*2\.1\.0 on node-b fix: install", finding(output, "hosts alike")
    )
    assert finding(output, "node-b").startswith("ok"), "its own findings did not come"


def test_hosts_of_a_file_that_others_lack(tmp_path: Path) -> None:
    """The other host is told the names; and more ranks than parallel.dp says are no reason to check nothing."""
    program(tmp_path, "ssh", SSH.format(python=sys.executable, ahead=0.0, torch=""))
    address = own_address()
    (tmp_path / "hosts").write_text(f"{address} slots=2\nnode-b slots=2\n")
    (tmp_path / "hosts").chmod(0o600)
    overrides = [f"launcher.hostfile={tmp_path / 'hosts'}", "parallel.pp=2", "parallel.ep=2"]
    code, output = doctor(tmp_path, "launcher=torchrun", *overrides)
    assert code == EXIT_DONE, output
    assert finding(output, "hosts alike").startswith("ok 2 hosts"), output
    assert finding(output, "way between hosts").startswith(f"ok 1 of 1 other hosts reach {address}:29500"), output
    assert "node-b  " in output, output


def test_busy_port_matters_where_nodes_meet(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        nodes = [*HOSTS, "launcher.nodes=2"]
        first, output = doctor(tmp_path, *nodes, f"launcher.rendezvous=127.0.0.1:{port}")
        assert finding(output, f"port {port}").startswith("error in use"), output
        other, output = doctor(tmp_path, *nodes, f"launcher.rendezvous=no-such-host:{port}")
        assert finding(output, f"port {port}").startswith("note in use"), output
        assert finding(output, "rendezvous").startswith("error no-such-host does not resolve"), output
    assert (first, other) == (EXIT_CONFIG, EXIT_CONFIG)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_full_disk(tmp_path: Path) -> None:
    """The probe of the disk's speed is smaller than what is free; when nothing is, both checks say so."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], check=True, timeout=10)
    try:
        speed = write_speed(tmp_path)
        _fill(tmp_path / "rest")
        code, output = doctor(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=10)
    assert isinstance(speed, float), speed
    assert code == EXIT_CONFIG
    assert re.match(r"error 0\.0B free in .* a checkpoint takes about 22\.0MB fix: free", finding(output, "disk space"))
    assert "cannot be written: No space left on device" in finding(output, "disk speed"), output


def _fill(file: Path) -> None:
    """Write until nothing more goes in."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as sink:
        while True:
            sink.write(bytes(4096))
