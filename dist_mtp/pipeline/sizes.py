"""Sizes of the model's building blocks: parameters, FLOPs and saved activations, as closed formulas.

Sizes are those of the whole model, however its experts are spread over ranks. Parameters are exact. FLOPs count matrix
multiplications only, 2*m*n*k each. H is the hidden size, V the vocabulary, T the row length, E and K the experts in total
and per token; the blocks are those of the DeepSeek-V3 report (arXiv 2412.19437, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_mtp.config import Config, ModelConfig


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
    saved_elements: float = 0.0
    """Numbers that autograd keeps from forward to backward, in the precision of the activations."""
    expert_params: int = 0
    """Those of ``params`` that belong to routed experts, which expert parallelism divides among ranks."""
    moe_layers: int = 0
    """Times that a token goes to K routed experts and back."""

    def __add__(self, other: BlockSize) -> BlockSize:
        return BlockSize(
            self.params + other.params,
            self.weight_flops + other.weight_flops,
            self.core_flops + other.core_flops,
            self.loss_flops + other.loss_flops,
            self.saved_elements + other.saved_elements,
            self.expert_params + other.expert_params,
            self.moe_layers + other.moe_layers,
        )


def embedding(config: Config) -> BlockSize:
    """Embedding [V, H]. A lookup multiplies nothing; it is counted as 2*H so that its stage is not free."""
    hidden = config.model.hidden_size
    return BlockSize(params=config.vocab_size * hidden, weight_flops=2.0 * hidden, saved_elements=1)


def attention_half(config: Config) -> BlockSize:
    """``input_layernorm`` and multi-head latent attention (equations 1-11), rows fully causal.

    A token attends to T/2 positions on average, so scores and values take T/2 * 2 * heads * (qk + v) FLOPs.
    """
    m = config.model
    qk_head = m.qk_nope_head_dim + m.qk_rope_head_dim
    queries, values = m.num_attention_heads * qk_head, m.num_attention_heads * m.v_head_dim
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    if m.q_lora_rank is None:
        query_weights, query_norm, query_saved = m.hidden_size * queries, 0, queries
    else:
        query_weights = m.q_lora_rank * (m.hidden_size + queries)
        query_norm, query_saved = m.q_lora_rank, queries + 2 * m.q_lora_rank
    weights = (
        query_weights
        + m.hidden_size * latent
        + m.kv_lora_rank * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
        + values * m.hidden_size
    )
    return BlockSize(
        params=weights + m.hidden_size + query_norm + m.kv_lora_rank,
        weight_flops=2.0 * weights,
        core_flops=1.0 * config.train.seq_len * (queries + values),
        # Input and its norm; queries; latent and its norm; keys, values and the core's output.
        saved_elements=2 * m.hidden_size + query_saved + latent + m.kv_lora_rank + queries + 2 * values,
    )


def dense_half(model: ModelConfig) -> BlockSize:
    """``post_attention_layernorm`` and a SwiGLU feed-forward layer: gate, up, down."""
    weights = 3 * model.hidden_size * model.intermediate_size
    return BlockSize(
        params=weights + model.hidden_size,
        weight_flops=2.0 * weights,
        # Input and its norm; gate, up and their product.
        saved_elements=2 * model.hidden_size + 3 * model.intermediate_size,
    )


def moe_half(model: ModelConfig) -> BlockSize:
    """``post_attention_layernorm``, router, E routed experts and the shared ones (equations 12-15).

    ``e_score_correction_bias`` is a buffer, not a parameter.
    """
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    routed, shared = expert * model.n_routed_experts, expert * model.n_shared_experts
    router = model.n_routed_experts * model.hidden_size
    active_experts = model.num_experts_per_tok + model.n_shared_experts
    return BlockSize(
        params=routed + shared + router + model.hidden_size,
        weight_flops=2.0 * (model.num_experts_per_tok * expert + shared + router),
        # Input and its norm; router scores; per routed copy input and output; per active expert gate, up, product.
        saved_elements=2 * model.hidden_size
        + model.n_routed_experts
        + 2 * model.num_experts_per_tok * model.hidden_size
        + 3 * active_experts * model.moe_intermediate_size,
        expert_params=routed,
        moe_layers=1,
    )


def feed_forward_half(model: ModelConfig, layer: int) -> BlockSize:
    """The feed-forward half of trunk layer ``layer``."""
    return moe_half(model) if model.is_moe_layer(layer) else dense_half(model)


def mtp_module(config: Config) -> BlockSize:
    """One MTP module without embedding and head: enorm, hnorm, eh_proj [H, 2H], a layer, shared_head.norm.

    Equations 21-23; the block is of the kind of the trunk's last layer unless ``mtp.block=dense``.
    """
    model = config.model
    dense = config.mtp.block == "dense"
    feed_forward = dense_half(model) if dense else feed_forward_half(model, model.num_layers - 1)
    hidden = model.hidden_size
    joint = BlockSize(
        params=3 * hidden + 2 * hidden * hidden,
        weight_flops=4.0 * hidden * hidden,
        # Embedding and hidden state, both normed side by side, and the input of the last norm.
        saved_elements=5 * hidden,
    )
    return joint + attention_half(config) + feed_forward


def head(config: Config) -> BlockSize:
    """Final norm, head and MTP modules: the unit that is never split, as its D + 1 losses share one head.

    With ``mtp.share_depths`` the one module is computed D times.
    """
    model, depth = config.model, config.mtp.depth
    hidden = model.hidden_size
    module = mtp_module(config)
    modules = min(depth, 1) if config.mtp.share_depths else depth
    projection = 0 if model.tie_word_embeddings else config.vocab_size * hidden
    return BlockSize(
        params=hidden + projection + modules * module.params,
        weight_flops=depth * module.weight_flops,
        core_flops=depth * module.core_flops,
        loss_flops=2.0 * (depth + 1) * hidden * config.vocab_size,
        # Input of the final norm; per head its input and the gradient that the loss has computed already.
        saved_elements=hidden + 2 * (depth + 1) * hidden + depth * module.saved_elements,
        expert_params=modules * module.expert_params,
        moe_layers=depth * module.moe_layers,
    )
