"""DeepSpeedEngine as the optimizer side of training: ZeRO-1, gradient reduction, clipping and the update.

Forward and backward run elsewhere (``dist_mtp.pipeline.runtime``); the engine's own ``forward`` and ``backward`` are never
called. Private names of DeepSpeed 0.19.8 used here: ``engine.pipeline_parallelism`` (runtime/engine.py), ``_hp_mapping``
(utils/tensor_fragment.py), ``BF16_Optimizer.bf16_groups``, ``fp32_groups_gradients``, ``fp32_groups_has_gradients``
(runtime/bf16_optimizer.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_mtp.config import Config, OptimConfig
from dist_mtp.errors import DivergedError
from dist_mtp.model.moe import Experts
from dist_mtp.model.naming import LogicalTensor, logical_tensors
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.adamw import MOMENT_DTYPES, AdamW, zero_state
from dist_mtp.parallel.collectives import all_max, check_same_hash
from dist_mtp.parallel.mesh import Mesh, expert_group_name

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
_VECTOR_ANCHOR, _EXPERT_ANCHOR = "anchor", "expert_anchor"
_ANCHORS = (_VECTOR_ANCHOR, f"{_EXPERT_ANCHOR}.weight")
"""Names of inert parameters that only keep groups of parameters equal on all ranks."""

_REPORT = "DeepSpeed would hang in the first step; this is a bug of dist_mtp, please report it with config.yaml"


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter's fp32 master and Adam moments that this rank owns under ZeRO-1.

    ``logical``: the logical tensors of the whole parameter. ``start``: first element in the flattened parameter.
    ``tensors``: 1-D tensors of equal length by kind (``param``, ``exp_avg``, ``exp_avg_sq``); they are the optimizer's own
    storage, so writing into them changes its state.
    """

    parameter: str
    logical: Sequence[LogicalTensor]
    start: int
    tensors: Mapping[str, Tensor]

    def pieces(self) -> Iterator[tuple[LogicalTensor, int, dict[str, Tensor]]]:
        """Split along logical tensors: each with the first element inside it and the matching slices of ``tensors``."""
        length = next(iter(self.tensors.values())).numel()
        for logical in self.logical:
            low, high = max(self.start, logical.start), min(self.start + length, logical.start + logical.numel)
            if low < high:
                span = slice(low - self.start, high - self.start)
                yield logical, low - logical.start, {kind: t[span] for kind, t in self.tensors.items()}


