"""A real Slurm cluster of several nodes on this machine: munged, slurmctld and one slurmd per node, in a private folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=30
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
"""
_NODE = "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=2000 State=UNKNOWN\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
START_S = 30.0


def unavailable() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


class SlurmCluster:
    """Nodes ``n0``, ``n1``, ...; :attr:`environment` makes Slurm's commands talk to them."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._nodes = nodes
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        folder, host = self.folder, socket.gethostname()
        (folder / "state").mkdir(parents=True)
        ports = _free_ports(1 + self._nodes)
        nodes = [_NODE.format(number=number, host=host, port=port) for number, port in enumerate(ports[1:])]
        (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, port=ports[0]) + "".join(nodes))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key": key, "socket": folder / "munge.sock", "pid": folder / "munged.pid", "seed": folder / "seed"}
        options = [f"--{name}-file={path}" if name != "socket" else f"--socket={path}" for name, path in files.items()]
        self._start("munged", "--foreground", "--force", *options, f"--log-file={folder}/munged.log")
        self._wait_for(lambda: files["socket"].exists(), "munged")
        conf = str(folder / "slurm.conf")
        self._start("slurmctld", "-D", "-f", conf)
        for number in range(self._nodes):
            self._start("slurmd", "-D", "-N", f"n{number}", "-f", conf)
        self._wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], "idle nodes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        deadline = time.monotonic() + 10
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)  # daemons with jobs on their hands are slow to end
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        # A session of its own: an interrupt at the terminal must not end the daemons before their jobs.
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        log.close()

    def _wait_for(self, reached: object, what: str) -> None:
        assert callable(reached)
        deadline = time.monotonic() + START_S
        while not reached():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                said = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log")))
                self.__exit__(None, None, None)
                raise AssertionError(f"Slurm: no {what} within {START_S:.0f} s:\n{said}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
