"""The GPU that ranks on this machine would train on, found without the seconds that importing torch takes."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from dist_mtp.config import Config
from dist_mtp.config_checks import use_cuda_for

TIMEOUT_S = 10.0
"""The driver answers in a second, or in none if it hangs; the plan must not."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU of this machine."""

    index: int
    """As ``nvidia-smi`` counts."""
    uuid: str
    name: str
    is_divided: bool = False
    """Only a part of it is meant (MIG); the others may be in use by anybody."""


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
    if not torch_uses_gpus():
        return []
    return [gpu.name for gpu in chosen_gpus(driver_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))]


def torch_uses_gpus() -> bool:
    """Whether the installed torch was built for GPUs."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def driver_gpus() -> list[Gpu]:
    """GPUs that the driver lists, whoever may use them."""
    listing = _nvidia_smi("--query-gpu=index,uuid,name", "--format=csv,noheader")
    rows = [line.split(", ", 2) for line in listing.splitlines() if line.count(", ") >= 2]
    return [Gpu(int(index), uuid, name) for index, uuid, name in rows if index.isdecimal()]


def chosen_gpus(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """Those that CUDA would show to a process.

    Args:
        gpus: of the driver.
        visible: ``CUDA_VISIBLE_DEVICES``: numbers, beginnings of UUIDs, or names of a divided GPU's parts (MIG).
    """
    if visible is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry.startswith("MIG-"):  # CUDA shows a process one part at most
            return chosen or _parts(gpus, entry)[:1]
        found = [gpu for gpu in gpus if entry and (str(gpu.index) == entry or gpu.uuid.startswith(entry))]
        if not found:  # CUDA, too, ends the list at the first entry that names no device
            break
        chosen.append(found[0])
    return chosen


def _parts(gpus: Sequence[Gpu], name: str) -> list[Gpu]:
    """The GPU of which ``name`` is a part: ``MIG-UUID``, or ``MIG-GPU-UUID/3/0`` of drivers before 470."""
    older = name.removeprefix("MIG-").partition("/")[0]
    found = [gpu for gpu in gpus if gpu.uuid == older]
    parent: str | None = None
    for line in _nvidia_smi("-L").splitlines():
        if match := re.match(r"GPU (\d+):", line):
            parent = match[1]
        elif f"(UUID: {name}" in line:  # a part stands below its GPU, indented
            found += [gpu for gpu in gpus if str(gpu.index) == parent]
    return [dataclasses.replace(gpu, is_divided=True) for gpu in found]


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; empty where there is no driver, or none that answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