class Engine:
    """Owns the parameters' update.

    Args:
        model: this rank's units. Parameters keep their identity, so stages built before or after stay valid.

    ``on_weights_changed`` is called after every change of the parameters; it does nothing by default.
    """

    def __init__(self, config: Config, model: LanguageModel, mesh: Mesh) -> None:
        import deepspeed

        self.model, self.mesh = model, mesh
        self.on_weights_changed: Callable[[], None] = lambda: None
        if model.holds_replica and mesh.pp > 1:
            # Summed with the first rank's by reduce(); the global norm must count it once.
            replica: Any = model.model.embed_tokens.weight
            replica.ds_pipe_replicated = True
        groups = _parameter_groups(model, mesh, config.optim.weight_decay)
        check_equal_groups(groups, mesh)
        self._moment_dtype = MOMENT_DTYPES[config.optim.moment_dtype]
        drawn = {name: parameter.detach() for name, parameter in model.named_parameters()}
        deepspeed.logger.addFilter(_is_news)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=_make_optimizer(config.optim, groups),
            config=deepspeed_config(config, model),
            mpu=mesh.grid,
            dist_init_required=False,
        )
        self._attach_main_grads()
        self._create_optimizer_state()
        self._restore_drawn(drawn)
        self._attach_fp32_copies()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model proper, replicas included."""
        for name, parameter in self.model.named_parameters():
            if name not in _ANCHORS:
                yield name, parameter

    def logical_tensors(self, name: str, parameter: nn.Parameter) -> list[LogicalTensor]:
        """Logical tensors of one of this rank's parameters."""
        return logical_tensors(name, tuple(parameter.shape), self.model.first_expert)

    def owned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters without the embedding's replica: over the pipeline, each logical tensor once."""
        for name, parameter in self.named_parameters():
            if not getattr(parameter, "ds_pipe_replicated", False):
                yield name, parameter

    def collect_gradients(self) -> None:
        """Move finished gradients into the fp32 accumulators; called after every backward action under bf16."""
        parameter: Any
        for parameter in self._mixed_precision:
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)
                parameter.grad = None

    def check_embedding_copies(self) -> None:
        """Under ``last`` placement, compare the embedding of the first and the last rank. Collective.

        Both get the same summed gradient, but reduce it over their own data replicas; nothing in a backend promises that
        two groups round alike.

        Raises:
            DivergedError: on all ranks, the copies differ.
        """
        differing = 0.0
        if self.mesh.ends_group is not None and self._embedding_has_two_copies:
            weight = self.model.model.embed_tokens.weight.detach()
            first = weight.clone()
            dist.broadcast(first, src=self.mesh.global_rank(0), group=self.mesh.ends_group)
            differing = float((first != weight).sum())
        (worst,) = all_max([differing], self.mesh.device)
        if worst:
            raise DivergedError(
                f"the two copies of the embedding differ in {worst:.0f} elements: resume from the last checkpoint with "
                "pipeline.placement=v, which has one copy"
            )

    def reduce(self) -> None:
        """Sum the gradients of the embedding's two copies, then average all gradients over the data replicas.

        An expert's gradient is summed over the ranks that hold it, but divided by all replicas, whose tokens it has seen.
        """
        for name, parameter in self.model.named_parameters():
            if name in _ANCHORS:
                parameter.grad = torch.zeros_like(parameter)
        self.collect_gradients()
        if self.mesh.ends_group is not None and self._embedding_has_two_copies:
            weight = self.model.model.embed_tokens.weight
            dist.all_reduce(getattr(weight, "main_grad", weight.grad), group=self.mesh.ends_group)
        if self._mixed_precision:
            self.optimizer.fp32_groups_has_gradients = [[True] * len(g) for g in self.optimizer.bf16_groups]
        self.engine.set_gradient_accumulation_boundary(True)
        # ZeRO-1 then makes its reduction buffers itself; otherwise engine.backward() would have made them.
        self.engine.pipeline_parallelism = True
        self.engine.allreduce_gradients()
        self.engine.pipeline_parallelism = False

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The full, reduced, unclipped gradient in fp32; between :meth:`reduce` and :meth:`step`, on all data replicas."""
        source: Any = parameter
        gradient: Tensor = source.main_grad if self._mixed_precision else source.get_full_hp_grad()
        return gradient

    def step(self, lr: float) -> float:
        """Clip, update and clear gradients.

        Returns:
            The global gradient norm before clipping; infinite when a gradient was not finite, in which case nothing was
            updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.weights_changed()
        return float(self.engine.get_global_grad_norm())

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of master weights and moments, replicas left out."""
        for name, parameter in self.owned_parameters():
            fragment = self._fragment(name, parameter)
            if fragment is not None:
                yield fragment

    def all_fragments(self) -> Iterator[Fragment]:
        """As :meth:`fragments`, replicas included: what a restore must fill."""
        for name, parameter in self.named_parameters():
            fragment = self._fragment(name, parameter)
            if fragment is not None:
                yield fragment

    def set_optimizer_step(self, step: int) -> None:
        """Tell Adam how many updates its moments hold (its bias correction needs it)."""
        for state in self.optimizer.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def weights_changed(self) -> None:
        """Bring everything that is made of the weights up to date: after a step, or after they were loaded. Collective."""
        if self._vectors:
            self._fp32_copies.zero_()
            for vector, copy in zip(self._vectors, self._copies(), strict=True):
                mapping: Any = vector._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:  # else other data ranks own all of it
                    start = mapping.lp_fragment_address.start
                    mine = mapping.get_hp_fragment().detach()
                    copy[start : start + mine.numel()] = mine
            dist.all_reduce(self._fp32_copies, group=self.mesh.data_group)
        self.on_weights_changed()

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # every element belongs to other data ranks
            return None
        tensors = {"param": mapping.get_hp_fragment()}
        tensors.update((kind, mapping.get_hp_fragment(kind)) for kind in OPTIMIZER_STATES)
        detached = {kind: tensor.detach() for kind, tensor in tensors.items()}
        return Fragment(name, self.logical_tensors(name, parameter), mapping.lp_fragment_address.start, detached)

    def _create_optimizer_state(self) -> None:
        """Create zero moments and link them to the parameters they belong to.

        Left to itself, DeepSpeed links every group after stepping the first one, when the others have no moments yet
        (``DeepSpeedZeroOptimizer._optimizer_step``, 0.19.8).
        """
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                inner.state[flat] = zero_state(flat, self._moment_dtype)
        self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _embedding_has_two_copies(self) -> bool:
        config = self.model.config
        return config.pipeline.placement == "last" and (config.mtp.depth > 0 or config.model.tie_word_embeddings)

    def _attach_main_grads(self) -> None:
        """Under bf16, let every gradient be added straight into DeepSpeed's fp32 accumulators."""
        self._mixed_precision: list[nn.Parameter] = []
        if type(self.optimizer).__name__ != "BF16_Optimizer":
            return
        for parameters, buffers in zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients, strict=True):
            for parameter, buffer in zip(parameters, buffers, strict=True):
                parameter.main_grad = buffer.view(parameter.shape)
                self._mixed_precision.append(parameter)

    def _restore_drawn(self, drawn: Mapping[str, Tensor]) -> None:
        """Under bf16, start the master weights from the numbers that were drawn, not from those rounded to bf16.

        Rounded ones lie in the middle of what rounds to them: until a weight has moved by half of bf16's spacing, which
        takes all weights as many steps, the working copy would stand still.

        Args:
            drawn: every parameter before DeepSpeed rounded it.
        """
        for fragment in self.all_fragments() if self._mixed_precision else ():
            master = fragment.tensors["param"]
            master.copy_(drawn[fragment.parameter].flatten()[fragment.start : fragment.start + master.numel()])

    def _attach_fp32_copies(self) -> None:
        """Under bf16, give norm weights an fp32 copy of their master weight, which the forward uses.

        They start at 1, where bf16's next numbers are 0.4 % down and 0.8 % up: in bf16 they would all stand still for the
        first hundred steps of a small learning rate, and move in jumps later.
        """
        mixed = {id(parameter) for parameter in self._mixed_precision}
        self._vectors = [p for _, p in self.named_parameters() if p.dim() == 1 and id(p) in mixed]
        self._fp32_copies = torch.zeros(sum(p.numel() for p in self._vectors), device=self.mesh.device)
        vector: Any
        for vector, copy in zip(self._vectors, self._copies(), strict=True):
            vector.fp32_copy = copy
        self.weights_changed()

    def _copies(self) -> tuple[Tensor, ...]:
        return self._fp32_copies.split([p.numel() for p in self._vectors])


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a user gains from a warning of DeepSpeed's; its list of tested optimizers lacks ours, whose tests are here."""
    return "untested optimizer" not in record.getMessage()


