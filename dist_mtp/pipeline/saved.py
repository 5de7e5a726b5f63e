"""What stays of one token from forward to backward, in bytes, as closed formulas.

A block keeps its inputs; its output is kept by who reads it. A tensor counts once however many functions keep it, and whole
where a function keeps a part of it. Weights, and what all layers of a microbatch share, do not count. ``recompute`` says
what is not kept but computed again; under ``units`` the input of a half of a layer, or of an MTP module, is all that is kept.

Under ``precision=fp8`` every linear layer counts as one in FP8: ``precision.fp8_keep_bf16`` is not looked at. Those keep tiles
of their inputs, and none of SwiGLU's products: ``norms`` then drops what routers read and nothing else, ``swiglu`` nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.config import Config
from dist_mtp.recompute import KEEP_ALL, Recompute

TILE = 128
"""Values that share a scale of 4 bytes, and the whole number of rows or columns that quantised matrices have
(``dist_mtp/precision/fp8/tiles.py``; its import takes torch, which plans do without)."""
_BYTES_PER_VALUE = 1 + 4 / TILE


def bytes_per_element(config: Config) -> int:
    """Bytes of one activation."""
    return 4 if config.precision.name == "fp32" else 2


def attention_half(config: Config, recompute: Recompute = KEEP_ALL) -> float:
    """``input_layernorm`` and latent attention.

    The attention core is that of fused kernels. Where torch has none, as on CPUs for values narrower than queries, it keeps
    all scores, too.
    """
    m, keeps = config.model, Keeps.under(config, recompute)
    if recompute.units:
        return keeps.activation(m.hidden_size)
    queries = m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    values = m.num_attention_heads * m.v_head_dim
    # Values are a part of what kv_b_proj computes, keys without rotation the other, copied into the keys.
    projected = m.num_attention_heads * m.qk_nope_head_dim + values
    total = keeps.norm(m.hidden_size) + keeps.normed_input(m.hidden_size)
    if m.q_lora_rank is not None:
        total += keeps.norm(m.q_lora_rank) + keeps.normed_input(m.q_lora_rank)
    # The norm's input is a part of what kv_a_proj_with_mqa computes, the rotary key the other.
    total += keeps.norm(m.kv_lora_rank + m.qk_rope_head_dim) + keeps.normed_input(m.kv_lora_rank)
    if not recompute.mla_up:
        total += keeps.activation(queries + projected)  # keys with what kv_b_proj computes
    if not recompute.mla_up or m.q_lora_rank is None:
        total += keeps.activation(queries)
    # Output; the mask, which kernels take in the precision of the activations; log-sum-exp in fp32.
    total += keeps.activation(values + config.train.seq_len) + 4 * m.num_attention_heads
    return total + keeps.linear_input(values)  # kernels write [B, H, T, ..], o_proj reads [B, T, H, ..]


def dense_half(config: Config, recompute: Recompute = KEEP_ALL) -> float:
    """``post_attention_layernorm`` and a SwiGLU layer."""
    m, keeps = config.model, Keeps.under(config, recompute)
    if recompute.units:
        return keeps.activation(m.hidden_size)
    return keeps.norm(m.hidden_size) + keeps.normed_input(m.hidden_size) + keeps.swiglu(m.intermediate_size)


def moe_half(config: Config, recompute: Recompute = KEEP_ALL) -> float:
    """``post_attention_layernorm``, router, routed experts, equally loaded, and shared ones.

    Rows of routed experts are kept whatever is recomputed: they have travelled, and stand in another order. In FP8 each
    expert's rows are padded to whole tiles: GPUs make room for one tile more per expert, whatever its load.
    """
    m, keeps = config.model, Keeps.under(config, recompute)
    top_k, hidden, inner = m.num_experts_per_tok, m.hidden_size, m.moe_intermediate_size
    if recompute.units:
        return keeps.activation(hidden)
    total = keeps.norm(hidden) + (0 if recompute.norms else keeps.activation(hidden))  # the router's input
    # Scores in fp32; of each choice the expert and the place of its row (int64), its score and its weight (fp32).
    total += 4 * m.n_routed_experts + top_k * (8 + 8 + 4 + 4)
    total += top_k * (keeps.linear_input(hidden) + keeps.swiglu(inner) + keeps.activation(hidden))
    if keeps.in_fp8:
        total += keeps.linear_input(hidden) * expert_padding(config)
    if m.n_shared_experts:
        # In BF16 they read what the router keeps.
        total += keeps.swiglu(inner * m.n_shared_experts) + (keeps.linear_input(hidden) if keeps.in_fp8 else 0)
    return total


def mtp_module(config: Config, recompute: Recompute = KEEP_ALL) -> float:
    """``enorm``, ``hnorm``, ``eh_proj``, a layer and ``shared_head.norm``.

    Under ``units`` its input of the previous depth; the embedding is looked up again. ``mtp.hidden=pre_norm`` keeps less at
    depth 1, whose input the final norm keeps anyway.
    """
    hidden, keeps = config.model.hidden_size, Keeps.under(config, recompute)
    if recompute.units:
        return keeps.activation(hidden)
    feed_forward = moe_half(config, recompute) if config.mtp_is_moe else dense_half(config, recompute)
    joint = 3 * keeps.norm(hidden) + keeps.normed_input(2 * hidden)
    return joint + attention_half(config, recompute) + feed_forward


def heads(config: Config) -> float:
    """The final norm, and of each of the D + 1 heads the gradient of its input, which the loss has computed already."""
    hidden, keeps = config.model.hidden_size, Keeps.under(config)
    return keeps.norm(hidden) + (config.mtp.depth + 1) * keeps.activation(hidden)


def expert_padding(config: Config) -> float:
    """Rows per token that FP8 adds to those of a rank's experts, a tile for each expert."""
    return TILE * config.experts_per_rank / (config.train.micro_batch_size * config.train.seq_len)


@dataclass(frozen=True)
class Keeps:
    """Bytes of one row. ``element``: of one activation."""

    element: int
    in_fp8: bool
    recompute: Recompute = KEEP_ALL

    @staticmethod
    def under(config: Config, recompute: Recompute = KEEP_ALL) -> Keeps:
        return Keeps(bytes_per_element(config), config.precision.name == "fp8", recompute)

    def activation(self, width: int) -> float:
        return self.element * width

    def norm(self, width: int) -> float:
        """Its input, and one fp32 number."""
        return self.activation(width) + 4

    def linear_input(self, width: int) -> float:
        """Input of one or several linear layers; in FP8 a copy in column tiles."""
        return _BYTES_PER_VALUE * width if self.in_fp8 else self.activation(width)

    def normed_input(self, width: int) -> float:
        """The same from a norm."""
        return 0 if self.recompute.norms and not self.in_fp8 else self.linear_input(width)

    def swiglu(self, width: int) -> float:
        """Gate, up and their product; in FP8 gate and up in row tiles only."""
        if self.in_fp8:
            return 2 * _BYTES_PER_VALUE * (width + -width % TILE)
        return (2 if self.recompute.swiglu else 3) * self.activation(width)
