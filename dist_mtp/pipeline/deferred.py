"""What stays of one token from the input gradient (I) to the weight gradient (W), in bytes, as closed formulas.

Each linear layer leaves its input, once where several layers share it, and the gradient of its output; in FP8 both in column
tiles (``dist_mtp/precision/weight_grads.py``). Inputs that were recomputed are there by then, so this is the same whatever
``pipeline.recompute`` says. Norms, routers, embedding and the heads leave nothing.
"""

from __future__ import annotations

from dist_mtp.config import Config
from dist_mtp.pipeline.saved import Keeps, expert_padding


def attention_half(config: Config) -> float:
    """Latent attention."""
    m, left = config.model, Keeps.under(config).linear_input
    queries = m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    values, keys = m.num_attention_heads * m.v_head_dim, m.num_attention_heads * m.qk_nope_head_dim
    # Of q_a_proj (or q_proj) and kv_a_proj_with_mqa the input; of q_b_proj input and gradient, the latter also of q_proj.
    total = left(m.hidden_size) + left(queries) + (2 * left(m.q_lora_rank) if m.q_lora_rank is not None else 0)
    total += 2 * left(m.kv_lora_rank) + left(m.qk_rope_head_dim) + left(keys + values)
    return total + left(values) + left(m.hidden_size)  # o_proj


def dense_half(config: Config) -> float:
    """A SwiGLU layer."""
    return _swiglu(config, config.model.intermediate_size)


def moe_half(config: Config) -> float:
    """Routed experts, equally loaded, and shared ones."""
    m = config.model
    rows = m.num_experts_per_tok + (expert_padding(config) if Keeps.under(config).in_fp8 else 0)
    shared = _swiglu(config, m.moe_intermediate_size * m.n_shared_experts) if m.n_shared_experts else 0
    return rows * _swiglu(config, m.moe_intermediate_size) + shared


def mtp_module(config: Config) -> float:
    """``eh_proj`` and a layer."""
    left, hidden = Keeps.under(config).linear_input, config.model.hidden_size
    feed_forward = moe_half(config) if config.mtp_is_moe else dense_half(config)
    return left(3 * hidden) + attention_half(config) + feed_forward


def _swiglu(config: Config, width: int) -> float:
    """Input and output's gradient, product, gradients of gate and up."""
    left = Keeps.under(config).linear_input
    return 2 * left(config.model.hidden_size) + 3 * left(width)
