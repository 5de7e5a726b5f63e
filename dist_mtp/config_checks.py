"""What a configuration must satisfy beyond types: ranges, and settings that fit each other. Needs no device.

Every message names the key, the numbers and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dist_mtp.errors import ConfigError
from dist_mtp.launcher_checks import check_launcher
from dist_mtp.linear_names import OUTPUT_HEAD, linear_names
from dist_mtp.typed_config import nearest

if TYPE_CHECKING:
    from dist_mtp.config import Config, ModelConfig

V_SCHEDULES = ("planned", "zbv", "dualpipev", "gpipe")
LAST_SCHEDULES = ("planned", "1f1b", "interleaved_1f1b", "gpipe")

DERIVED_DEEPSPEED_KEYS = {
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "gradient_accumulation_steps": "use train.micro_batches",
    "train_batch_size": "use train.micro_batches, train.micro_batch_size and parallel.dp",
    "gradient_clipping": "use optim.clip_norm",
    "optimizer": "use optim.*",
    "zero_allow_untested_optimizer": "use optim.moment_dtype",
    "scheduler": "use optim.warmup_steps and optim.decay_steps",
    "bf16": "use precision",
    "fp16": "use precision=bf16",
    "data_types": "use precision",
    "communication_data_type": "use precision",
    "zero_optimization.stage": "stage 1 is the one that works with a pipeline",
    "zero_optimization.offload_optimizer": "remove it, offloading is not supported",
    "zero_optimization.offload_param": "remove it, it needs ZeRO stage 3",
    "zero_optimization.cpu_offload": "remove it, offloading is not supported",
    "zero_optimization.round_robin_gradients": "remove it, with it DeepSpeed cannot give gradients back in fp32",
    "zero_optimization.overlap_comm": "remove it, gradients are reduced after the last backward, with nothing to overlap",
}
"""Keys of DeepSpeed's configuration that dist_mtp sets itself, and what a user does instead."""

DEEPSPEED_KEYS: dict[str, type] = {
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "steps_per_print": int,
    "comms_logger.enabled": bool,
    "comms_logger.verbose": bool,
    "comms_logger.prof_all": bool,
    "comms_logger.debug": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.reduce_scatter": bool,
}
"""Keys of DeepSpeed's configuration that have an effect here and leave training right; all others are refused."""


def check(config: Config) -> None:
    """Refuse what cannot work, before any process is started.

    Raises:
        ConfigError: names the keys, both numbers and the fix.
    """
    _check_names(config)
    _check_positive(config)
    _check_model(config.model)
    _check_pipeline(config)
    _check_recompute(config)
    _check_experts(config)
    _check_precision(config)
    _check_training(config)
    check_launcher(config)


def _check_names(config: Config) -> None:
    """Names become parts of paths: one that leads out of its folder would let a run write over something else."""
    names = {"model.name": config.model.name, "data.name": config.data.name, "run.name": config.run.name}
    for key, name in names.items():
        if name is None:
            continue
        if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or set(name) & set("/\\"):
            raise ConfigError(
                f"{key}={name!r} must be the name of one folder, without separators, control characters and outer "
                "blanks: shorten it, and choose the place of a run with run.dir"
            )
    folder = config.run.dir
    if folder is not None and (not folder.strip() or not folder.isprintable() or "${" in folder):
        raise ConfigError(f"run.dir={folder!r} must be a plain path, the same for every rank: write it out")


