"""Device profiles: the handful of speeds that the planner assumes of one rank's device.

Shares of time between stages, and so the partition, depend on the ratios only; absolute step times are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.errors import ConfigError


@dataclass(frozen=True)
class DeviceProfile:
    name: str
    cuda_names: tuple[str, ...]
    """Parts of the name that the driver reports, any of which means this device."""
    flops_per_s: float
    """Matrix multiplication speed in bf16 that large layers reach in practice."""
    peak_flops_per_s: float | None
    """Dense bf16 peak of the data sheet, the denominator of model FLOPs utilisation (MFU); None where it is measured."""
    bandwidth_bytes_per_s: float
    """Between neighbouring pipeline ranks, assumed to sit in different nodes."""
    latency_s: float
    """Of one message between neighbouring pipeline ranks."""

    def message_seconds(self, num_bytes: float) -> float:
        """Time from the send of a message until the peer can use it."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


# Peaks: NVIDIA data sheets (dense). Practical speed: about two thirds of peak. Network: one 400 Gbit/s port per GPU (H100,
# H200) or 200 Gbit/s (A100). The CPU is one core and the loopback interface. The first row that a GPU's name fits counts.
_PROFILES = (
    DeviceProfile("h100_pcie", ("H100 PCIe",), 5.0e14, 7.56e14, 4.5e10, 1.5e-5),
    DeviceProfile("h100_nvl", ("H100 NVL",), 5.5e14, 8.35e14, 4.5e10, 1.5e-5),
    DeviceProfile("h100", ("H100", "H800"), 6.5e14, 9.89e14, 4.5e10, 1.5e-5),
    DeviceProfile("h200", ("H200",), 6.5e14, 9.89e14, 4.5e10, 1.5e-5),
    DeviceProfile("a100", ("A100", "A800"), 2.2e14, 3.12e14, 2.2e10, 1.5e-5),
    DeviceProfile("cpu", (), 5.0e10, None, 1.0e9, 2.0e-4),
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
            is planned for as an ``a100``.

    Raises:
        ConfigError: no profile has this name.
    """
    if name == "auto":
        if cuda_device_name is None:
            return PROFILES["cpu"]
        return cuda_profile(cuda_device_name) or PROFILES["a100"]
    if name not in PROFILES:
        raise ConfigError(
            f"pipeline.device_profile={name} is unknown: use auto or one of {', '.join(PROFILES)}, or add a profile to "
            f"dist_mtp/pipeline/devices.py"
        )
    return PROFILES[name]
