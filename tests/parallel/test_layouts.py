"""The same training in every layout: placements, schedules, pipeline and data-parallel degrees, MTP depths."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.parity import (
    ALL_VARIANTS,
    REFERENCE,
    STEPS,
    Layout,
    Variant,
    compare,
    layouts,
    run_dir,
    write_corpus,
)
from support.ranks import run_ranks
from support.worlds import (
    EVALUATED,
    FOUR_RANK_VARIANTS,
    ODD_MICROBATCHES,
    SPECIAL_LAYOUTS,
    SPECIAL_VARIANTS,
    evaluated,
)

CLIP_NORM = 0.5
HIDDEN_BYTES = 1 * 24 * 32 * 4
"""One microbatch's hidden states: [1, 24, 32] in fp32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this module: one launch per number of ranks."""
    path = tmp_path_factory.mktemp("layouts")
    write_corpus(path / "text")
    for world_size in (1, 2, 4):
        run_ranks(f"support.worlds:world_of_{world_size}", world_size, path / f"world_{world_size}", timeout_s=400)
    return path


def run_of(folder: Path, layout: Layout, variant: Variant) -> Path:
    return run_dir(folder / f"world_{layout.pp * layout.dp}", layout, variant)


def assert_equal_training(folder: Path, layout: Layout, variant: Variant, reference: Variant | None = None) -> None:
    difference = compare(run_of(folder, layout, variant), run_of(folder, REFERENCE, reference or variant))
    assert difference.within_bounds(), f"{variant} in {layout} against one process: {difference}"


def facts_of(folder: Path, layout: Layout, variant: Variant) -> list[dict[str, Any]]:
    paths = [folder / "world_2" / "facts" / f"{variant}-{layout}.rank{rank}.json" for rank in range(2)]
    return [json.loads(path.read_text()) for path in paths]


class TestEqualTraining:
    """Three steps give the losses, the clip norm and every gradient of a single process to fp32 rounding. A schedule that
    drops, repeats or reorders a gradient, an embedding whose copies drift, or a loss normalised by local counts shows as a
    difference far above the bounds."""

    @pytest.mark.parametrize("layout", layouts(2), ids=str)
    @pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
    def test_two_ranks(self, folder: Path, layout: Layout, variant: Variant) -> None:
        assert_equal_training(folder, layout, variant)

    @pytest.mark.parametrize("layout", layouts(4), ids=str)
    @pytest.mark.parametrize("variant", FOUR_RANK_VARIANTS, ids=str)
    def test_four_ranks(self, folder: Path, layout: Layout, variant: Variant) -> None:
        assert_equal_training(folder, layout, variant)

    @pytest.mark.parametrize(("layout", "count"), [(k, m) for k, ms in ODD_MICROBATCHES.items() for m in ms], ids=str)
    def test_any_number_of_microbatches(self, folder: Path, layout: Layout, count: int) -> None:
        assert_equal_training(folder, layout, Variant(1, micro_batches=count))

    @pytest.mark.parametrize("layout", SPECIAL_LAYOUTS, ids=str)
    @pytest.mark.parametrize("variant", SPECIAL_VARIANTS, ids=str)
    def test_special_models(self, folder: Path, layout: Layout, variant: Variant) -> None:
        assert_equal_training(folder, layout, variant)

    def test_runs_differ_when_they_should(self, folder: Path) -> None:
        """The comparison can fail: another depth's losses are not within the bounds."""
        difference = compare(run_of(folder, REFERENCE, Variant(1)), run_of(folder, REFERENCE, Variant(1, tied=False)))
        assert difference.gradient == 0, difference
        rows = [
            json.loads((run_of(folder, REFERENCE, v) / "rows.json").read_text())
            for v in (Variant(2), Variant(2, extra=(("mtp.hidden", "pre_norm"),)))
        ]
        assert rows[0][0]["loss_mtp_1"] != rows[1][0]["loss_mtp_1"], rows


