"""What autograd keeps of one token from forward to backward, in bytes, as closed formulas.

A block keeps its inputs; its output is kept by who reads it. A tensor counts once however many functions keep it, and whole
where a function keeps a part of it. Weights, and what all layers of a microbatch share, do not count.

Under ``precision=fp8`` every linear layer counts as one in FP8: ``precision.fp8_keep_bf16`` is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.config import Config

TILE = 128
"""Values that share a scale of 4 bytes, and the whole number of rows or columns that quantised matrices have
(``dist_mtp/precision/fp8/tiles.py``; its import takes torch, which plans do without)."""
_BYTES_PER_VALUE = 1 + 4 / TILE


def bytes_per_element(config: Config) -> int:
    """Bytes of one activation."""
    return 4 if config.precision.name == "fp32" else 2


def attention_half(config: Config) -> float:
    """``input_layernorm`` and latent attention.

    The attention core is that of fused kernels. Where torch has none, as on CPUs for values narrower than queries, it keeps
    all scores, too.
    """
    m, keeps = config.model, _Keeps.under(config)
    queries = m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    values = m.num_attention_heads * m.v_head_dim
    # Values are a part of what kv_b_proj computes, keys without rotation the other, copied into the keys.
    projected = m.num_attention_heads * m.qk_nope_head_dim + values
    total = keeps.norm(m.hidden_size) + keeps.linear_input(m.hidden_size)
    if m.q_lora_rank is not None:
        total += keeps.norm(m.q_lora_rank) + keeps.linear_input(m.q_lora_rank)
    # The norm's input is a part of what kv_a_proj_with_mqa computes, the rotary key the other.
    total += keeps.norm(m.kv_lora_rank + m.qk_rope_head_dim) + keeps.linear_input(m.kv_lora_rank)
    # Queries, keys, values, output; the mask, which kernels take in the precision of the activations; log-sum-exp in fp32.
    total += keeps.activation(2 * queries + projected + values + config.train.seq_len) + 4 * m.num_attention_heads
    return total + keeps.linear_input(values)  # kernels write [B, H, T, ..], o_proj reads [B, T, H, ..]


def dense_half(config: Config) -> float:
    """``post_attention_layernorm`` and a SwiGLU layer."""
    m, keeps = config.model, _Keeps.under(config)
    return keeps.norm(m.hidden_size) + keeps.linear_input(m.hidden_size) + keeps.swiglu(m.intermediate_size)


def moe_half(config: Config) -> float:
    """``post_attention_layernorm``, router, routed experts, equally loaded, and shared ones.

    In FP8 each expert's rows are padded to whole tiles: GPUs make room for one tile more per expert, whatever its load.
    """
    m, keeps = config.model, _Keeps.under(config)
    top_k, hidden, inner = m.num_experts_per_tok, m.hidden_size, m.moe_intermediate_size
    total = keeps.norm(hidden) + keeps.activation(hidden)  # the router's input
    # Scores in fp32; of each choice the expert and the place of its row (int64), its score and its weight (fp32).
    total += 4 * m.n_routed_experts + top_k * (8 + 8 + 4 + 4)
    total += top_k * (keeps.linear_input(hidden) + keeps.swiglu(inner) + keeps.activation(hidden))
    if keeps.in_fp8:
        tokens = config.train.micro_batch_size * config.train.seq_len
        total += keeps.linear_input(hidden) * TILE * config.experts_per_rank / tokens
    if m.n_shared_experts:
        # In BF16 they read what the router keeps.
        total += keeps.swiglu(inner * m.n_shared_experts) + (keeps.linear_input(hidden) if keeps.in_fp8 else 0)
    return total


def mtp_joint(config: Config) -> float:
    """``enorm``, ``hnorm``, ``eh_proj`` and ``shared_head.norm``: an MTP module without its layer."""
    hidden, keeps = config.model.hidden_size, _Keeps.under(config)
    return 3 * keeps.norm(hidden) + keeps.linear_input(2 * hidden)


def heads(config: Config) -> float:
    """The final norm, and of each of the D + 1 heads the gradient of its input, which the loss has computed already."""
    hidden, keeps = config.model.hidden_size, _Keeps.under(config)
    return keeps.norm(hidden) + (config.mtp.depth + 1) * keeps.activation(hidden)


@dataclass(frozen=True)
class _Keeps:
    """Bytes of one row. ``element``: of one activation."""

    element: int
    in_fp8: bool

    @staticmethod
    def under(config: Config) -> _Keeps:
        return _Keeps(bytes_per_element(config), config.precision.name == "fp8")

    def activation(self, width: int) -> float:
        return self.element * width

    def norm(self, width: int) -> float:
        """Its input, and one fp32 number."""
        return self.activation(width) + 4

    def linear_input(self, width: int) -> float:
        """Input of one or several linear layers; in FP8 a copy in column tiles."""
        return _BYTES_PER_VALUE * width if self.in_fp8 else self.activation(width)

    def swiglu(self, width: int) -> float:
        """Gate, up and their product; in FP8 gate and up in row tiles only."""
        return 2 * _BYTES_PER_VALUE * (width + -width % TILE) if self.in_fp8 else 3 * self.activation(width)