def _check_positive(config: Config) -> None:
    at_least_one = {
        "model.hidden_size": config.model.hidden_size,
        "model.num_layers": config.model.num_layers,
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.kv_lora_rank": config.model.kv_lora_rank,
        "model.qk_nope_head_dim": config.model.qk_nope_head_dim,
        "model.qk_rope_head_dim": config.model.qk_rope_head_dim,
        "model.v_head_dim": config.model.v_head_dim,
        "model.intermediate_size": config.model.intermediate_size,
        "model.moe_intermediate_size": config.model.moe_intermediate_size,
        "model.n_group": config.model.n_group,
        "model.max_position_embeddings": config.model.max_position_embeddings,
        "model.rope_scaling.original_max_position_embeddings": config.model.rope_scaling.original_max_position_embeddings,
        "parallel.pp": config.parallel.pp,
        "parallel.ep": config.parallel.ep,
        "pipeline.stages_per_rank": config.pipeline.stages_per_rank,
        "train.steps": config.train.steps,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.micro_batches": config.train.micro_batches,
        "train.seq_len": config.train.seq_len,
        "train.loss_chunk": config.train.loss_chunk,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.batches": config.eval.batches,
        "monitor.log_every": config.monitor.log_every,
        "launcher.threads_per_rank": config.launcher.threads_per_rank,
    }
    optional = {
        "model.vocab_size": config.model.vocab_size,
        "model.q_lora_rank": config.model.q_lora_rank,
        "parallel.dp": config.parallel.dp,
        "train.rows_per_step": config.train.rows_per_step,
    }
    at_least_one |= {key: value for key, value in optional.items() if value is not None}
    for key, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    not_negative = {
        "mtp.depth": config.mtp.depth,
        "mtp.loss_weight": config.mtp.loss_weight,
        "model.n_routed_experts": config.model.n_routed_experts,
        "model.n_shared_experts": config.model.n_shared_experts,
        "model.first_k_dense_replace": config.model.first_k_dense_replace,
        "optim.lr": config.optim.lr,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.decay_steps": config.optim.decay_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip_norm": config.optim.clip_norm,
        "precision.fp8_statistics_every": config.precision.fp8_statistics_every,
        "moe.bias_update_speed": config.moe.bias_update_speed,
        "moe.seq_aux_loss_coeff": config.moe.seq_aux_loss_coeff,
        "moe.global_aux_loss_coeff": config.moe.global_aux_loss_coeff,
        "moe.z_loss_coeff": config.moe.z_loss_coeff,
        "model.initializer_range": config.model.initializer_range,
        "checkpoint.every": config.checkpoint.every,
        "eval.every": config.eval.every,
    }
    number: float
    for key, number in not_negative.items():
        if number < 0:
            raise ConfigError(f"{key}={number} must not be negative")
    above_zero = {
        "train.hang_timeout_s": config.train.hang_timeout_s,
        "optim.eps": config.optim.eps,
        "model.rms_norm_eps": config.model.rms_norm_eps,
        "model.rope_scaling.beta_slow": config.model.rope_scaling.beta_slow,
    }
    for key, number in above_zero.items():
        if number <= 0:
            raise ConfigError(f"{key}={number} must be greater than 0")
    for key, number in {"optim.beta1": config.optim.beta1, "optim.beta2": config.optim.beta2}.items():
        if not 0 <= number < 1:
            raise ConfigError(f"{key}={number} must be at least 0 and less than 1")
        # A moment whose gradient is 0 shrinks by 1 - beta of itself. The next bf16 number is up to 2^-7 of itself away, and
        # rounding to nearest undoes what is less than half of that.
        if config.optim.moment_dtype == "bf16" and 1 - number < 2**-8:
            raise ConfigError(
                f"{key}={number} lets a moment shrink by {1 - number:.2g} of itself in a step, but optim.moment_dtype=bf16 "
                f"rounds changes below 2^-8 = {2**-8:.4f} away, and moments may never decay: use at most {key}=0.996, or "
                "optim.moment_dtype=fp32"
            )
    if not 0 <= config.optim.min_lr_ratio <= 1:
        raise ConfigError(
            f"optim.min_lr_ratio={config.optim.min_lr_ratio} must lie between 0 and 1, as a share of optim.lr"
        )


