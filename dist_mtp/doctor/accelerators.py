"""GPUs, the links between them, and InfiniBand or RoCE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.doctor.finding import Finding, Level, output_of

GPU_QUERY = "index,name,driver_version,compute_cap,memory.total,memory.free"
_LEAST_FREE = 0.9
"""Share of a GPU's memory; less means that another process uses it."""
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Port:
    """One port of an adapter, as ``/sys/class/infiniband/DEVICE/ports/N`` says."""

    name: str
    state: str
    """Such as ``4: ACTIVE``."""
    rate: str
    """Such as ``400 Gb/sec (4X NDR)``."""
    link_layer: str
    """``InfiniBand``, or ``Ethernet`` for RoCE."""

    @property
    def is_active(self) -> bool:
        return "ACTIVE" in self.state


def check_gpus(
    listing: str | None,
    wanted: int,
    usable: int,
    *,
    device: str,
    chosen: Collection[int] | None = None,
    is_divided: bool = False,
) -> list[Finding]:
    """One finding for each kind of GPU and for each that is in use.

    Args:
        listing: CSV of ``nvidia-smi --query-gpu`` with :data:`GPU_QUERY`, no header and no units; None without a driver.
        wanted: ranks that this machine would start.
        usable: GPUs that ``CUDA_VISIBLE_DEVICES`` and the installed torch leave them.
        device: of the configuration.
        chosen: numbers of those that ``CUDA_VISIBLE_DEVICES`` names, the others are not ours to judge; None: all.
        is_divided: only a part of a GPU is meant, so that its memory may be in use by others.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in (listing or "").splitlines()]
    listed = [row for row in rows if len(row) == len(GPU_QUERY.split(","))]  # the driver may print warnings among them
    gpus = [row for row in listed if chosen is None or row[0] in map(str, chosen)]
    if not gpus:
        what = f"CUDA_VISIBLE_DEVICES names none of the {len(listed)} GPUs" if listed else "none"
        if device != "cuda":
            return [Finding("GPUs", "note", f"{what}: training runs on the CPU")]
        fix = "unset it" if listed else "start it on a machine with GPUs and NVIDIA's driver"
        return [Finding("GPUs", "error", f"{what}, but device=cuda", f"{fix}, or set device=cpu")]
    kinds = Counter((name, driver, capability, total) for _, name, driver, capability, total, _ in gpus)
    findings = [
        Finding("GPUs", "ok", f"{count} x {name}, {_gib(total)}, compute capability {capability}, driver {driver}")
        for (name, driver, capability, total), count in kinds.items()
    ]
    if len(kinds) > 1:
        fix = "choose equal ones with CUDA_VISIBLE_DEVICES"
        findings.append(Finding("GPUs", "warning", "different kinds: the slowest sets the pace", fix))
    if device != "cpu" and usable < wanted:
        what = f"{usable} of {len(listed)} can be used by processes started here, for {wanted} ranks"
        fix = "see CUDA_VISIBLE_DEVICES, lower parallel.pp x parallel.dp, add nodes, or set device=cpu"
        level: Level = "error" if device == "cuda" else "warning"
        findings.append(Finding("GPUs", level, what + ("" if device == "cuda" else ": training runs on the CPU"), fix))
    for index, _, _, _, total, free in gpus:
        if not is_divided and _number(free) < _LEAST_FREE * _number(total):
            what = f"GPU {index} has {_gib(free)} of {_gib(total)} free"
            findings.append(Finding("GPUs", "warning", what, "end the processes that nvidia-smi lists"))
    return findings


def check_links(topology: str | None, chosen: Collection[int] | None = None) -> Finding | None:
    """How GPUs of this machine reach each other; None with fewer than two.

    Args:
        topology: output of ``nvidia-smi topo -m``: a matrix whose cells are ``NV18`` (18 NVLinks), or ``PIX``, ``PXB``,
            ``PHB``, ``NODE`` or ``SYS`` for ways over PCIe and processors.
        chosen: see :func:`check_gpus`.
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", topology or "")
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    places = [place for place, row in enumerate(rows) if chosen is None or int(row[0].removeprefix("GPU")) in chosen]
    if len(places) < 2:
        return None
    pairs = Counter(rows[a][1 + b] for a in places for b in places if b < a)
    ways = ", ".join(f"{count} {way}" for way, count in pairs.most_common())
    total = len(places) * (len(places) - 1) // 2
    linked = sum(count for way, count in pairs.items() if way.startswith("NV"))
    if linked == total:
        return Finding("NVLink", "ok", f"joins all {total} pairs of GPUs ({ways})")
    if linked == 0:
        return Finding("NVLink", "note", f"none, GPUs reach each other over PCIe ({ways})")
    what = f"joins {linked} of {total} pairs of GPUs ({ways}): expert groups across the others are slow"
    return Finding(
        "NVLink", "warning", what, "choose GPUs that are joined with CUDA_VISIBLE_DEVICES, see nvidia-smi topo -m"
    )


