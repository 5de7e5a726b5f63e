"""dist_mtp's modules as layers of a DeepSpeed pipeline, with the weights and names that they have in dist_mtp.

Between layers travels ``(hidden, tokens)``: hidden states [B, T, D], and int64 [B, 2, T+1+D], token ids and document ids.
"""

from __future__ import annotations

import re
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.model.attention import AttentionContext
from dist_mtp.model.init import initialize
from dist_mtp.model.transformer import EMBED, HEAD, LanguageModel, MicroBatch

_PREFIX = re.compile(r"(tied_modules\.\w+|\d+)\.")
"""What DeepSpeed puts before a parameter's name."""


def deepspeed_layers(config: Config, coefficients: list[float]) -> list[Any]:
    """Embedding, whole layers, the second use of the embedding, head with all MTP modules."""
    embed, lookup = (
        TiedLayerSpec(EMBED, EmbeddingLayer, config, forward_fn=use, tied_weight_attr="model.embed_tokens.weight")
        for use in (None, look_up_mtp)
    )
    trunk = [LayerSpec(TrunkLayer, config, index) for index in range(config.model.num_layers)]
    return [embed, *trunk, lookup, LayerSpec(HeadLayer, config, coefficients)]


def parameter_name(name: str) -> str:
    """dist_mtp's name of a parameter of DeepSpeed's module."""
    return _PREFIX.sub("", name, count=1)


class EmbeddingLayer(LanguageModel):
    def __init__(self, config: Config) -> None:
        super().__init__(config, {EMBED})
        initialize(self, seed=config.train.seed, std=config.model.initializer_range)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.shifted(tokens, 0), tokens

    def shifted(self, tokens: Tensor, shift: int) -> Tensor:
        """Embeddings of tokens ``i + shift``: [B, T, D]."""
        embedded: Tensor = self.model.embed_tokens(tokens[:, 0, shift : shift + self.config.train.seq_len])
        return embedded


def look_up_mtp(layer: EmbeddingLayer, x: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """On the last stage, ``x`` and the embeddings that MTP reads, one [B, T, D] per depth."""
    return (*x, *(layer.shifted(x[1], depth) for depth in range(1, layer.num_depths + 1)))


class TrunkLayer(LanguageModel):
    """Both halves of a layer."""

    def __init__(self, config: Config, index: int) -> None:
        self.halves = [f"layers.{index}.{half}" for half in ("attention", "feed_forward")]
        super().__init__(config, self.halves)
        initialize(self, seed=config.train.seed, std=config.model.initializer_range)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, tokens = x
        batch = _micro_batch(tokens, self.config, [])
        for half in self.halves:
            hidden = self.run_unit(half, hidden, batch)
        return hidden, tokens


class HeadLayer(LanguageModel):
    """Final norm, head and MTP modules on looked up embeddings; returns the microbatch's part of the loss."""

    def __init__(self, config: Config, coefficients: list[float]) -> None:
        super().__init__(config, {HEAD})
        del self.model.embed_tokens
        self.coefficients = coefficients
        self.looked_up: list[Tensor] = []
        initialize(self, seed=config.train.seed, std=config.model.initializer_range)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        hidden, tokens, *self.looked_up = x
        # Adding the head's gradient in the forward is right here, too: DeepSpeed divides the loss by the number of
        # microbatches, after it was multiplied by that.
        loss, _ = self.run_head(
            hidden, _micro_batch(tokens, self.config, self.coefficients), accumulate_in_forward=self.training
        )
        self.looked_up = []
        return loss

    def embed(self, batch: MicroBatch, shift: int = 0) -> Tensor:
        return self.looked_up[shift - 1]


class _Contexts:
    """What the attention layers of a stage share, made once per microbatch and stage as in dist_mtp."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, AttentionContext] | None = None

    def of(self, tokens: Tensor, config: Config) -> AttentionContext:
        """Layers of a stage see the same ``tokens``; DeepSpeed copies its inputs before every forward of a stage."""
        if self._made is None or self._made[0] is not tokens:
            self._made = tokens, AttentionContext.of(tokens[:, 1, : config.train.seq_len], config.model)
        return self._made[1]


_CONTEXTS = _Contexts()


def _micro_batch(tokens: Tensor, config: Config, coefficients: list[float]) -> MicroBatch:
    return MicroBatch(tokens[:, 0], tokens[:, 1], _CONTEXTS.of(tokens, config), coefficients)
