"""The model as an ordered list of pipeline units, and the part of it that a rank holds.

A unit is the smallest piece that can be a pipeline stage: the embedding, the two halves of each layer, and the final
norm with the output head and all MTP modules. A rank builds the units of its stages only, under the Hugging Face names
of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.embedding import Embedding
from dist_mtp.model.layer import DecoderLayer, MtpModule, attach_recompute
from dist_mtp.model.loss import HeadStats, head_stats, linear_cross_entropy
from dist_mtp.model.norm import RMSNorm
from dist_mtp.model.targets import shifted_targets
from dist_mtp.precision.linear import Linear
from dist_mtp.precision.recomputation import checkpointed
from dist_mtp.recompute import KEEP_ALL, Recompute

EMBED, HEAD = "embed", "head"


@dataclass(frozen=True)
class MicroBatch:
    """One microbatch as every stage sees it.

    ``input_ids``, ``document_ids``: int64 [B, T+1+D]. ``context``: what attention layers share. ``coefficients``: factor
    of each head's summed loss.
    """

    input_ids: Tensor
    document_ids: Tensor
    context: AttentionContext
    coefficients: list[float]


class Backbone(nn.Module):
    """Container for the parameters below ``model.``."""

    embed_tokens: Embedding
    norm: RMSNorm

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()


class LanguageModel(nn.Module):
    """The units that one rank holds.

    Args:
        config: resolved configuration.
        units: names of the units to build; every unit for a whole model.
        expert_rank: which of the ``parallel.ep`` equal parts of every layer's experts to build.
        recompute: what the backward computes again.
    """

    def __init__(
        self, config: Config, units: Collection[str], *, expert_rank: int = 0, recompute: Recompute = KEEP_ALL
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.first_expert = expert_rank * config.experts_per_rank
        model = config.model
        self.model = Backbone()
        self.num_depths = config.mtp.depth
        holds_head = HEAD in units
        # The head unit embeds the tokens of MTP (and is the embedding, when tied). Where the same rank also holds the
        # first unit this is the very same module: V placement. Elsewhere it is a replica.
        if EMBED in units or (holds_head and (self.num_depths > 0 or model.tie_word_embeddings)):
            self.model.embed_tokens = Embedding(config.vocab_size, model.hidden_size)
        for layer in range(model.num_layers):
            halves = {half: f"layers.{layer}.{half}" in units for half in ("attention", "feed_forward")}
            if any(halves.values()):
                self.model.layers[str(layer)] = DecoderLayer(config, is_moe=model.is_moe_layer(layer), **halves)
        if holds_head:
            self.model.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)
            if not model.tie_word_embeddings:
                self.lm_head = Linear(model.hidden_size, config.vocab_size)
            for index in range(min(self.num_depths, 1) if config.mtp.share_depths else self.num_depths):
                self.model.layers[str(model.num_layers + index)] = MtpModule(config, is_moe=config.mtp_is_moe)
        attach_recompute(self, recompute)
        self.holds_replica = holds_head and EMBED not in units and hasattr(self.model, "embed_tokens")

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D]."""
        weight = self.model.embed_tokens.weight if self.config.model.tie_word_embeddings else self.lm_head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def mtp_module(self, depth: int) -> MtpModule:
        """Module of depth 1..D."""
        index = 0 if self.config.mtp.share_depths else depth - 1
        module = self.model.layers[str(self.config.model.num_layers + index)]
        assert isinstance(module, MtpModule)
        return module

    def unit_modules(self, unit: str) -> list[nn.Module]:
        """Modules whose work belongs to ``unit``. The embedding is left out: it serves several units."""
        if unit == EMBED:
            return []
        if unit == HEAD:
            head = [] if self.config.model.tie_word_embeddings else [self.lm_head]
            return [
                self.model.norm,
                *head,
                *{id(m): m for m in map(self.mtp_module, range(1, self.num_depths + 1))}.values(),
            ]
        _, layer, half = unit.split(".")
        block = self.model.layers[layer]
        assert isinstance(block, DecoderLayer)
        if half == "attention":
            return [block.input_layernorm, block.self_attn]
        return [block.post_attention_layernorm, block.mlp]

    def embed(self, batch: MicroBatch, shift: int = 0) -> Tensor:
        """Embeddings of tokens ``i + shift``: [B, T, D]."""
        seq_len = self.config.train.seq_len
        embedded: Tensor = self.model.embed_tokens(batch.input_ids[:, shift : shift + seq_len])
        return embedded

    def run_unit(self, unit: str, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        """Output of a hidden-state unit, [B, T, D]; ``hidden`` is None for the embedding."""
        if unit == EMBED:
            return self.embed(batch)
        assert hidden is not None
        _, layer, half = unit.split(".")
        block = self.model.layers[layer]
        assert isinstance(block, DecoderLayer)
        if half == "attention":
            return self._whole(block.attention_half, hidden, batch.context)
        return self._whole(block.feed_forward_half, hidden)

    def head_inputs(self, hidden_BTD: Tensor, batch: MicroBatch) -> list[Tensor]:
        """Inputs of the output head, D+1 tensors [B, T, D]: the trunk's normed hidden state, then each MTP depth's."""
        normed = self.model.norm(hidden_BTD)
        previous = normed if self.config.mtp.hidden == "post_norm" else hidden_BTD
        inputs = [normed]
        for depth in range(1, self.num_depths + 1):
            previous = self._whole(self._mtp_hidden, previous, depth, batch)
            inputs.append(previous)
        return inputs

    def _mtp_hidden(self, previous_BTD: Tensor, depth: int, batch: MicroBatch) -> Tensor:
        hidden: Tensor = self.mtp_module(depth)(previous_BTD, self.embed(batch, shift=depth), batch.context)
        return hidden

    def _whole(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """A half of a layer, or an MTP module: what ``recompute.units`` computes again as a whole.

        Never the loss, which leaves gradients behind in its forward.
        """
        return checkpointed(function, *args) if self.recompute.units else function(*args)

    def run_head(
        self, hidden_BTD: Tensor, batch: MicroBatch, *, accumulate_in_forward: bool = False
    ) -> tuple[Tensor, HeadStats]:
        """Final norm, output head and MTP: the scalar loss of this microbatch and its detached statistics.

        ``accumulate_in_forward``: see :func:`dist_mtp.model.loss.linear_cross_entropy`.
        """
        targets = shifted_targets(batch.input_ids, batch.document_ids, self.config.train.seq_len, self.num_depths)
        loss, losses, argmaxes = linear_cross_entropy(
            [x.flatten(0, 1) for x in self.head_inputs(hidden_BTD, batch)],
            self.head_weight,
            targets.flatten(1),
            batch.coefficients,
            chunk=self.config.train.loss_chunk,
            accumulate_in_forward=accumulate_in_forward,
        )
        return loss, head_stats(losses.view_as(targets), argmaxes.view_as(targets), targets)