def _check_model(model: ModelConfig) -> None:
    if model.qk_rope_head_dim % 2:
        raise ConfigError(f"model.qk_rope_head_dim={model.qk_rope_head_dim} must be even: rotary embedding turns pairs")
    if model.rope_theta <= 1:
        raise ConfigError(
            f"model.rope_theta={model.rope_theta} must be greater than 1, or no rotation is slower than another"
        )
    rope = model.rope_scaling
    if rope.factor < 1:
        raise ConfigError(f"model.rope_scaling.factor={rope.factor} must be at least 1, which means no extension")
    if rope.beta_fast <= rope.beta_slow:
        raise ConfigError(
            f"model.rope_scaling.beta_fast={rope.beta_fast} must be greater than model.rope_scaling.beta_slow={rope.beta_slow}"
        )
    experts = model.n_routed_experts
    if experts == 0:
        return
    if experts % model.n_group:
        raise ConfigError(
            f"model.n_routed_experts={experts} is not divisible by model.n_group={model.n_group}: change either so that groups are equal"
        )
    if not 1 <= model.topk_group <= model.n_group:
        raise ConfigError(f"model.topk_group={model.topk_group} must be between 1 and model.n_group={model.n_group}")
    reachable = experts // model.n_group * model.topk_group
    if not 1 <= model.num_experts_per_tok <= reachable:
        raise ConfigError(
            f"model.num_experts_per_tok={model.num_experts_per_tok} must be between 1 and {reachable}, the experts in "
            f"model.topk_group={model.topk_group} groups of {experts // model.n_group}"
        )
    if model.n_group > 1 and experts // model.n_group < 2 and model.group_score == "top2_sum":
        raise ConfigError(
            f"model.n_group={model.n_group} leaves {experts // model.n_group} expert per group, but model.group_score=top2_sum scores a group by its two best: use at most {experts // 2} groups, or model.group_score=max"
        )


def _check_pipeline(config: Config) -> None:
    pp, pipeline = config.parallel.pp, config.pipeline
    allowed = V_SCHEDULES if pipeline.placement == "v" else LAST_SCHEDULES
    if pipeline.schedule not in allowed:
        raise ConfigError(
            f"pipeline.schedule={pipeline.schedule} does not run with pipeline.placement={pipeline.placement}: use one of {', '.join(allowed)}, or change the placement"
        )
    least = pp + 1 if pipeline.placement == "v" else pp  # each rank one; rank 0 of a V both ends
    if config.num_units < least:
        raise ConfigError(
            f"parallel.pp={pp} needs at least {least} pipeline units with pipeline.placement={pipeline.placement}, "
            f"model={config.model.name} has {config.num_units}: lower parallel.pp or raise model.num_layers to "
            f"{-(-(least - 2) // 2)}"
        )
    if problem := micro_batch_problem(pipeline.schedule, pp, config.train.micro_batches):
        raise ConfigError(problem)
    for key, value in (("memory_gb", pipeline.memory_gb), ("in_flight", pipeline.in_flight)):
        if value is not None and not value > 0:
            raise ConfigError(f"pipeline.{key}={value} must be positive, or null")


