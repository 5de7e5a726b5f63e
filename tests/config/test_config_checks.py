"""Checks of a configuration that need no device: what contradicts itself is refused, with both numbers and the fix."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dist_mtp.config import Config, config_hash, from_mapping, resolve, to_dict
from dist_mtp.config_checks import check
from dist_mtp.errors import ConfigError
from dist_mtp.typed_config import valid_keys


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, leaf = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return values


def refusal(dotted: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(nested(dotted))
    return str(caught.value)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"train.steps": 0}, ["train.steps=0", "at least 1"]),
    ({"model.num_layers": 0}, ["model.num_layers=0", "at least 1"]),
    ({"model.vocab_size": 0}, ["model.vocab_size=0", "at least 1"]),
    ({"model.q_lora_rank": -1}, ["model.q_lora_rank=-1", "at least 1"]),
    ({"model.v_head_dim": 0}, ["model.v_head_dim=0", "at least 1"]),
    ({"model.n_group": 0}, ["model.n_group=0", "at least 1"]),
    ({"parallel.dp": 0}, ["parallel.dp=0", "at least 1"]),
    ({"mtp.depth": -1}, ["mtp.depth=-1", "negative"]),
    ({"optim.lr": -1e-3}, ["optim.lr=-0.001", "negative"]),
    ({"train.hang_timeout_s": 0}, ["train.hang_timeout_s=0", "greater than 0"]),
    ({"optim.eps": 0}, ["optim.eps=0", "greater than 0"]),
    ({"optim.beta2": 1}, ["optim.beta2=1.0", "less than 1"]),
    (
        {"optim.moment_dtype": "bf16", "optim.beta2": 0.999},
        ["optim.beta2=0.999", "0.001 of itself", "0.0039", "at most optim.beta2=0.996", "optim.moment_dtype=fp32"],
    ),
    ({"optim.moment_dtype": "bf16", "optim.beta1": 0.9961}, ["optim.beta1=0.9961", "optim.moment_dtype=bf16"]),
    ({"model.qk_rope_head_dim": 15}, ["model.qk_rope_head_dim=15", "even"]),
    ({"model.n_routed_experts": 9}, ["model.n_routed_experts=9", "model.n_group=2"]),
    ({"model.topk_group": 3}, ["model.topk_group=3", "model.n_group=2"]),
    ({"model.num_experts_per_tok": 5}, ["model.num_experts_per_tok=5", "between 1 and 4", "model.topk_group=1"]),
    (
        {"model.n_routed_experts": 2, "model.num_experts_per_tok": 1},
        ["model.n_group=2", "1 expert per group", "at most 1 groups", "model.group_score=max"],
    ),
    ({"parallel.ep": 3, "parallel.dp": 3}, ["parallel.ep=3", "model.n_routed_experts=8", "one of 1, 2, 4, 8"]),
    (
        {"parallel.ep": 4, "parallel.dp": 6},
        ["parallel.ep=4", "parallel.dp=6", "a multiple of 4", "one of 1, 2"],
    ),
    ({"parallel.ep": 2, "model.n_routed_experts": 0}, ["parallel.ep=2", "no layer with experts", "parallel.ep=1"]),
    (
        {"parallel.ep": 2, "model.first_k_dense_replace": 4, "mtp.depth": 0},
        ["parallel.ep=2", "no layer with experts"],
    ),
    (
        {"parallel.ep": 2, "parallel.dp": 2, "ds": {"zero_optimization": {"contiguous_gradients": False}}},
        ["ds.zero_optimization.contiguous_gradients=false", "parallel.ep=1"],
    ),
    (
        {"parallel.ep": 2, "parallel.dp": 2, "ds": {"zero_optimization": {"reduce_scatter": False}}},
        ["ds.zero_optimization.reduce_scatter=false", "parallel.ep=1"],
    ),
    ({"moe.dispatcher": "deepep"}, ["moe.dispatcher=deepep", "precision=fp32", "precision=bf16", "alltoall"]),
    ({"moe.dispatcher": "deepep", "precision.name": "bf16", "device": "cpu"}, ["device=cpu", "device=cuda"]),
    ({"precision.fp8_dispatch": True}, ["precision.fp8_dispatch=True", "precision=fp32", "set precision=fp8"]),
    ({"precision.name": "bf16", "precision.fp8_backend": "torch"}, ["precision.fp8_backend=torch", "precision=bf16"]),
    ({"precision.name": "bf16", "precision.fp8_keep_bf16": ["*"]}, ["precision.fp8_keep_bf16", "precision=bf16"]),
    (
        {"precision.name": "fp8", "precision.fp8_dispatch": True, "precision.fp8_keep_bf16": ["model.layers.2.*"]},
        ["model.layers.2.mlp.experts", "precision.fp8_dispatch=false"],
    ),
    (
        {"precision.name": "fp8", "precision.fp8_dispatch": True, "moe.dispatcher": "deepep"},
        ["precision.fp8_dispatch=true", "moe.dispatcher=alltoall", "deepep"],
    ),
    (
        {"precision.name": "fp8", "precision.fp8_keep_bf16": ["model.layers.0.*", "*.down_porj"]},
        ["precision.fp8_keep_bf16", "'*.down_porj'", "model.layers.0.self_attn.q_a_proj"],
    ),
    ({"precision.fp8_statistics_every": -1}, ["precision.fp8_statistics_every=-1", "negative"]),
    ({"moe.bias_update_speed_steps": [[100, 0.1], [50, 0]]}, ["moe.bias_update_speed_steps", "[100.0, 50.0]"]),
    ({"moe.bias_update_speed_steps": [[100, -0.1]]}, ["moe.bias_update_speed_steps=[[100,-0.1]]", "negative"]),
    ({"moe.seq_aux_loss_coeff": -1}, ["moe.seq_aux_loss_coeff=-1", "negative"]),
    ({"pipeline.schedule": "1f1b"}, ["pipeline.schedule=1f1b", "pipeline.placement=v", "zbv"]),
    (
        {"pipeline.schedule": "zbv", "pipeline.placement": "last"},
        ["pipeline.schedule=zbv", "pipeline.placement=last", "1f1b"],
    ),
    ({"parallel.pp": 10}, ["parallel.pp=10", "11 pipeline units", "has 10", "model.num_layers to 5"]),
    (
        {"pipeline.schedule": "dualpipev", "train.micro_batches": 3},
        ["pipeline.schedule=dualpipev", "2*parallel.pp = 4", "got 3", "planned"],
    ),
    (
        {"pipeline.schedule": "interleaved_1f1b", "pipeline.placement": "last", "train.micro_batches": 5},
        ["train.micro_batches=5", "2 rounds", "parallel.pp=2"],
    ),
    ({"train.seq_len": 5000}, ["train.seq_len=5000", "model.max_position_embeddings=4096"]),
    ({"data.validation_fraction": 1}, ["data.validation_fraction=1", "between 0 and 1"]),
    ({"data.source": "jsonl"}, ["data.source=jsonl", "data.path"]),
    ({"tokenizer.name": "bpe", "tokenizer.vocab_size": 256}, ["tokenizer.vocab_size=256", "at least 300"]),
    ({"mtp.loss_weight_steps": [[100, 0.1], [50, 0.2]]}, ["mtp.loss_weight_steps", "[100.0, 50.0]"]),
    ({"debug.dump_steps": [0]}, ["debug.dump_steps", "step 0", "train.steps"]),
    ({"train.steps": 5, "debug.dump_steps": [6]}, ["debug.dump_steps", "step 6", "train.steps=5"]),
    ({"launcher.name": "none"}, ["launcher=none", "parallel.pp=2", "2 ranks", "launcher=local"]),
    ({"ds.optimizer.type": "Adam"}, ["ds.optimizer", "optim.*"]),
    ({"ds.zero_allow_untested_optimizer": True}, ["ds.zero_allow_untested_optimizer", "optim.moment_dtype"]),
    ({"ds.gradient_clipping": 1.0}, ["ds.gradient_clipping", "optim.clip_norm"]),
    ({"ds.bf16.enabled": True}, ["ds.bf16", "precision"]),
    ({"ds.zero_optimization.stage": 2}, ["ds.zero_optimization.stage", "stage 1"]),
    ({"ds.zero_optimization.offload_param.device": "cpu"}, ["ds.zero_optimization.offload_param", "ZeRO stage 3"]),
    ({"ds.zero_optimization.cpu_offload": True}, ["ds.zero_optimization.cpu_offload", "not supported"]),
    ({"ds.zero_optimization.overlap_comm": True}, ["ds.zero_optimization.overlap_comm", "remove it"]),
    ({"ds.zero_optimization": None}, ["ds.zero_optimization", "section", "None"]),
    ({"ds.zero_optimization.reduce_bucket_sise": 1}, ["did you mean 'ds.zero_optimization.reduce_bucket_size'?"]),
    ({"ds.reduce_bucket_size": 1}, ["did you mean 'ds.zero_optimization.reduce_bucket_size'?"]),
    ({"ds.flops_profiler.enabled": True}, ["ds.flops_profiler.enabled", "ds.comms_logger.enabled"]),
    ({"ds.wall_clock_breakdown": "yes"}, ["ds.wall_clock_breakdown=yes", "true or false"]),
    ({"ds.wall_clock_breakdown.enabled": True}, ["ds.wall_clock_breakdown.enabled", "did you mean"]),
    ({"ds.steps_per_print": True}, ["ds.steps_per_print=True", "number"]),
    ({"ds.steps_per_print": 0}, ["ds.steps_per_print=0", "greater than 0"]),
    ({"ds.steps_per_print": float("inf")}, ["ds.steps_per_print=inf", "number"]),
    ({"ds.zero_optimization.reduce_bucket_size": 1.5}, ["reduce_bucket_size=1.5", "whole number"]),
    ({"mtp.loss_weight_steps": [[100, -0.1]]}, ["mtp.loss_weight_steps", "-0.1", "negative"]),
    ({"mtp.loss_weight_steps": [[-100, 0.1]]}, ["mtp.loss_weight_steps", "-100", "negative"]),
    ({"optim.min_lr_ratio": 1.5}, ["optim.min_lr_ratio=1.5", "between 0 and 1"]),
    ({"optim.min_lr_ratio": -0.1}, ["optim.min_lr_ratio=-0.1", "between 0 and 1"]),
    ({"model.rope_theta": 1}, ["model.rope_theta=1.0", "greater than 1"]),
    ({"model.rope_scaling.factor": 0.5}, ["model.rope_scaling.factor=0.5", "at least 1"]),
    ({"model.rope_scaling.beta_slow": 0}, ["model.rope_scaling.beta_slow=0", "greater than 0"]),
    ({"model.rope_scaling.beta_fast": -1}, ["model.rope_scaling.beta_fast=-1", "beta_slow=1"]),
    ({"model.rope_scaling.beta_fast": 1}, ["model.rope_scaling.beta_fast=1", "beta_slow=1"]),
    (
        {"model.rope_scaling.original_max_position_embeddings": 0},
        ["model.rope_scaling.original_max_position_embeddings=0", "at least 1"],
    ),
    ({"device": "gpu"}, ["device=gpu", "auto, cpu, cuda"]),
]


class TestContradictions:
    """Whatever cannot work is refused before anything starts; the message names the keys and the numbers."""

    @pytest.mark.parametrize(("dotted", "parts"), REFUSED, ids=[str(dotted) for dotted, _ in REFUSED])
    def test_refused(self, dotted: dict[str, Any], parts: list[str]) -> None:
        text = refusal(dotted)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{text!r} lacks {missing}"

    def test_limits_themselves_are_accepted(self) -> None:
        """One step inside each limit, so that a check that refuses too much is seen as well."""
        accepted: list[dict[str, Any]] = [
            {"parallel.pp": 5},
            {"pipeline.schedule": "dualpipev", "train.micro_batches": 4},
            {"model.num_experts_per_tok": 4},
            {"train.seq_len": 4096},
            {"train.seq_len": 4097, "model.rope_scaling.factor": 2},
            {"model.n_routed_experts": 0, "model.num_experts_per_tok": 99},
            {"tokenizer.name": "bpe", "tokenizer.vocab_size": 300},
            {"debug.dump_steps": [1, 5], "train.steps": 5},
            {"launcher.name": "none", "parallel.pp": 1},
            {"mtp.depth": 0, "optim.lr": 0, "optim.clip_norm": 0, "eval.every": 0, "checkpoint.every": 0},
            {"ds.zero_optimization": {}, "ds.wall_clock_breakdown": True},
            {"ds.zero_optimization.reduce_bucket_size": 5e8, "ds.gradient_predivide_factor": 2},
            {"mtp.loss_weight_steps": [[0, 0]], "optim.min_lr_ratio": 1, "model.rope_scaling.beta_slow": 31.9},
            {"optim.moment_dtype": "bf16", "optim.beta1": 0, "optim.beta2": 1 - 2**-8},
        ]
        for dotted in accepted:
            config = from_mapping(nested(dotted))
            assert isinstance(config, Config), f"{dotted} gave {config!r}"


class TestNames:
    """A name never leads out of the folder it names something in; only ``run.dir`` and ``data.path`` are paths."""

    @pytest.mark.parametrize("key", ["run.name", "model.name", "data.name"])
    @pytest.mark.parametrize(
        "name", ["../../x", "a/b", "/etc", "..", ".", "", " ", "a\nb", "a\x1b[31m", "a\\b", "x\x00", " x", "x "]
    )
    def test_no_paths_in_names(self, key: str, name: str) -> None:
        text = refusal({key: name})
        assert key in text, f"{text!r} does not name {key}"
        assert repr(name) in text, f"{text!r} does not show {name!r}"

    @pytest.mark.parametrize("name", ["two-depths", "tiny d1, lr=1e-3", "läufe", "run.7", "..x"])
    def test_ordinary_names(self, name: str) -> None:
        folder = from_mapping({"run": {"name": name}}).run_dir
        assert folder == f"runs/{name}", f"got {folder!r}, expected 'runs/{name}'"

    def test_folder_may_be_anywhere(self) -> None:
        folder = from_mapping({"run": {"dir": "../elsewhere/x"}}).run_dir
        assert folder == "../elsewhere/x", f"got {folder!r}"

    @pytest.mark.parametrize("folder", ["", " ", "a\nb", "runs/${now:%H}"])
    def test_folder_is_a_plain_path(self, folder: str) -> None:
        text = refusal({"run.dir": folder})
        assert "run.dir" in text, f"{text!r} does not name run.dir"


class TestResolve:
    """``resolve`` derives what was left open, and refuses ranks or vocabularies that do not fit."""

    def test_derives_data_parallel_degree_and_vocabulary(self) -> None:
        config = resolve(from_mapping({}), vocab_size=257, world_size=6)
        assert (config.dp, config.world_size, config.vocab_size) == (3, 6, 257), (
            f"dp {config.dp}, world {config.world_size}, vocabulary {config.vocab_size}; expected 3, 6, 257"
        )

    def test_launcher_starts_one_replica(self) -> None:
        config = resolve(from_mapping({"parallel": {"pp": 4}}), vocab_size=257)
        assert (config.dp, config.world_size) == (1, 4), f"dp {config.dp}, world {config.world_size}; expected 1, 4"

    @pytest.mark.parametrize(
        ("dotted", "world_size", "parts"),
        [
            ({"parallel.pp": 2}, 3, ["3 ranks", "parallel.pp=2", "multiple of 2"]),
            ({"parallel.pp": 2, "parallel.dp": 1}, 4, ["4 ranks", "parallel.pp=2 x parallel.dp=1", "needs 2", "null"]),
            ({"model.vocab_size": 100}, None, ["model.vocab_size=100", "257", "tokenizer=bytes"]),
        ],
        ids=str,
    )
    def test_refused(self, dotted: dict[str, Any], world_size: int | None, parts: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve(from_mapping(nested(dotted)), vocab_size=257, world_size=world_size)
        missing = [part for part in parts if part not in str(caught.value)]
        assert not missing, f"{str(caught.value)!r} lacks {missing}"


class TestHash:
    """Ranks and checkpoints compare configurations by hash, so no key may be left out of it."""

    def test_survives_writing_and_reading(self) -> None:
        config = resolve(from_mapping({"mtp": {"loss_weight_steps": [[1e13, 0.1]]}}), vocab_size=257)
        again = from_mapping(to_dict(config))
        assert again == config, f"{again} differs from {config}"
        assert config_hash(again) == config_hash(config)

    def test_every_key_counts(self) -> None:
        base = to_dict(Config())
        seen = {config_hash(Config()): "nothing"}
        leaves = [key for key, hint in valid_keys(Config).items() if not dataclasses.is_dataclass(hint)]
        assert len(leaves) > 80, f"only {len(leaves)} keys found"
        for key in leaves:
            digest = config_hash(build_unchecked(base, key))
            assert digest not in seen, f"changing {key} gives the hash of changing {seen[digest]}"
            seen[digest] = key


def build_unchecked(base: dict[str, Any], key: str) -> Config:
    """``base`` with another value for ``key``, sensible or not."""
    from dist_mtp.typed_config import build

    *sections, leaf = key.split(".")
    values = _copy(base)
    section = values
    for name in sections:
        section = section[name]
    section[leaf] = _other(section[leaf], valid_keys(Config)[key])
    return build(Config, values)


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _other(value: Any, hint: Any) -> Any:
    from typing import get_args

    choices = get_args(hint)
    if isinstance(value, str) and value in choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {"x": [1, 2, 3] if "tuple[float" in str(hint) else 1}
    if isinstance(value, list):
        return [[1, 1]] if "tuple[float" in str(hint) else [1]
    return 7 if int in choices or float in choices else "seven"  # null


class TestDerivedNumbers:
    """Sizes that the rest of the package reads off the configuration."""

    def test_batch_and_rows(self) -> None:
        config = from_mapping(
            nested(
                {
                    "parallel.dp": 3,
                    "train.micro_batches": 4,
                    "train.micro_batch_size": 5,
                    "train.seq_len": 7,
                    "mtp.depth": 2,
                }
            )
        )
        got = (config.rows_per_step, config.tokens_per_step, config.row_length, config.world_size)
        assert got == (60, 420, 10, 6), f"rows, tokens, row length, ranks are {got}, expected (60, 420, 10, 6)"

    @pytest.mark.parametrize(
        ("placement", "schedule", "stages"), [("v", "zbv", 4), ("last", "1f1b", 2), ("last", "interleaved_1f1b", 6)]
    )
    def test_stages(self, placement: str, schedule: str, stages: int) -> None:
        values = nested({"pipeline.placement": placement, "pipeline.schedule": schedule, "pipeline.stages_per_rank": 3})
        count = from_mapping(values).num_stages
        assert count == stages, f"{placement}/{schedule} has {count} stages, expected {stages}"

    def test_defaults_pass_their_own_checks(self) -> None:
        check(Config())
