"""Hugging Face's MoE layers with the weights of ours."""

from __future__ import annotations

from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from dist_mtp.config import Config
from dist_mtp.model.moe import MoE

SETTINGS = (
    "hidden_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)


def hf_layer(ours: MoE, config: Config) -> nn.Module:
    """``DeepseekV3MoE``, or ``DeepseekV2Moe`` for softmax scores; both fuse gate and up projections as we do."""
    settings = {name: getattr(config.model, name) for name in SETTINGS} | {"experts_implementation": "eager"}
    theirs: nn.Module
    if config.model.scoring_func == "sigmoid":
        theirs = DeepseekV3MoE(DeepseekV3Config(**settings))
    else:
        theirs = DeepseekV2Moe(DeepseekV2Config(**settings, topk_method="group_limited_greedy"))
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    return theirs