def micro_batch_problem(schedule: str, pp: int, micro_batches: int) -> str | None:
    """Why a schedule does not run with so many microbatches, and what would help; None if it does."""
    if schedule == "dualpipev" and micro_batches < 2 * pp:
        return (
            f"pipeline.schedule=dualpipev needs train.micro_batches >= 2*parallel.pp = {2 * pp}, got {micro_batches}: raise "
            f"it, or use pipeline.schedule=planned, which takes any number"
        )
    rounds = max(1, micro_batches // pp)
    if schedule == "interleaved_1f1b" and micro_batches % rounds:
        return (
            f"pipeline.schedule=interleaved_1f1b runs train.micro_batches={micro_batches} in {rounds} rounds, which must "
            f"divide them: use a multiple of parallel.pp={pp}, or pipeline.schedule=planned"
        )
    return None


def _check_recompute(config: Config) -> None:
    if not config.recompute.runs_with(config.moe.dispatcher):
        raise ConfigError(
            f"pipeline.recompute={config.recompute} would get wrong gradients with moe.dispatcher={config.moe.dispatcher}, whose "
            "rows come in another order each time: use moe.dispatcher=alltoall, or pipeline.recompute=norms+mla_up+swiglu"
        )


def _check_experts(config: Config) -> None:
    """``parallel.dp`` may still be open: :func:`dist_mtp.config.resolve` checks again once the ranks are counted."""
    ep, experts, dp = config.parallel.ep, config.model.n_routed_experts, config.parallel.dp
    if ep > 1:
        if not config.moe_layers:
            raise ConfigError(
                f"parallel.ep={ep} shares experts, but model={config.model.name} has no layer with experts: set parallel.ep=1"
            )
        if experts % ep:
            raise ConfigError(
                f"parallel.ep={ep} does not divide model.n_routed_experts={experts}: set parallel.ep to one of "
                f"{_divisors(experts)}"
            )
        if dp is not None and dp % ep:
            raise ConfigError(
                f"parallel.ep={ep} does not divide parallel.dp={dp}, the ranks among which a stage shares experts: set "
                f"parallel.dp to a multiple of {ep}, or parallel.ep to one of {_divisors(math.gcd(dp, experts))}"
            )
    if config.moe.dispatcher == "deepep" and (config.precision.name == "fp32" or config.device == "cpu"):
        raise ConfigError(
            f"moe.dispatcher=deepep moves bf16 tokens between GPUs, but precision={config.precision.name} and "
            f"device={config.device}: set precision=bf16 and device=cuda, or moe.dispatcher=alltoall"
        )
    _check_steps("moe.bias_update_speed_steps", config.moe.bias_update_speed_steps)


def _check_precision(config: Config) -> None:
    precision = config.precision
    changed = {
        "fp8_backend": precision.fp8_backend != "auto",
        "fp8_power_of_two_scales": precision.fp8_power_of_two_scales,
        "fp8_keep_bf16": bool(precision.fp8_keep_bf16),
        "fp8_dispatch": precision.fp8_dispatch,
    }
    for key in (key for key, is_changed in changed.items() if is_changed and precision.name != "fp8"):
        raise ConfigError(
            f"precision.{key}={getattr(precision, key)} has no effect with precision={precision.name}: set precision=fp8, or "
            "remove it"
        )
    if precision.fp8_dispatch and config.moe.dispatcher == "deepep":
        raise ConfigError(
            "precision.fp8_dispatch=true does not work with moe.dispatcher=deepep: set moe.dispatcher=alltoall, or "
            "precision.fp8_dispatch=false"
        )
    names = linear_names(config)
    kept = [n for n in names if n.endswith(".experts") and any(fnmatchcase(n, p) for p in precision.fp8_keep_bf16)]
    if precision.fp8_dispatch and kept:
        raise ConfigError(
            f"precision.fp8_keep_bf16 keeps {kept[0]} in BF16, but precision.fp8_dispatch=true sends its tokens in FP8: set "
            "precision.fp8_dispatch=false as well"
        )
    for pattern in precision.fp8_keep_bf16:
        if not any(fnmatchcase(name, pattern) for name in [*names, OUTPUT_HEAD]):
            raise ConfigError(
                f"precision.fp8_keep_bf16 has the pattern '{pattern}', which is no layer's name{nearest(pattern, names)}: layers "
                f"are called like {names[0]} and {names[-1]}, and * stands for anything"
            )


def check_installed(config: Config) -> None:
    """Refuse an optional library that is not installed on this machine; a plan does without.

    Raises:
        ConfigError: names the package and the alternative.
    """
    if config.moe.dispatcher == "deepep" and find_spec("deep_ep") is None:
        raise ConfigError(
            "moe.dispatcher=deepep needs the package deep_ep (https://github.com/deepseek-ai/DeepEP), which is not "
            "installed: install it on every node, or use moe.dispatcher=alltoall"
        )


def _check_steps(key: str, steps: tuple[tuple[float, float], ...]) -> None:
    """``[[tokens, value], ...]``, a value that changes as training goes on."""
    thresholds = [tokens for tokens, _ in steps]
    if thresholds != sorted(set(thresholds)):
        raise ConfigError(f"{key} must name rising token counts, got {thresholds}")
    for tokens, value in steps:
        if tokens < 0 or value < 0:
            raise ConfigError(f"{key}=[[{tokens:g},{value:g}]]: neither may be negative")


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def _check_training(config: Config) -> None:
    if config.train.seq_len > config.model.max_position_embeddings * config.model.rope_scaling.factor:
        raise ConfigError(
            f"train.seq_len={config.train.seq_len} exceeds model.max_position_embeddings={config.model.max_position_embeddings}: lower the first or raise the second"
        )
    if not 0 < config.data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={config.data.validation_fraction} must lie between 0 and 1")
    if config.data.source in ("text", "jsonl") and not config.data.path:
        raise ConfigError(f"data.source={config.data.source} needs data.path, the file or folder to read")
    if config.tokenizer.name == "bpe" and config.tokenizer.vocab_size < 300:
        raise ConfigError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} must be at least 300: 256 bytes, the end-of-text id and some merges"
        )
    _check_deepspeed(config.ds)
    if config.parallel.ep > 1:
        _check_deepspeed_experts(config.ds.get("zero_optimization", {}))
    _check_steps("mtp.loss_weight_steps", config.mtp.loss_weight_steps)
    for step in config.debug.dump_steps:
        if not 1 <= step <= config.train.steps:
            raise ConfigError(
                f"debug.dump_steps names step {step}, but train.steps={config.train.steps}: steps count from 1"
            )
    if config.launcher.name == "none" and config.world_size > 1:
        raise ConfigError(
            f"launcher=none trains in this process, but parallel.pp={config.parallel.pp} x parallel.dp={config.dp} needs {config.world_size} ranks: use launcher=local"
        )


