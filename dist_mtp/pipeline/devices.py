"""Device profiles: the handful of speeds that the planner assumes of one rank's device.

Shares of time between stages, and so the partition, depend on the ratios only; absolute step times are estimates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dist_mtp.errors import ConfigError


@dataclass(frozen=True)
class DeviceProfile:
    name: str
    cuda_names: tuple[str, ...]
    """Parts of the name that the driver reports, any of which means this device."""
    flops_per_s: float
    """Matrix multiplication speed in bf16 that large layers reach in practice."""
    fp8_flops_per_s: float
    """The same in FP8, quantisation of inputs and gradients included."""
    peak_flops_per_s: float | None
    """Dense bf16 peak of the data sheet, the denominator of model FLOPs utilisation (MFU); None where it is measured."""
    bandwidth_bytes_per_s: float
    """Between neighbouring pipeline ranks, assumed to sit in different nodes."""
    latency_s: float
    """Of one message between neighbouring pipeline ranks, or of one all-to-all."""
    node_bandwidth_bytes_per_s: float
    """That leave a rank for others of its node."""
    memory_bytes: float | None
    """Of one device; None where it is the host's."""
    node_ranks: int | None
    """Ranks that share a node; None where all do. A plan has that of its run here, see ``nodes.py``."""

    def message_seconds(self, num_bytes: float) -> float:
        """Time from the send of a message until the peer can use it."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s

    def within_node(self, group_size: int, world_size: int) -> bool:
        """Whether no group of ``group_size`` consecutive ranks spans two nodes, groups and nodes both counted from rank 0.

        With 8 ranks in a node groups of 2, 4 and 8 fit; groups of 3 do not, as the third one is ranks 6 to 8.
        """
        return self.node_ranks is None or world_size <= self.node_ranks or self.node_ranks % group_size == 0

    def all_to_all_seconds(self, num_bytes: float, group_size: int, world_size: int) -> float:
        """Time of an all-to-all in groups of consecutive ranks, each of which sends ``num_bytes`` to the others.

        If groups span nodes, all bytes are taken to need the network; a few stay in the node.
        """
        if group_size == 1:
            return 0.0
        within = self.within_node(group_size, world_size)
        return self.latency_s + num_bytes / (self.node_bandwidth_bytes_per_s if within else self.bandwidth_bytes_per_s)


# Peaks: NVIDIA data sheets (dense). Practical speed: about two thirds of peak. In FP8 1.7 times that: the peak is twice as high
# (1979 TFLOP/s of an H100), of which DeepGEMM reaches 1550 on an H800 (github.com/deepseek-ai/DeepGEMM), but inputs and
# gradients have to be quantised. An A100 has no FP8 to gain from; the CPU emulates it. Network: one 400 Gbit/s port per GPU
# (H100, H800, H200) or 200 Gbit/s (A100, A800). Inside a node: 80 % of NVLink's one-way peak, which is half of what the data
# sheets add up (H100, H200 900 GB/s, A100 600, H800, A800 400): the DeepSeek-V3 report (arXiv 2412.19437, section 3.2.2) counts
# 160 GB/s for an H800, and 380 GB/s were measured between two H100s (github.com/NVIDIA/nccl issue 1264). Cards whose NVLink, if
# any, joins two only: 80 % of PCIe 5.0 x16. Memory: data
# sheets; a GH200 with the smaller of its two. The CPU is one core and the loopback interface. The first row that a GPU's name fits
# counts.
_PROFILES = (
    DeviceProfile("h100_pcie", ("H100 PCIe",), 5.0e14, 8.5e14, 7.56e14, 4.5e10, 1.5e-5, 5.0e10, 8.0e10, 8),
    DeviceProfile("h100_nvl", ("H100 NVL",), 5.5e14, 9.4e14, 8.35e14, 4.5e10, 1.5e-5, 5.0e10, 9.4e10, 8),
    DeviceProfile("h100", ("H100",), 6.5e14, 1.1e15, 9.89e14, 4.5e10, 1.5e-5, 3.6e11, 8.0e10, 8),
    DeviceProfile("h800", ("H800",), 6.5e14, 1.1e15, 9.89e14, 4.5e10, 1.5e-5, 1.6e11, 8.0e10, 8),
    DeviceProfile("gh200", ("GH200",), 6.5e14, 1.1e15, 9.89e14, 4.5e10, 1.5e-5, 3.6e11, 9.6e10, 8),
    DeviceProfile("h200", ("H200",), 6.5e14, 1.1e15, 9.89e14, 4.5e10, 1.5e-5, 3.6e11, 14.1e10, 8),
    DeviceProfile(
        "a100_40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 2.2e14, 2.2e14, 3.12e14, 2.2e10, 1.5e-5, 2.4e11, 4.0e10, 8
    ),
    DeviceProfile("a100", ("A100",), 2.2e14, 2.2e14, 3.12e14, 2.2e10, 1.5e-5, 2.4e11, 8.0e10, 8),
    DeviceProfile("a800", ("A800",), 2.2e14, 2.2e14, 3.12e14, 2.2e10, 1.5e-5, 1.6e11, 8.0e10, 8),
    DeviceProfile("cpu", (), 5.0e10, 2.0e10, None, 1.0e9, 2.0e-4, 1.0e9, None, None),
)
PROFILES = {profile.name: profile for profile in _PROFILES}


def cuda_profile(cuda_device_name: str) -> DeviceProfile | None:
    """The profile of the GPU that ``torch.cuda.get_device_name()`` names; None for devices not listed."""
    return next((p for p in _PROFILES if any(part in cuda_device_name for part in p.cuda_names)), None)


def resolve_profile(name: str, cuda_device_name: str | None = None) -> DeviceProfile:
    """The profile called ``name``; ``auto`` takes that of the device.

    Args:
        name: ``pipeline.device_profile``.
        cuda_device_name: what ``torch.cuda.get_device_name()`` says, or None without a CUDA device. An unknown GPU
            is planned for as an ``a100`` of unlimited memory.

    Raises:
        ConfigError: no profile has this name.
    """
    if name == "auto":
        if cuda_device_name is None:
            return PROFILES["cpu"]
        return cuda_profile(cuda_device_name) or dataclasses.replace(PROFILES["a100"], memory_bytes=None)
    if name not in PROFILES:
        raise ConfigError(
            f"pipeline.device_profile={name} is unknown: use auto or one of {', '.join(PROFILES)}, or add a profile to "
            f"dist_mtp/pipeline/devices.py"
        )
    return PROFILES[name]
