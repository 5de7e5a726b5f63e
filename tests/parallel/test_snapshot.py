"""Which checkpoint a run continues from, in a world of one rank and with an engine that has no parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_mtp.checkpoint.format import TensorSlice
from dist_mtp.checkpoint.save import save
from dist_mtp.config import Config, from_mapping, to_dict
from dist_mtp.errors import CheckpointError
from dist_mtp.snapshot import CHECKPOINTS, restore_newest

pytestmark = pytest.mark.usefixtures("world_of_one")
MESH: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
ENGINE: Any = SimpleNamespace(
    weights_changed=lambda: None,
    all_fragments=list,
    named_parameters=list,
    model=nn.Module(),
    set_optimizer_step=lambda step: None,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return from_mapping({"run": {"dir": str(tmp_path / "run")}})


def save_step(config: Config, step: int) -> Path:
    """A checkpoint as a run of ``config`` writes it, with one small tensor."""
    return save(
        Path(config.run_dir) / CHECKPOINTS,
        step=step,
        run_id="run",
        rank=0,
        world_size=1,
        slices=[TensorSlice("param", "model.norm.weight", (4,), 0, torch.arange(4.0) + step)],
        state={"rows_per_step": config.rows_per_step, "corpus": "corpus", "config": to_dict(config)},
        barrier=lambda: None,
        keep=9,
    )


def damage(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def restore(config: Config, told: list[str] | None = None) -> int:
    messages: list[str] = [] if told is None else told
    return restore_newest(config, ENGINE, MESH, corpus="corpus", report=messages.append)


class TestAuto:
    """``auto`` takes the newest intact checkpoint, and never trains over a folder whose checkpoints are all damaged."""

    def test_nothing_to_resume(self, config: Config) -> None:
        assert restore(config) == 0

    def test_newest(self, config: Config) -> None:
        save_step(config, 1)
        save_step(config, 2)
        assert restore(config) == 2

    def test_falls_back_loudly(self, config: Config) -> None:
        save_step(config, 1)
        damage(save_step(config, 2))
        told: list[str] = []
        assert restore(config, told) == 1
        assert any("step_00000002" in line for line in told), told

    def test_interrupted_replacement(self, config: Config) -> None:
        """A kill between the two renames that replace a step leaves it under another name."""
        path = save_step(config, 3)
        path.rename(path.with_name(path.name + ".old"))
        assert restore(config) == 3

    def test_all_damaged(self, config: Config) -> None:
        damage(save_step(config, 1))
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
            restore(config)


class TestNamed:
    """``resume=FOLDER`` starts a run from there, once: repeated, the command continues what it began. The checkpoint must be
    intact and from the same model, data and order of samples."""

    @pytest.fixture
    def branch(self, config: Config, tmp_path: Path) -> Config:
        """Another run, started from step 2 of the first."""
        path = save_step(config, 2)
        return dataclasses.replace(
            config, resume=str(path), run=dataclasses.replace(config.run, dir=str(tmp_path / "branch"))
        )

    def test_starts_there(self, branch: Config) -> None:
        assert restore(branch) == 2

    def test_repeated(self, branch: Config) -> None:
        save_step(branch, 5)
        told: list[str] = []
        assert restore(branch, told) == 5
        assert any("checkpoints of its own" in line for line in told), told

    def test_damaged(self, branch: Config) -> None:
        damage(Path(branch.resume))
        with pytest.raises(CheckpointError, match="SHA-256"):
            restore(branch)

    @pytest.mark.parametrize(
        ("section", "key", "value", "named"),
        [
            ("model", "rope_theta", 500000.0, "model.rope_theta 10000.0 -> 500000.0"),
            ("train", "seq_len", 48, "train.seq_len 128 -> 48"),
            ("train", "micro_batches", 5, "16 rows per step, this run has 20"),
        ],
    )
    def test_other_settings(self, branch: Config, section: str, key: str, value: float, named: str) -> None:
        changed = dataclasses.replace(getattr(branch, section), **{key: value})
        with pytest.raises(CheckpointError, match=named):
            restore(dataclasses.replace(branch, **{section: changed}))

    def test_free_settings(self, branch: Config) -> None:
        optim = dataclasses.replace(branch.optim, lr=1e-5)
        assert restore(dataclasses.replace(branch, optim=optim)) == 2