def check_nvlink_status(status: str | None, chosen: Collection[int] | None = None) -> Finding | None:
    """Links that are down; None where there are none at all.

    Args:
        status: output of ``nvidia-smi nvlink --status``: a line ``GPU 0: NAME`` and below it one for each link.
        chosen: see :func:`check_gpus`.
    """
    sections = re.findall(r"^GPU (\d+):.*\n((?:[ \t]+.*\n?)*)", status or "", flags=re.MULTILINE)
    ours = "".join(links for index, links in sections if chosen is None or int(index) in chosen)
    speeds = re.findall(r"^\s+Link \d+:\s+(.+)$", ours, flags=re.MULTILINE)
    if not speeds:
        return None
    down = sum("GB/s" not in speed for speed in speeds)
    if not down:
        return Finding("NVLink state", "ok", f"{len(speeds)} links up, {', '.join(sorted(set(speeds)))} each")
    fix = "see nvidia-smi nvlink --status and the driver's log; a reset or a repair may be due"
    return Finding("NVLink state", "warning", f"{down} of {len(speeds)} links are down", fix)


def check_ports(ports: Sequence[Port], *, several_nodes: bool) -> Finding:
    """InfiniBand or RoCE: what NCCL uses between nodes."""
    if not ports:
        what = "none: NCCL and gloo use TCP between nodes" if several_nodes else "none, and none is needed on one node"
        return Finding("InfiniBand", "note", what)
    active = [port for port in ports if port.is_active]
    shown = Counter(f"{'RoCE' if port.link_layer == 'Ethernet' else 'InfiniBand'} {port.rate}" for port in active)
    what = f"{len(active)} of {len(ports)} ports active: " + ", ".join(f"{n} x {kind}" for kind, n in shown.items())
    if active:
        return Finding("InfiniBand", "ok", what)
    states = ", ".join(f"{port.name} {port.state}" for port in ports)
    return Finding("InfiniBand", "warning", f"no port is active: {states}", "see ibstat, cables and the subnet manager")


def accelerator_findings(
    wanted: int,
    usable: int,
    device: str,
    ports: Sequence[Port],
    *,
    several_nodes: bool,
    has_driver: bool,
    chosen: Collection[int],
    is_divided: bool,
) -> list[Finding]:
    """What this machine has.

    Args:
        wanted, usable, chosen, is_divided: see :func:`check_gpus`.
        ports: of :func:`adapter_ports`.
        has_driver: it lists a GPU at all; one that does not, or that hangs, is not asked for more.
    """
    query = (f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits")
    listing, topology, status = (
        output_of("nvidia-smi", *arguments) if has_driver else None
        for arguments in (query, ("topo", "-m"), ("nvlink", "--status"))
    )
    found = [
        *check_gpus(listing, wanted, usable, device=device, chosen=chosen, is_divided=is_divided),
        check_links(topology, chosen),
        check_nvlink_status(status, chosen),
        check_ports(ports, several_nodes=several_nodes),
    ]
    return [finding for finding in found if finding is not None]


def adapter_ports(folder: Path = _INFINIBAND) -> list[Port]:
    """Ports of all adapters, as the kernel shows them in ``folder``."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        said: Mapping[str, str] = {name: _read(port / name) for name in ("state", "rate", "link_layer")}
        found.append(Port(f"{port.parts[-3]}/{port.name}", **said))
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return "unknown"


def _number(text: str) -> float:
    """A cell of the listing; drivers write ``[N/A]`` for what they do not know."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _gib(mebibytes: str) -> str:
    return f"{_number(mebibytes) / 1024:.0f} GiB"
