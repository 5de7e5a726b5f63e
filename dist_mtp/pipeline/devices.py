"""Device profiles: the handful of speeds that the planner assumes of one rank's device.

Shares of time between stages, and so the partition, depend on the ratios only; absolute step times are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.errors import ConfigError


@dataclass(frozen=True)
class DeviceProfile:
    name: str
    flops_per_s: float
    """Matrix multiplication speed in bf16 that large layers reach in practice."""
    peak_flops_per_s: float
    """Dense bf16 peak of the data sheet; the denominator of model FLOPs utilisation (MFU)."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    """Between neighbouring pipeline ranks, assumed to sit in different nodes."""
    latency_s: float
    """Of one message between neighbouring pipeline ranks."""

    def message_seconds(self, num_bytes: float) -> float:
        """Time from the send of a message until the peer can use it."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


# Peaks and memory: NVIDIA data sheets (SXM, dense). Practical speed: about two thirds of peak. Network: one 400 Gbit/s
# port per GPU (H100, H200) or 200 Gbit/s (A100). The CPU is one core and the loopback interface.
_PROFILES = (
    DeviceProfile("h100", 6.5e14, 9.89e14, 80 * 10**9, 4.5e10, 1.5e-5),
    DeviceProfile("h200", 6.5e14, 9.89e14, 141 * 10**9, 4.5e10, 1.5e-5),
    DeviceProfile("a100", 2.2e14, 3.12e14, 80 * 10**9, 2.2e10, 1.5e-5),
    DeviceProfile("cpu", 5.0e10, 1.0e11, 8 * 10**9, 1.0e9, 2.0e-4),
)
PROFILES = {profile.name: profile for profile in _PROFILES}

_CUDA_NAMES = {"H200": "h200", "H100": "h100", "H800": "h100", "A100": "a100", "A800": "a100"}
"""Part of the name that the driver reports -> profile."""


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
        known = (profile for part, profile in _CUDA_NAMES.items() if part in cuda_device_name)
        return PROFILES[next(known, "a100")]
    if name not in PROFILES:
        raise ConfigError(
            f"pipeline.device_profile={name} is unknown: use auto or one of {', '.join(PROFILES)}, or add a profile to "
            f"dist_mtp/pipeline/devices.py"
        )
    return PROFILES[name]