def _make_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.moment_dtype == "fp32":
        return torch.optim.AdamW(groups, **settings)
    return AdamW(groups, **settings, moment_dtype=MOMENT_DTYPES[config.moment_dtype])


def _parameter_groups(model: LanguageModel, mesh: Mesh, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, norm weights are not; experts that ranks share are a group of their own.

    All ranks have the same groups in the same order: DeepSpeed reduces the gradient norm group by group over the pipeline,
    and a rank with a group less would never join. Anchors stand in where a rank's stages hold nothing of a kind.
    """
    vectors = [p for p in model.parameters() if p.dim() == 1]
    if not vectors:  # the embedding alone
        vectors = [nn.Parameter(torch.zeros(1, device=mesh.device))]
        model.register_parameter(_VECTOR_ANCHOR, vectors[0])
    experts = (
        []
        if mesh.ep == 1
        else [w for layer in model.modules() if isinstance(layer, Experts) for w in layer.parameters()]
    )
    apart = {id(p) for p in experts}
    matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in apart]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    if mesh.ep > 1:
        from dist_mtp.parallel.expert_anchor import ExpertAnchor, mark_expert

        for weight in experts:
            mark_expert(weight, mesh.ep)
        anchor = ExpertAnchor(mesh.ep, mesh.device)
        model.add_module(_EXPERT_ANCHOR, anchor)
        # DeepSpeed finds the process groups of an expert group by its name.
        name = expert_group_name(mesh.ep)
        groups.append({"params": [*experts, anchor.weight], "weight_decay": weight_decay, "name": name, "moe": True})
    return groups


def check_equal_groups(groups: Sequence[Mapping[str, Any]], mesh: Mesh) -> None:
    """Fail at the start where DeepSpeed would hang in the first step. Collective.

    Raises:
        ConfigError: on all ranks, naming those whose groups differ from rank 0's.
    """
    names = "\n".join(f"{group['name']}: {'empty' if not group['params'] else 'present'}" for group in groups)
    check_same_hash(hashlib.sha256(names.encode()).hexdigest(), mesh.device, "set of optimizer groups", _REPORT)


def deepspeed_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """The DeepSpeed configuration behind ours, with ``ds.*`` (checked by ``dist_mtp.config``) merged last."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.micro_batches,
        "train_batch_size": config.rows_per_step,
        "gradient_clipping": config.optim.clip_norm,
        # Stage 1 in fp32 too: without it DeepSpeed clips by the first pipeline rank's norm alone.
        "zero_optimization": {"stage": 1},
        # DeepSpeed has a list of optimizers it was tested with; ours for bf16 moments updates elementwise as they do.
        "zero_allow_untested_optimizer": config.optim.moment_dtype != "fp32",
    }
    if config.is_mixed_precision:
        derived |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    numel = sum(p.numel() for p in model.parameters())
    tunable = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": min(numel, 500_000_000)}}
    return _merge(_merge(tunable, derived), config.ds)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
