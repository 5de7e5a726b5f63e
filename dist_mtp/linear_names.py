"""Names of all linear layers and experts of a configuration's model, without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_mtp.config import Config

OUTPUT_HEAD = "lm_head"


def linear_names(config: Config) -> list[str]:
    """Hugging Face names of the modules that multiply by a weight, the output head left out; a layer's experts are one.

    The router is left out, too: its product is always in fp32.
    """
    trunk = config.model.num_layers
    modules = min(config.mtp.depth, 1) if config.mtp.share_depths else config.mtp.depth
    names = []
    for layer in range(trunk + modules):
        is_moe = config.model.is_moe_layer(layer) if layer < trunk else config.mtp_is_moe
        inside = [*_attention(config), *_feed_forward(config, is_moe=is_moe)]
        if layer >= trunk:
            inside.append("eh_proj")
        names += [f"model.layers.{layer}.{name}" for name in inside]
    return names


def _attention(config: Config) -> list[str]:
    queries = ["q_proj"] if config.model.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    return [f"self_attn.{name}" for name in (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]


def _feed_forward(config: Config, *, is_moe: bool) -> list[str]:
    dense = ("gate_proj", "up_proj", "down_proj")
    if not is_moe:
        return [f"mlp.{name}" for name in dense]
    shared = dense if config.model.n_shared_experts else ()
    return ["mlp.experts", *(f"mlp.shared_experts.{name}" for name in shared)]
