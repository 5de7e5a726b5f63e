"""Which device the ranks of a host take: all of them the GPUs, or all of them the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

JOIN = """
import os, torch
torch.cuda.device_count = lambda: 1
from dist_mtp.config import LauncherConfig
from dist_mtp.parallel.environment import prepare_environment
from dist_mtp.parallel.mesh import init_process_group
prepare_environment(os.environ, LauncherConfig())
os.environ.update({environment})
print(init_process_group(60, device="{device}"), os.environ["DS_ACCELERATOR"])
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
"""


class TestTooFewGpus:
    """Two ranks on a host with one GPU train on the CPU, DeepSpeed included; with ``auto`` they say why, once."""

    @pytest.mark.parametrize(
        ("device", "environment", "says"),
        [
            ("auto", {"LOCAL_WORLD_SIZE": "2"}, True),
            ("auto", {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "2"}, True),
            ("cpu", {"LOCAL_WORLD_SIZE": "1"}, False),
        ],
        ids=["torchrun", "deepspeed", "cpu"],
    )
    def test_cpu(self, device: str, environment: dict[str, str], says: bool) -> None:
        program = JOIN.format(device=device, environment=environment)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["cpu", "cpu", "cpu"], f"device and accelerator: {done.stdout}"
        said = "training on the CPU: this host has 1 GPU for 2 ranks" in done.stderr
        assert said == says, f"expected the reason: {says}, got:\n{done.stderr}"