def _check_deepspeed(ds: Mapping[str, Any]) -> None:
    sections = {key.split(".")[0] for key in DEEPSPEED_KEYS if "." in key}
    for section in sections & set(ds):
        if not isinstance(ds[section], Mapping):
            raise ConfigError(f"ds.{section} must be a section of keys, got {ds[section]!r}")
    for key, value in _leaves(ds).items():
        derived = next((d for d in DERIVED_DEEPSPEED_KEYS if key == d or key.startswith(d + ".")), None)
        if derived is not None:
            raise ConfigError(
                f"ds.{derived} conflicts with what dist_mtp sets itself: {DERIVED_DEEPSPEED_KEYS[derived]}"
            )
        if key in sections:  # and empty
            continue
        if key not in DEEPSPEED_KEYS:
            works = [f"ds.{known}" for known in DEEPSPEED_KEYS]
            hint = nearest(f"ds.{key}", works) or f", only these are: {', '.join(works)}"
            raise ConfigError(f"ds.{key} is not a DeepSpeed key that works with dist_mtp{hint}")
        kind = DEEPSPEED_KEYS[key]
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"ds.{key}={value} must be true or false")
        if kind is not bool and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf
        ):
            raise ConfigError(f"ds.{key}={value} must be a number greater than 0")
        if kind is int and value != int(value):
            raise ConfigError(f"ds.{key}={value} must be a whole number")


def _check_deepspeed_experts(zero_optimization: Mapping[str, Any]) -> None:
    """Without one of these DeepSpeed 0.19.8 refuses experts, without the other it reduces their fp32 gradients wrongly."""
    for key in ("reduce_scatter", "contiguous_gradients"):
        if zero_optimization.get(key) is False:
            raise ConfigError(
                f"ds.zero_optimization.{key}=false does not work with experts that ranks share (parallel.ep above 1): "
                "remove it, or set parallel.ep=1"
            )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of everything that is no section. An empty section is one leaf."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def use_cuda_for(device: str, *, local_ranks: int, gpus: int) -> bool:
    """Whether the ranks of a host train on its GPUs; the same answer for all of them.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, the configuration's.
        local_ranks: ranks on this host.
        gpus: GPUs of this host that its ranks can see.

    Raises:
        ConfigError: ``cuda`` with fewer GPUs than ranks.
    """
    if device == "cuda" and gpus < local_ranks:
        raise ConfigError(
            f"device=cuda needs a GPU for each of the {local_ranks} ranks on this host, which has {gpus}: start fewer ranks "
            "per host (parallel.pp x parallel.dp in all), or set device=cpu"
        )
    return device != "cpu" and gpus >= local_ranks
