"""The same weights, under our names in a safetensors file, give the same numbers in Hugging Face transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model.model_cases import (
    YARN,
    batch_of,
    build,
    config_of,
    logical_parameters,
    max_difference,
    random_ids,
    scramble,
    trunk,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dist_mtp.config import Config
from dist_mtp.model.naming import routers
from dist_mtp.model.transformer import LanguageModel

TOLERANCE = 1e-5
"""fp32 rounding over a few layers; a wrong name, norm, mask or rotation differs by more than 1e-2."""

VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "one_step_queries": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_scaling": YARN},
    "yarn_without_mscale": {"rope_scaling": type(YARN)(4.0, 32, mscale=1.0, mscale_all_dim=0.0)},
    "dense": {"first_k_dense_replace": 3},
    "no_normalised_weights": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "other_epsilon": {"rms_norm_eps": 0.1},
}
SAME_NAME = [
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "rms_norm_eps",
]


def hf_config(config: Config) -> dict[str, Any]:
    model, scaling = config.model, config.model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling.factor > 1:
        rope |= {"rope_type": "yarn", **vars(scaling)}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "float32",
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_attention_heads,
        "num_nextn_predict_layers": config.mtp.depth,
        "max_position_embeddings": 128,
        "rope_parameters": rope,
        **{name: getattr(model, name) for name in SAME_NAME},
    }


def load_in_hf(model: LanguageModel, folder: Path) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """Write our weights under our logical names, load them with ``from_pretrained``."""
    tensors = {name: tensor.contiguous() for name, tensor in logical_parameters(model).items()}
    tensors |= {name: router.e_score_correction_bias for name, router in routers(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    return theirs.eval(), info


def make_model(depth: int, **model: Any) -> LanguageModel:
    ours = build(config_of(depth, **model))
    scramble(ours)
    return ours.eval()


@torch.no_grad()
def trunk_logits(ours: LanguageModel, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    batch = batch_of(ours.config, ids, documents)
    return ours.head_inputs(trunk(ours, batch), batch)[0] @ ours.head_weight.t()


class TestTrunk:
    """Logits of the trunk equal those of ``DeepseekV3ForCausalLM`` loaded from a file with our names.

    A breach: a missing or unexpected key (naming), or logits that differ by far more than rounding.
    """

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_logits(self, variant: str, tmp_path: Path) -> None:
        ours = make_model(0, **VARIANTS[variant])
        theirs, info = load_in_hf(ours, tmp_path)
        assert not info["missing_keys"], f"Hugging Face misses {info['missing_keys']}"
        assert not info["unexpected_keys"], f"Hugging Face does not know {info['unexpected_keys']}"
        ids = random_ids(ours.config)
        logits = trunk_logits(ours, ids)
        expected = theirs(ids[:, :-1]).logits
        difference = max_difference(logits, expected)
        assert expected.abs().max() > 0.5, f"the logits are too small to tell anything: {expected.abs().max()}"
        assert difference <= TOLERANCE, f"{difference} > {TOLERANCE}: ours {logits[0, -1]}, theirs {expected[0, -1]}"

    def test_packed_documents_equal_separate_ones(self, tmp_path: Path) -> None:
        """A document in the middle of a row gives the logits that it gives alone: mask and relative rotation."""
        ours = make_model(0, rope_scaling=YARN)
        theirs, _ = load_in_hf(ours, tmp_path)
        ids = random_ids(ours.config, rows=1)
        documents = torch.tensor([[0] * 4 + [1] * 7 + [2] * 2])
        logits = trunk_logits(ours, ids, documents)
        alone = theirs(ids[:, 4:11]).logits
        difference = max_difference(logits[:, 4:11], alone)
        assert difference <= TOLERANCE, f"{difference} > {TOLERANCE}: ours {logits[0, 10]}, theirs {alone[0, -1]}"


class TestMtp:
    """Depth 1 and 2 give the hidden states of ``MtpModel.forward_layer``, fed with the true next tokens.

    A breach: swapped halves of ``eh_proj``, swapped norms, an unnormed hidden state between depths.
    """

    @pytest.mark.parametrize("variant", ["moe", "one_step_queries", "tied", "yarn"])
    def test_hidden_states(self, variant: str, tmp_path: Path) -> None:
        ours = make_model(2, **VARIANTS[variant])
        theirs, info = load_in_hf(ours, tmp_path)
        num_layers, depth = ours.config.model.num_layers, ours.config.mtp.depth
        prefixes = tuple(f"model.layers.{num_layers + index}." for index in range(depth))
        others = [name for name in info["unexpected_keys"] if not name.startswith(prefixes)]
        assert not info["missing_keys"], f"Hugging Face misses {info['missing_keys']}"
        assert not others, f"Hugging Face does not know {others}, which are not in {prefixes}"
        # The class knows the released model's layer 61 only; MtpModel finds its layers through this attribute.
        theirs._keys_to_ignore_on_load_unexpected = [re.escape(prefix) for prefix in prefixes]
        loaded = MtpModel.from_pretrained(theirs)
        mtp = (loaded[0] if isinstance(loaded, tuple) else loaded).eval()

        ids, seq_len = random_ids(ours.config), ours.config.train.seq_len
        batch = batch_of(ours.config, ids)
        with torch.no_grad():
            inputs = ours.head_inputs(trunk(ours, batch), batch)
            hidden = theirs.model(ids[:, :seq_len]).last_hidden_state
            for k in range(1, depth + 1):
                hidden = mtp.forward_layer(
                    k - 1, hidden, torch.arange(seq_len)[None], None, input_ids=ids[:, k : k + seq_len]
                )
                difference = max_difference(inputs[k], hidden)
                assert difference <= TOLERANCE, f"depth {k}: {difference} > {TOLERANCE}: {inputs[k][0]} != {hidden[0]}"
