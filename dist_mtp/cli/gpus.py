"""The GPU that ranks on this machine would train on, found without the seconds that importing torch takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version

from dist_mtp.config import Config
from dist_mtp.config_checks import use_cuda_for

TIMEOUT_S = 10.0
"""The driver answers in a second, or in none if it hangs; the plan must not."""


def cuda_device_name(config: Config) -> str | None:
    """Name of the first GPU if ranks started here would use GPUs, None if they would use the CPU.

    ``device=cuda`` on a machine with too few GPUs, such as the login node of a cluster, plans for the machines that have
    them; without any GPU the name is one that no device profile knows.
    """
    if config.device == "cpu":
        return None
    names = visible_gpus()
    if config.device == "cuda":
        return names[0] if names else "unknown GPU"
    return names[0] if use_cuda_for(config.device, local_ranks=config.world_size, gpus=len(names)) else None


def visible_gpus() -> list[str]:
    """Names of the GPUs that a process started here can use; empty when nothing says that there are any."""
    command = shutil.which("nvidia-smi")
    if command is None or version("torch").endswith("+cpu"):
        return []
    query = [command, "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [line.split(", ", 2) for line in done.stdout.splitlines() if line.count(", ") >= 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [name for _, _, name in gpus]
    names = []
    for chosen in visible.split(","):
        found = [
            name
            for index, uuid, name in gpus
            if chosen.strip() and (index == chosen.strip() or uuid.startswith(chosen.strip()))
        ]
        if not found:  # CUDA, too, ends the list at the first entry that names no device
            break
        names.append(found[0])
    return names
