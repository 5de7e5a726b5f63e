"""Sizes of the model's building blocks: parameters and FLOPs, as closed formulas, and saved activations (``saved.py``).

Sizes are those of the whole model, however its experts are spread over ranks. Parameters are exact. FLOPs count matrix
multiplications only, 2*m*n*k each, and none twice: recomputation is up to ``costs.py``. H is the hidden size, V the vocabulary, T the row length, E and K the experts in total
and per token; the blocks are those of the DeepSeek-V3 report (arXiv 2412.19437, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_mtp.config import Config
from dist_mtp.pipeline import deferred, saved
from dist_mtp.recompute import KEEP_ALL, Recompute


@dataclass(frozen=True)
class BlockSize:
    """Size of one block. FLOPs and activations are those of one token."""

    params: int = 0
    weight_flops: float = 0.0
    """Forward of linear layers. Input and weight gradient cost the same again each."""
    core_flops: float = 0.0
    """Forward of attention scores and values. The input gradient costs twice that, and there are no weights."""
    loss_flops: float = 0.0
    """Forward of the vocabulary projections. The loss computes both of their gradients inside its forward."""
    saved_bytes: float = 0.0
    """What autograd keeps from forward to backward."""
    deferred_bytes: float = 0.0
    """What linear layers keep from the input gradient to the weight gradient."""
    up_flops: float = 0.0
    """Those of ``weight_flops`` that make queries, keys and values from compressed latents."""
    expert_params: int = 0
    """Those of ``params`` that belong to routed experts, which expert parallelism divides among ranks."""
    moe_layers: int = 0
    """Times that a token goes to K routed experts and back."""
    fp8_params: int = 0
    """Those of ``params`` that belong to linear layers and experts, which ``precision=fp8`` multiplies in FP8."""
    fp8_flops: float = 0.0
    """Those of ``weight_flops`` that ``precision=fp8`` does in FP8."""

    def __add__(self, other: BlockSize) -> BlockSize:
        return BlockSize(
            self.params + other.params,
            self.weight_flops + other.weight_flops,
            self.core_flops + other.core_flops,
            self.loss_flops + other.loss_flops,
            self.saved_bytes + other.saved_bytes,
            self.deferred_bytes + other.deferred_bytes,
            self.up_flops + other.up_flops,
            self.expert_params + other.expert_params,
            self.moe_layers + other.moe_layers,
            self.fp8_params + other.fp8_params,
            self.fp8_flops + other.fp8_flops,
        )


def embedding(config: Config) -> BlockSize:
    """Embedding [V, H]. A lookup multiplies nothing; it is counted as 2*H so that its stage is not free. It keeps int64 ids."""
    hidden = config.model.hidden_size
    return BlockSize(params=config.vocab_size * hidden, weight_flops=2.0 * hidden, saved_bytes=8)


def attention_half(config: Config, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """``input_layernorm`` and multi-head latent attention (equations 1-11), rows fully causal.

    A token attends to T/2 positions on average, so scores and values take T/2 * 2 * heads * (qk + v) FLOPs.
    """
    m = config.model
    qk_head = m.qk_nope_head_dim + m.qk_rope_head_dim
    queries, values = m.num_attention_heads * qk_head, m.num_attention_heads * m.v_head_dim
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    if m.q_lora_rank is None:
        query_weights, query_up, query_norm = m.hidden_size * queries, 0, 0
    else:
        query_weights, query_up, query_norm = m.q_lora_rank * m.hidden_size, m.q_lora_rank * queries, m.q_lora_rank
    up = query_up + m.kv_lora_rank * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
    weights = query_weights + m.hidden_size * latent + up + values * m.hidden_size
    return BlockSize(
        params=weights + m.hidden_size + query_norm + m.kv_lora_rank,
        weight_flops=2.0 * weights,
        up_flops=2.0 * up,
        core_flops=1.0 * config.train.seq_len * (queries + values),
        saved_bytes=saved.attention_half(config, recompute),
        deferred_bytes=deferred.attention_half(config),
        fp8_params=weights,
        fp8_flops=2.0 * weights,
    )


def dense_half(config: Config, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """``post_attention_layernorm`` and a SwiGLU feed-forward layer: gate, up, down."""
    weights = 3 * config.model.hidden_size * config.model.intermediate_size
    return BlockSize(
        params=weights + config.model.hidden_size,
        weight_flops=2.0 * weights,
        saved_bytes=saved.dense_half(config, recompute),
        deferred_bytes=deferred.dense_half(config),
        fp8_params=weights,
        fp8_flops=2.0 * weights,
    )


def moe_half(config: Config, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """``post_attention_layernorm``, router, E routed experts and the shared ones (equations 12-15).

    ``e_score_correction_bias`` is a buffer, not a parameter.
    """
    model = config.model
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    routed, shared = expert * model.n_routed_experts, expert * model.n_shared_experts
    router = model.n_routed_experts * model.hidden_size
    active = model.num_experts_per_tok * expert + shared
    return BlockSize(
        params=routed + shared + router + model.hidden_size,
        weight_flops=2.0 * (active + router),
        saved_bytes=saved.moe_half(config, recompute),
        deferred_bytes=deferred.moe_half(config),
        expert_params=routed,
        moe_layers=1,
        fp8_params=routed + shared,
        fp8_flops=2.0 * active,
    )


def feed_forward_half(config: Config, layer: int, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """The feed-forward half of trunk layer ``layer``."""
    return moe_half(config, recompute) if config.model.is_moe_layer(layer) else dense_half(config, recompute)


def mtp_module(config: Config, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """One MTP module without embedding and head: enorm, hnorm, eh_proj [H, 2H], a layer, shared_head.norm.

    Equations 21-23; the block is of the kind of the trunk's last layer unless ``mtp.block=dense``.
    """
    feed_forward = moe_half(config) if config.mtp_is_moe else dense_half(config)
    hidden = config.model.hidden_size
    joint = BlockSize(
        params=3 * hidden + 2 * hidden * hidden,
        weight_flops=4.0 * hidden * hidden,
        fp8_params=2 * hidden * hidden,
        fp8_flops=4.0 * hidden * hidden,
    )
    return replace(
        joint + attention_half(config) + feed_forward,
        saved_bytes=saved.mtp_module(config, recompute),
        deferred_bytes=deferred.mtp_module(config),
    )


def head(config: Config, recompute: Recompute = KEEP_ALL) -> BlockSize:
    """Final norm, head and MTP modules: the unit that is never split, as its D + 1 losses share one head.

    With ``mtp.share_depths`` the one module is computed D times.
    """
    model, depth = config.model, config.mtp.depth
    hidden = model.hidden_size
    module = mtp_module(config, recompute)
    modules = min(depth, 1) if config.mtp.share_depths else depth
    projection = 0 if model.tie_word_embeddings else config.vocab_size * hidden
    return BlockSize(
        params=hidden + projection + modules * module.params,
        weight_flops=depth * module.weight_flops,
        core_flops=depth * module.core_flops,
        loss_flops=2.0 * (depth + 1) * hidden * config.vocab_size,
        saved_bytes=saved.heads(config) + depth * module.saved_bytes,
        deferred_bytes=depth * module.deferred_bytes,
        up_flops=depth * module.up_flops,
        expert_params=modules * module.expert_params,
        moe_layers=depth * module.moe_layers,
        fp8_params=modules * module.fp8_params,
        fp8_flops=depth * module.fp8_flops,
    )
