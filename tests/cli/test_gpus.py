"""The plan verb looks for GPUs without torch, and must come to what the ranks will decide with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_mtp.cli import gpus
from dist_mtp.config import from_mapping
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.errors import ConfigError

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
LISTING = f"0, GPU-aa11, {H100}\n1, GPU-bb22, {H100}\n2, GPU-cc33, {A100}\n"


@pytest.fixture
def _driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``nvidia-smi`` that lists three GPUs, and a torch that was built for them."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{LISTING}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpus, "version", lambda package: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.mark.usefixtures("_driver")
class TestVisible:
    """Exactly the GPUs that CUDA would show to a process started here."""

    @pytest.mark.parametrize(
        ("visible", "expected"),
        [
            (None, [H100, H100, A100]),
            ("2,0", [A100, H100]),
            ("GPU-cc33", [A100]),
            ("GPU-cc", [A100]),
            ("0,7,1", [H100]),
            ("", []),
            ("-1", []),
        ],
    )
    def test_names(self, visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus.visible_gpus() == expected, f"CUDA_VISIBLE_DEVICES={visible} gives {gpus.visible_gpus()}"

    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpus, "version", lambda package: "2.13.0+cpu")
        assert gpus.visible_gpus() == []

    @pytest.mark.parametrize("script", ["echo 'no devices were found'; exit 6", "exec sleep 60"], ids=["error", "hang"])
    def test_broken_driver(self, script: str, _driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: PT019
        _driver.write_text(f"#!/bin/sh\n{script}\n")
        monkeypatch.setattr(gpus, "TIMEOUT_S", 0.5)
        assert gpus.visible_gpus() == []


class TestSameDecisionAsRanks:
    """The plan's device is the ranks' device for any request, number of GPUs and number of ranks."""

    @pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
    @pytest.mark.parametrize("count", [0, 1, 2, 4])
    def test_agrees(self, device: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpus, "visible_gpus", lambda: [H100] * count)
        config = from_mapping({"device": device, "parallel": {"pp": 2}})
        planned = gpus.cuda_device_name(config)
        if device == "cuda" and count < 2:
            with pytest.raises(ConfigError) as caught:
                use_cuda_for(device, local_ranks=config.world_size, gpus=count)
            for part in ("2 ranks", f"which has {count}", "device=cpu"):
                assert part in str(caught.value), f"{str(caught.value)!r} lacks {part!r}"
            return
        trained = use_cuda_for(device, local_ranks=config.world_size, gpus=count)
        assert (planned is not None) == trained, f"planned for {planned}, ranks use CUDA: {trained}"
