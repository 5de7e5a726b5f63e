"""What Multi-Token Prediction must and must not do to the losses and gradients of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model.model_cases import (
    batch_of,
    build,
    config_of,
    gradients,
    max_difference,
    position_losses,
    random_ids,
    scramble,
    trunk,
)
from torch import Tensor, nn

from dist_mtp.model.targets import shifted_targets
from dist_mtp.model.transformer import LanguageModel, MicroBatch

DENSE: dict[str, Any] = {"n_routed_experts": 0}
EXPERTS: dict[str, Any] = {"first_k_dense_replace": 1}


class TestZeroWeight:
    """With lambda 0 the trunk, the embedding and the head get the gradients of a model without MTP, bit for bit.

    A breach: MTP that changes the main head's sums, or a gradient that reaches the trunk past the loss weight.
    """

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("experts", [False, True])
    def test_gradients(self, depth: int, tied: bool, experts: bool) -> None:
        sizes = {**(EXPERTS if experts else DENSE), "tie_word_embeddings": tied}
        with_mtp, without = build(config_of(depth, **sizes)), build(config_of(0, **sizes))
        ids = random_ids(with_mtp.config)
        documents = torch.tensor([[0] * 5 + [1] * (ids.shape[1] - 5)] * 2)
        length = without.config.row_length
        ours = gradients(with_mtp, batch_of(with_mtp.config, ids, documents, mtp_weight=0.0))
        expected = gradients(without, batch_of(without.config, ids[:, :length], documents[:, :length]))
        assert expected.keys() <= ours.keys(), f"no gradient for {expected.keys() - ours.keys()}"
        for name, grad in expected.items():
            assert grad.abs().max() > 0, f"{name} has no gradient: nothing is compared"
            assert torch.equal(ours[name], grad), f"{name}: differ by {max_difference(ours[name], grad)}"

    def test_positive_weight_reaches_the_trunk(self) -> None:
        """The counterpart: with lambda 0.3 every gradient is another one."""
        model = build(config_of(1, **DENSE))
        ids = random_ids(model.config)
        zero = gradients(model, batch_of(model.config, ids, mtp_weight=0.0))
        some = gradients(model, batch_of(model.config, ids, mtp_weight=0.3))
        same = [name for name in zero if torch.equal(zero[name], some[name])]
        assert not same, f"lambda does not change {same}"


class TestDocuments:
    """Losses of a document do not depend on its neighbours in the row, at any depth; padding never counts.

    A breach: attention or an MTP embedding that looks across a document's end, where a target would count.
    """

    DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 6, [3] * 9 + [4] * 6])

    @pytest.mark.parametrize("experts", [False, True])
    @pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
    @pytest.mark.parametrize("changed", range(5))
    def test_other_documents(self, experts: bool, hidden: str, changed: int) -> None:
        model = build(config_of(2, mtp={"hidden": hidden}, **(EXPERTS if experts else DENSE)))
        scramble(model)
        ids = random_ids(model.config)
        inside = changed == self.DOCUMENTS
        other_ids = torch.where(inside, (ids + 7) % model.config.vocab_size, ids)
        with torch.no_grad():
            before = position_losses(model, batch_of(model.config, ids, self.DOCUMENTS))
            after = position_losses(model, batch_of(model.config, other_ids, self.DOCUMENTS))
        outside = ~inside[:, : model.config.train.seq_len]
        for depth in range(3):
            a, b = before[depth][outside], after[depth][outside]
            same = torch.allclose(a, b, rtol=1e-6, atol=1e-6) if experts else torch.equal(a, b)
            assert same, f"depth {depth}: changing document {changed} changes others: {a} != {b}"
            moved = max_difference(before[depth][~outside], after[depth][~outside])
            assert moved > 0.01, f"depth {depth}: changing document {changed} does not change its own losses"

    def test_padding(self) -> None:
        """Other ids in the padding change nothing, and ids that only occur there get no gradient."""
        model = build(config_of(2, **DENSE))
        documents = torch.tensor([[0] * 5 + [-1] * 10, [1] * 9 + [2] * 3 + [-1] * 3])
        ids = random_ids(model.config) % 50
        only_in_padding = model.config.vocab_size - 1
        padded = ids.masked_fill(documents < 0, only_in_padding)
        results = [gradients(model, batch_of(model.config, each, documents)) for each in (ids, padded)]
        for name in results[0]:
            if name == "model.embed_tokens.weight":
                row = results[1][name][only_in_padding]
                assert not row.any(), f"an id that occurs in the padding only has the gradient {row}"
            assert torch.equal(results[0][name], results[1][name]), f"padding changes the gradient of {name}"
        _, stats = model.run_head(
            trunk(model, batch_of(model.config, ids, documents)), batch_of(model.config, ids, documents)
        )
        expected = [4 + 8 + 2, 3 + 7 + 1, 2 + 6 + 0]
        assert stats.counts.tolist() == expected, f"{stats.counts.tolist()} != {expected}"


PAIRS, PLANTED_DEPTH = 32, 3
VOCAB = 2 * PAIRS


def planted_rows(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Rows of pairs ``x f(x)``: every x in [0, 32) drawn afresh, f a fixed permutation into [32, 64).

    f(x) follows from x alone, and x occurs nowhere else, so depth k can only predict t[i+k+1] = f(t[i+k]) from the
    embedding of token i+k.
    """
    f = PAIRS + torch.randperm(PAIRS, generator=torch.Generator().manual_seed(0))
    x = torch.randint(PAIRS, (rows, (length + 1) // 2), generator=generator)
    return torch.stack((x, f[x]), dim=2).flatten(1)[:, :length]


def train_on_planted(steps: int) -> list[float]:
    """Train a one-layer model, then the mean loss of each head on fresh rows where the target is an f(x)."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "intermediate_size": 32}
    config = config_of(PLANTED_DEPTH, 16, **DENSE, **sizes, vocab_size=VOCAB)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)

    def batch(rows: int) -> MicroBatch:
        return batch_of(config, planted_rows(generator, rows, config.row_length), mtp_weight=float(PLANTED_DEPTH))

    for _ in range(steps):
        one = batch(rows=16)
        model.zero_grad()
        model.run_head(trunk(model, one), one)[0].backward()
        optimizer.step()
    fresh = batch(rows=64)
    targets = shifted_targets(fresh.input_ids, fresh.document_ids, config.train.seq_len, PLANTED_DEPTH)
    with torch.no_grad():
        losses = position_losses(model, fresh)
    return [float(loss[target >= PAIRS].mean()) for loss, target in zip(losses, targets, strict=True)]


class TestPlantedData:
    """Depth k reads the embedding of token i+k and is trained on token i+k+1: it learns what only those tell.

    A breach: embeddings or targets shifted by one, which leave a depth at chance.
    """

    def test_every_depth_learns(self) -> None:
        losses = train_on_planted(200)
        assert max(losses) < 0.1, f"losses of depths 0..3 on determined tokens: {losses}, wanted < 0.1 each"

    def test_one_token_short_stays_at_chance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The test can fail: with the embedding of token i+k-1 no depth but the main head learns anything."""
        embed = LanguageModel.embed
        monkeypatch.setattr(
            LanguageModel, "embed", lambda self, batch, shift=0: embed(self, batch, shift=max(shift - 1, 0))
        )
        main, *depths = train_on_planted(200)
        chance = 0.8 * math.log(VOCAB)
        assert main < 0.1, f"the main head does not read these embeddings: {main}"
        assert min(depths) >= chance, f"losses of depths 1..3: {depths}, wanted >= {chance:.2f} each"


class TestSharedDepths:
    """``mtp.share_depths``: one module at all depths, whose gradient is the sum over the depths."""

    def test_one_module(self) -> None:
        model = build(config_of(3, mtp={"share_depths": True}))
        modules = {id(model.mtp_module(depth)) for depth in (1, 2, 3)}
        assert len(modules) == 1, f"{len(modules)} modules at three depths"
        assert list(model.model.layers) == ["0", "1", "2", "3"], f"layers {list(model.model.layers)}, L=3 and one MTP"

    @pytest.mark.parametrize("experts", [False, True])
    def test_gradient_is_the_sum(self, experts: bool) -> None:
        sizes = EXPERTS if experts else DENSE
        shared = build(config_of(3, mtp={"share_depths": True}, **sizes)).double()
        separate = build(config_of(3, **sizes)).double()
        separate.load_state_dict(
            {
                name: shared.state_dict()[name.replace("layers.4.", "layers.3.").replace("layers.5.", "layers.3.")]
                for name in separate.state_dict()
            }
        )
        ids = random_ids(shared.config)
        one, three = (gradients(model, batch_of(model.config, ids)) for model in (shared, separate))
        for name, grad in one.items():
            if name.startswith("model.layers.3."):
                parts = [three[name.replace("layers.3.", f"layers.{layer}.")] for layer in (3, 4, 5)]
                assert all(part.abs().max() > 0 for part in parts), f"{name}: a depth adds nothing"
                expected = parts[0] + parts[1] + parts[2]
            else:
                expected = three[name]
            difference = max_difference(grad, expected)
            assert difference < 1e-12, f"{name}: differ by {difference}: {grad} != {expected}"


class TestHidden:
    """``mtp.hidden`` chooses what depth 1 reads; the main head does not notice."""

    def test_pre_norm_differs(self) -> None:
        results = []
        for hidden in ("post_norm", "pre_norm"):
            model = build(config_of(1, mtp={"hidden": hidden}))
            scramble(model)
            batch = batch_of(model.config, random_ids(model.config))
            with torch.no_grad():
                results.append(model.head_inputs(trunk(model, batch), batch))
        (main, depth), (other_main, other_depth) = results
        assert torch.equal(main, other_main), f"the main head's input differs by {max_difference(main, other_main)}"
        difference = max_difference(depth, other_depth)
        assert difference > 0.01, f"depth 1 reads the same hidden state in both modes: {difference}"

    def test_pre_norm_with_an_equal_norm_is_the_same(self) -> None:
        """``hnorm`` undoes the scale of the final norm, so with weights of one both modes agree up to epsilon."""
        results = []
        for hidden in ("post_norm", "pre_norm"):
            model = build(config_of(1, mtp={"hidden": hidden}))
            batch = batch_of(model.config, random_ids(model.config))
            with torch.no_grad():
                results.append(model.head_inputs(trunk(model, batch), batch)[1])
        difference = max_difference(*results)
        assert difference < 1e-3, f"{results[0]} != {results[1]} ({difference})"

    def test_depth_2_reads_the_normed_depth_1(self) -> None:
        """In both modes the next depth reads the hidden state after ``shared_head.norm``, the head's own input."""
        for hidden in ("post_norm", "pre_norm"):
            model = build(config_of(2, mtp={"hidden": hidden}))
            scramble(model)
            batch = batch_of(model.config, random_ids(model.config))
            with torch.no_grad():
                inputs = model.head_inputs(trunk(model, batch), batch)
                again = model.mtp_module(2)(inputs[1], model.embed(batch, shift=2), batch.context)
            assert torch.equal(inputs[2], again), f"{hidden}: differ by {max_difference(inputs[2], again)}"


class TestOneEmbedding:
    """Unit 0 and every MTP depth look up the same module, tensor and gradient; so does a tied head.

    A breach: a copy, whose gradient nobody adds to the original's.
    """

    @pytest.mark.parametrize("tied", [False, True])
    def test_same_object(self, tied: bool) -> None:
        model = build(config_of(3, tie_word_embeddings=tied))
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        assert len(embeddings) == 1, f"{len(embeddings)} embeddings"
        used: list[tuple[int, int]] = []
        embeddings[0].register_forward_hook(lambda module, *_: used.append((id(module), module.weight.data_ptr())))
        batch = batch_of(model.config, random_ids(model.config))
        model.head_inputs(trunk(model, batch), batch)
        expected = (id(model.model.embed_tokens), model.model.embed_tokens.weight.data_ptr())
        assert used == [expected] * 4, f"lookups of unit 0 and depths 1..3: {used} != four times {expected}"
        assert not model.holds_replica
        pointers = [p.data_ptr() for p in model.parameters() if p.shape == model.head_weight.shape]
        assert len(pointers) == (1 if tied else 2), f"{len(pointers)} tensors of [V, D]"
        assert (model.head_weight is model.model.embed_tokens.weight) == tied

    def test_gradient_sums_all_lookups(self) -> None:
        """A token that only MTP reads (the row's last inputs) has a gradient, at its depth's targets alone."""
        model = build(config_of(2, seq_len=4, **DENSE))
        ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
        grad = gradients(model, batch_of(model.config, ids))["model.embed_tokens.weight"]
        read = grad.abs().sum(dim=1).nonzero().flatten().tolist()
        # Inputs are tokens 1..4 for the trunk, 2..5 for depth 1, 3..6 for depth 2; token 7 is a target only.
        assert read == [1, 2, 3, 4, 5, 6], f"embedding rows with gradients: {read} != 1..6"