class TestEvaluation:
    """Evaluating before every step changes no bit of training, and under every schedule it is the same computation."""

    @pytest.mark.parametrize("layout", layouts(2), ids=str)
    def test_leaves_training_alone(self, folder: Path, layout: Layout) -> None:
        with_evaluation, without = run_of(folder, layout, evaluated(layout)), run_of(folder, layout, EVALUATED)
        for step in (1, STEPS):
            ours, theirs = (load_file(p / "dumps" / f"step_{step}.safetensors") for p in (with_evaluation, without))
            different = [name for name in theirs if not ours[name].equal(theirs[name])]
            assert not different, f"step {step}: evaluation changed {different}"

    def test_agrees_between_layouts(self, folder: Path) -> None:
        losses = {}
        for layout in layouts(2):
            rows = json.loads((run_of(folder, layout, evaluated(layout)) / "rows.json").read_text())
            losses[str(layout)] = rows[0]["eval_loss_main"]  # before the first step all weights are equal bit for bit
        assert len(set(losses.values())) == 1, losses


class TestUpdate:
    """From the dumped gradients of a step, clipping by their joint norm and a textbook AdamW give the parameters that the
    next step starts from; norm weights are not decayed. So what is dumped is what was applied, the norm counts shared
    parameters once, and ZeRO-1 changes nothing."""

    @pytest.mark.parametrize(
        "layout", [REFERENCE, *layouts(2), Layout("v", "zbv", 2, 2), Layout("last", "1f1b", 2, 2)], ids=str
    )
    def test_adamw(self, folder: Path, layout: Layout) -> None:
        run = run_of(folder, layout, Variant(1))
        rows = json.loads((run / "rows.json").read_text())
        dumps = [load_file(run / "dumps" / f"step_{step}.safetensors") for step in range(1, STEPS + 1)]
        moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, (before, after) in enumerate(itertools.pairwise(dumps)):
            row, step = rows[index], index + 1
            gradients = {k.removeprefix("grad/"): v.double() for k, v in before.items() if k.startswith("grad/")}
            norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
            assert abs(norm - row["grad_norm"]) <= 1e-6 * norm, f"norm {row['grad_norm']} logged, {norm} from the dump"
            for name, gradient in gradients.items():
                parameter, clipped = before[f"param/{name}"].double(), gradient * min(1.0, CLIP_NORM / norm)
                m, v = moments.get(name, (torch.zeros_like(clipped), torch.zeros_like(clipped)))
                m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
                moments[name] = m, v
                decay = 0.1 if parameter.dim() > 1 else 0.0
                step_size = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
                expected = parameter - row["lr"] * (decay * parameter + step_size)
                moved = (after[f"param/{name}"].double() - expected).norm() / (expected - parameter).norm().clamp_min(
                    1e-12
                )
                assert moved <= 1e-4, f"step {step} {name}: {moved:.1e} of the update from a textbook AdamW"


class TestSharing:
    """Under V placement rank 0's embedding is one object with one storage, used by stage 0 and every MTP depth, and the
    optimizer has it once; hidden states are all that travels. Under ``last`` the copy on the last rank is extra."""

    @pytest.mark.parametrize("layout", [x for x in layouts(2) if x.placement == "v"], ids=str)
    @pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
    def test_one_embedding(self, folder: Path, layout: Layout, variant: Variant) -> None:
        first, last = facts_of(folder, layout, variant)
        micro_batches = variant.micro_batches
        uses = {"objects": first["embedding_objects"], "storages": first["embedding_storages"]}
        assert uses == {"objects": 1, "storages": 1}, uses
        assert first["embedding_uses"] == micro_batches * (1 + variant.depth), first["embedding_uses"]
        assert first["embeddings_in_optimizer"] == 1, first["embeddings_in_optimizer"]
        assert "embedding_objects" not in last, "the other rank holds an embedding"
        head = "lm_head.weight" in first["optimized_names"]
        assert head is not variant.tied, first["optimized_names"]

    @pytest.mark.parametrize("layout", layouts(2), ids=str)
    def test_only_hidden_states_travel(self, folder: Path, layout: Layout) -> None:
        """Per edge and direction: microbatches x [B, T, D], for 3 training steps, plus forwards of one evaluation."""
        variant = Variant(3)
        sent: dict[str, int] = {}
        for facts in facts_of(folder, layout, variant):
            sent |= facts["bytes_sent"]
        stages = {"v": 4, "last": 4 if "interleaved" in layout.schedule else 2}[layout.placement]
        # In the V, stages 1 and 2 are neighbours on rank 1.
        edges = [(s, s + 1) for s in range(stages - 1) if not (layout.placement == "v" and s == 1)]
        training = STEPS * variant.micro_batches * HIDDEN_BYTES
        expected = {f"{a}->{b}": training for a, b in edges} | {f"{b}->{a}": training for a, b in edges}
        assert sent == expected, f"{sent} sent, {expected} expected"
