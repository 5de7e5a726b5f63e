"""What the ranks of the expert-parallel layer tests do; see ``tests/parallel/test_expert_layer.py``.

Ranks write down tensors and counts; whether these are right is decided there, from those of all ranks together.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from model.model_cases import config_of
from support import fake_deep_ep
from support.operations import CountOperations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_mtp.config import Config, MoeConfig, ParallelConfig
from dist_mtp.model.dispatch import Dispatcher
from dist_mtp.model.init import initialize
from dist_mtp.model.moe import MoE, attach_dispatcher
from dist_mtp.parallel.deepep import DeepEPDispatcher
from dist_mtp.parallel.dispatch import AllToAllDispatcher, make_dispatcher
from dist_mtp.parallel.mesh import Mesh, init_process_group, make_mesh
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.precision.fp8.layer import attach_fp8
from dist_mtp.precision.weight_grads import WeightGradQueue, attach_queue, run

WORLD_SIZE = 4
DEGREES = (2, 4)
"""Ranks that share experts; with 2 there are two groups of the same experts."""
Tensors = dict[str, Tensor]
Dispatchers = Mapping[int, Dispatcher]
"""By expert-parallel degree."""


@dataclass(frozen=True)
class Case:
    """A layer and the tokens of each rank. ``bias``: the router's, by expert; ``rows`` of ``tokens[rank]`` tokens each."""

    tokens: tuple[int, int, int, int] = (7, 7, 7, 7)
    rows: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    bias: Mapping[int, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


ORDINARY = Case(rows=2)
CASES = {
    "ordinary": ORDINARY,
    "empty experts": Case(bias={2: -9, 3: -9, 4: -9, 5: -9}),
    "all on one": Case(model={"num_experts_per_tok": 1, "norm_topk_prob": False}, bias={5: 9}),
    "one token": Case(tokens=(1, 1, 1, 1)),
    "uneven": Case(tokens=(5, 1, 17, 9)),
    "ranks without tokens": Case(tokens=(0, 6, 0, 3)),
    "no shared experts": Case(model={"n_shared_experts": 0}),
    "bf16": Case(tokens=(30, 20, 10, 25), dtype=torch.bfloat16),
}
WIDE = Case(tokens=(30, 0, 10, 25), model={"hidden_size": 160}, dtype=torch.bfloat16)
"""Rows of two tiles, the second one not whole."""
DEEPEP_CASES = ("ordinary", "empty experts", "uneven", "bf16")
LATE_S = 1.0
EXPERTS = (8, 64, 256)
"""Numbers of experts for which operations are counted."""


def world_of_4(folder: Path) -> None:
    device = init_process_group(60, device="cpu")
    meshes = {ep: make_mesh(config_for(ep), device) for ep in DEGREES}
    torch.save(
        {
            "cases": {name: run_case(case, meshes) for name, case in CASES.items()},
            "variations": {ep: run_variations(mesh) for ep, mesh in meshes.items()},
            "operations": {(ep, n): count_operations(meshes.get(ep), n) for ep in (1, *DEGREES) for n in EXPERTS},
            "fp8": {ep: run_fp8(mesh) for ep, mesh in meshes.items()},
            "waits": wait_for_late_rank(meshes[2]),
            "autoep": run_autoep(meshes[2]),
        },
        folder / f"rank_{dist.get_rank()}.pt",
    )


def world_with_deepep(folder: Path) -> None:
    """Some of the cases through DeepEP's adapter, on a stand-in of the library."""
    sys.modules["deep_ep"] = fake_deep_ep
    device = init_process_group(60, device="cpu")
    meshes = {ep: make_mesh(config_for(ep), device) for ep in DEGREES}
    results: dict[str, Any] = {"cases": {}, "received": {}}
    for fake_deep_ep.padding in (0, 5):
        dispatchers: dict[int, Dispatcher] = {}
        for ep, mesh in meshes.items():
            assert mesh.expert_group is not None
            dispatchers[ep] = DeepEPDispatcher(config_for(ep, dispatcher="deepep"), mesh.expert_group)
        for name in DEEPEP_CASES:
            results["cases"][name, fake_deep_ep.padding] = run_case(CASES[name], meshes, dispatchers)
        for ep, dispatcher in dispatchers.items():
            results["received"][ep, fake_deep_ep.padding] = receive(dispatcher)
    results["variations"] = {ep: run_variations(mesh, dispatchers[ep]) for ep, mesh in meshes.items()}
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")


def config_for(ep: int, dispatcher: Literal["alltoall", "deepep"] = "alltoall", **model: Any) -> Config:
    parallel = ParallelConfig(pp=1, dp=WORLD_SIZE, ep=ep)
    return dataclasses.replace(config_of(**model), parallel=parallel, moe=MoeConfig(dispatcher=dispatcher))


def build_layer(case: Case, mesh: Mesh | None, dispatcher: Dispatcher | None = None) -> MoE:
    """This rank's part of a layer that has the same weights whatever the mesh; the whole layer without one."""
    config = config_for(mesh.ep if mesh else 1, **case.model)
    layer = MoE(config)
    first_expert = mesh.expert_rank * config.experts_per_rank if mesh else 0
    # Fused experts are recognised, and named one by one, below a module.
    initialize(nn.ModuleDict({"mlp": layer}), seed=5, std=0.3, first_expert=first_expert)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(case.dtype)
    for expert, bias in case.bias.items():
        layer.gate.e_score_correction_bias[expert] = bias
    if mesh:
        attach_dispatcher(layer, dispatcher or make_dispatcher(config, mesh))
    return layer


def tokens_of(case: Case, microbatch: int = 0) -> tuple[Tensor, Tensor]:
    """This rank's input, [B, T, D], and the gradient of its output."""
    generator = torch.Generator().manual_seed(100 * microbatch + dist.get_rank())
    shape = (2, case.rows, case.tokens[dist.get_rank()], config_for(1, **case.model).model.hidden_size)
    x, grad_y = torch.randn(shape, generator=generator).to(case.dtype)
    return x, grad_y


def start_forward(module: Callable[[Tensor], Tensor], x: Tensor, recompute: str = "") -> tuple[Tensor, Tensor]:
    """The input that collects a gradient, and the output; ``recompute`` says how activations are recomputed, if they are."""
    x = x.clone().requires_grad_()
    return x, checkpoint(module, x, use_reentrant=recompute == "reentrant") if recompute else module(x)


def measure(layer: nn.Module, x: Tensor, grad_y: Tensor, recompute: str = "") -> Tensors:
    """Output, input gradient, and the gradient of every parameter."""
    layer.zero_grad()
    x, y = start_forward(layer, x, recompute)
    y.backward(grad_y)
    return {"output": y.detach(), "input": gradient(x), **parameter_gradients(layer)}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "no gradient has arrived"
    return tensor.grad.clone()


def parameter_gradients(layer: nn.Module) -> Tensors:
    return {name: gradient(parameter) for name, parameter in layer.named_parameters()}


def run_case(case: Case, meshes: Mapping[int, Mesh], dispatchers: Dispatchers | None = None) -> dict[str, Any]:
    """The rank's results with all experts of its own, and those by expert-parallel degree, with what was counted."""
    whole, batch = build_layer(case, None), tokens_of(case)
    results: dict[str, Any] = {"whole": measure(whole, *batch), "ids": whole.gate(batch[0]).ids_TK}
    for ep, mesh in meshes.items():
        layer = build_layer(case, mesh, dispatchers and dispatchers[ep])
        results[f"ep {ep}"] = measure(layer, *batch)
        results[f"counts {ep}"] = {"load": layer.gate.load, "processed": layer.experts.processed}
        if isinstance(layer.dispatcher, AllToAllDispatcher):
            results[f"sent bytes {ep}"] = layer.dispatcher.traffic.take()[0]
    return results


def run_variations(mesh: Mesh, dispatcher: Dispatcher | None = None) -> dict[str, Tensors]:
    """The same layer and tokens, computed in other ways; all but the pipelined ones should equal ``plain``."""
    layer = build_layer(ORDINARY, mesh, dispatcher)
    batches = [tokens_of(ORDINARY, microbatch) for microbatch in range(2)]
    results = {"plain": measure(layer, *batches[0]), "again": measure(layer, *batches[0])}
    results["deferred"] = deferred(layer, *batches[0])
    for recompute in ("reentrant", "non-reentrant"):
        results[recompute] = measure(layer, *batches[0], recompute)
    for order in ("F0 B0 F1 B1", "F0 F1 B0 B1", "F0 F1 B1 B0"):
        results[order] = pipelined(layer, batches, order)
    layer.eval()
    with torch.no_grad():
        results["evaluated"] = {"output": layer(batches[0][0])}
    return results


def receive(dispatcher: Dispatcher) -> tuple[Tensor, Tensor]:
    """The rows that arrive for this rank's experts, and the end of each expert's."""
    x, _ = tokens_of(ORDINARY)
    return dispatcher.dispatch(x.flatten(0, 1), build_layer(ORDINARY, None).gate(x)).receive()


def deferred(layer: nn.Module, x: Tensor, grad_y: Tensor) -> Tensors:
    """As :func:`measure`, weight gradients computed after the backward."""
    queue = WeightGradQueue()
    attach_queue(layer, queue)
    queue.deferring = True
    layer.zero_grad()
    x, y = start_forward(layer, x)
    y.backward(grad_y)
    early = [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
    assert early == ["gate.weight"], f"weights with a gradient before their turn: {early}"
    run(queue.take())
    queue.deferring = False
    return {"output": y.detach(), "input": gradient(x), **parameter_gradients(layer)}


def pipelined(layer: nn.Module, batches: list[tuple[Tensor, Tensor]], order: str) -> Tensors:
    """Two microbatches in the given order of forwards and backwards."""
    layer.zero_grad()
    started: dict[int, tuple[Tensor, Tensor]] = {}
    results = {}
    for action in order.split():
        kind, number = action[0], int(action[1])
        x, grad_y = batches[number]
        if kind == "F":
            started[number] = start_forward(layer, x)
        else:
            x, y = started.pop(number)
            y.backward(grad_y)
            results |= {f"output {number}": y.detach(), f"input {number}": gradient(x)}
    return results | parameter_gradients(layer)


def run_fp8(mesh: Mesh) -> dict[str, Any]:
    """The layer in FP8: whole, shared, and shared with tokens that travel in FP8, that one withheld and recomputed, too."""
    assert mesh.expert_group is not None
    backend, batch = EmulatedBackend(), tokens_of(WIDE)

    def layer(mesh: Mesh | None, *, dispatch: bool = False) -> MoE:
        shared = None if mesh is None else AllToAllDispatcher(mesh.expert_group, backend if dispatch else None)
        built = build_layer(WIDE, mesh, shared)
        attach_fp8(nn.ModuleDict({"mlp": built}), backend, power_of_two=True)
        return built

    shared, travels_in_fp8 = layer(mesh), layer(mesh, dispatch=True)
    results: dict[str, Any] = {
        "whole": measure(layer(None), *batch),
        "shared": measure(shared, *batch),
        "dispatch": measure(travels_in_fp8, *batch),
        "bytes": [each.dispatcher.traffic.take()[0] for each in (shared, travels_in_fp8)],  # type: ignore[attr-defined]
    }
    results["deferred"] = deferred(travels_in_fp8, *batch)
    results["recomputed"] = measure(travels_in_fp8, *batch, "non-reentrant")
    return results


def count_operations(mesh: Mesh | None, experts: int) -> dict[str, dict[str, int]]:
    """Operations and waits of the host in one forward and backward of a layer, with few tokens and with many."""
    counts = {}
    for name, tokens in (("few", 3), ("many", 50)):
        case = Case(tokens=(tokens,) * WORLD_SIZE, model={"n_routed_experts": experts})
        layer, (x, grad_y) = build_layer(case, mesh), tokens_of(case)
        layer.gate.aux_coeffs = dict.fromkeys(layer.gate.aux_coeffs, 0.1)
        x.requires_grad_()
        with CountOperations() as counted:
            layer(x).backward(grad_y)
        counts[name] = {"operations": counted.total, **counted.waits}
    return counts


def wait_for_late_rank(mesh: Mesh) -> dict[str, float]:
    """Seconds that this rank counts as waiting in a forward and in a backward to which rank 1 comes ``LATE_S`` late."""
    layer, (x, grad_y) = build_layer(ORDINARY, mesh), tokens_of(ORDINARY)
    assert isinstance(layer.dispatcher, AllToAllDispatcher)
    waits = {}

    def late(phase: str, work: Callable[[], Any]) -> Any:
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(LATE_S)
        result = work()
        waits[phase] = layer.dispatcher.traffic.take()[1]
        return result

    y = late("forward", lambda: layer(x.requires_grad_()))
    late("backward", lambda: y.backward(grad_y))
    return waits


def run_autoep(mesh: Mesh) -> dict[str, Tensors]:
    """Our layer, and DeepSpeed's AutoEP in place of a Hugging Face layer with the same weights."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from support.hf_moe import hf_layer

    case = Case(tokens=(5, 1, 17, 9), bias={0: 0.2, 3: -0.3, 6: 0.1})
    whole, batch = build_layer(case, None), tokens_of(case)
    model = nn.ModuleDict({"mlp": hf_layer(whole, config_for(1, **case.model))})
    model.config = model["mlp"].config
    settings = {"enabled": True, "autoep_size": mesh.ep, "preset_model": "deepseek_v3", "moe_layer_pattern": "mlp"}
    replacement = AutoEP(model, parse_autoep_config({**settings, "use_grouped_mm": False}))
    (layer,) = replacement.ep_parser()
    replacement.replace_moe_layer(layer, mesh.ep, mesh.expert_rank)
    model["mlp"].set_deepspeed_parallelism()
    theirs = measure(model["mlp"], *batch)
    gate_up = torch.cat((theirs.pop("experts.w1"), theirs.pop("experts.w3")), dim=1)
    theirs |= {"experts.gate_up_proj": gate_up, "experts.down_proj": theirs.pop("experts.w2")}
    theirs["gate.weight"] = theirs.pop("router.gate.weight")
    return {"ours": measure(build_layer(case, mesh), *batch), "theirs": theirs}
