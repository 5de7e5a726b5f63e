"""A real two-rank run computes the losses and gradients that the formulas ask for, recomputed in float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.reference import TOLERANCE, Comparison, Dump, Reference, compare, load_config, load_dump
from torch import Tensor

TIMEOUT_S = 300

OVERRIDES = (
    "model.num_layers=2",
    "moe.bias_update_speed=0.02",  # large enough to change choices by step 3
    "mtp.depth=2",
    "parallel.pp=2",
    "pipeline.placement=v",
    "train.steps=3",
    "train.seq_len=32",
    "train.micro_batch_size=2",
    "optim.warmup_steps=0",  # norm weights leave 1 by step 3
    "optim.lr=0.003",
    "debug.dump_steps=[1,3]",
    "eval.every=0",
    "eval.batches=1",
    "checkpoint.every=0",
    "monitor.tensorboard=false",
)


def write_documents(folder: Path) -> None:
    """Sixty documents of 5 to 200 characters, most of them shorter than a row."""
    generator = random.Random(7)
    folder.mkdir()
    for index in range(60):
        length = generator.randint(5, 200) if index % 6 == 0 else generator.randint(5, 30)
        (folder / f"{index:02d}.txt").write_text("".join(generator.choices("etaoin shrdlu", k=length)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The reference's matrices are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run on two ranks, in float32 on the CPU."""
    folder = tmp_path_factory.mktemp("oracle")
    write_documents(folder / "documents")
    paths = ("data=text", f"data.path={folder}/documents", f"data.cache_dir={folder}/data", f"run.dir={folder}/run")
    finished = subprocess.run(
        [sys.executable, "-m", "dist_mtp", "train", *OVERRIDES, *paths],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, f"exit code {finished.returncode}, expected 0\n{output[-4000:]}"
    return folder / "run"


@pytest.fixture(scope="module")
def config(run_dir: Path) -> dict[str, Any]:
    return load_config(run_dir)


@pytest.fixture(scope="module")
def dump(run_dir: Path) -> Dump:
    """Step 3: the router biases and norm weights have left their initial values."""
    return load_dump(run_dir, 3)


def differences(comparison: Comparison) -> str:
    lead = f"smallest lead of a chosen expert {comparison.selection_margin:.1e} (below 1e-6 a tie explains it)"
    return "\n".join(["", *map(str, comparison.losses + comparison.gradients[:5]), lead])


@pytest.mark.parametrize("step", [1, 3])
def test_run_matches_the_reference(run_dir: Path, config: dict[str, Any], step: int) -> None:
    """Each loss and each parameter's whole gradient equals the reference's, relatively to 2e-5."""
    comparison = compare(load_dump(run_dir, step), config, step)
    worst = comparison.worst
    assert comparison.agrees, f"{worst.name}: {worst.relative:.2e} > {TOLERANCE:.0e}{differences(comparison)}"


def test_documents_end_inside_rows(dump: Dump) -> None:
    """The batch shows what happens at document boundaries: there are some in the rows it compares."""
    documents = dump["batch/document_ids"]
    found = int((documents[:, 1:] != documents[:, :-1]).sum())
    assert found >= 4, f"{found} boundaries in {len(documents)} rows, at least 4 needed"


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"],
)
def test_a_perturbed_gradient_is_detected(dump: Dump, config: dict[str, Any], name: str) -> None:
    """An error of 1e-3 of one gradient tensor's norm is reported, in its size, for that tensor."""
    gradient = dump[f"grad/{name}"]
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    perturbed = dump | {f"grad/{name}": gradient + 1e-3 * gradient.norm() / noise.norm() * noise}
    comparison = compare(perturbed, config, step=3)
    worst = comparison.worst
    assert worst.name == name, f"blamed {worst.name}, perturbed {name}"
    assert worst.relative == pytest.approx(1e-3, rel=0.1), f"found {worst.relative:.2e}, perturbed by 1e-3"


@pytest.mark.parametrize("key", ["grad/model.layers.3.eh_proj.weight", "loss/mtp_2"])
def test_a_missing_tensor_is_detected(dump: Dump, config: dict[str, Any], key: str) -> None:
    """What the run leaves out counts as infinitely wrong."""
    name = key.split("/", 1)[1]
    worst = compare({k: tensor for k, tensor in dump.items() if k != key}, config, step=3).worst
    assert (worst.name, worst.relative) == (name, float("inf")), f"found {worst}, left out {name}"


class HiddenFirst(Reference):
    """``eh_proj`` reads [hidden, embedding], as equation 21 is written."""

    def concatenate(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, embedding], dim=-1)


class TargetsNotShifted(Reference):
    """Each depth predicts the token that it has just read."""

    def target_losses(self, hidden: Tensor, row: int, shift: int) -> Tensor:
        return super().target_losses(hidden, row, max(shift - 1, 1))


class TargetsAcrossDocuments(Reference):
    def is_target(self, documents: Tensor, position: int, shift: int) -> bool:
        return True


class AttentionAcrossDocuments(Reference):
    def may_attend(self, documents: Tensor) -> Tensor:
        return super().may_attend(torch.zeros_like(documents))


class RotaryHalves(Reference):
    """Pairs (j, j + R/2), as in Llama, in place of (2j, 2j + 1)."""

    def rotate(self, x: Tensor) -> Tensor:
        return super().rotate(torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(1))


class ChoiceWithoutBias(Reference):
    def choose(self, affinity: Tensor, bias: Tensor) -> list[int]:
        return super().choose(affinity, torch.zeros_like(bias))


class WeightNotDivided(Reference):
    """The sum over depths in place of their mean."""

    def loss_weight(self, step: int) -> float:
        return super().loss_weight(step) * self.mtp["depth"]


@pytest.mark.parametrize(
    "mistaken",
    [
        HiddenFirst,
        TargetsNotShifted,
        TargetsAcrossDocuments,
        AttentionAcrossDocuments,
        RotaryHalves,
        ChoiceWithoutBias,
        WeightNotDivided,
    ],
)
def test_a_mistaken_formula_is_detected(dump: Dump, config: dict[str, Any], mistaken: type[Reference]) -> None:
    """The run tells these readings of the formulas from the right one: by far more than the tolerance."""
    worst = compare(dump, config, 3, reference=mistaken).worst
    assert worst.relative > 100 * TOLERANCE, f"{worst.relative:.2e} is not above {100 * TOLERANCE:.0e}: {worst}"


@pytest.mark.parametrize(("key", "value"), [("hidden", "pre_norm"), ("normalize", "paper"), ("share_depths", True)])
def test_another_setting_is_detected(dump: Dump, config: dict[str, Any], key: str, value: object) -> None:
    """The dump of one setting of ``mtp.*`` does not pass as another."""
    worst = compare(dump, {**config, "mtp": {**config["mtp"], key: value}}, step=3).worst
    assert worst.relative > 100 * TOLERANCE, f"{worst.relative:.2e} is not above {100 * TOLERANCE:.0e}: {worst}"
