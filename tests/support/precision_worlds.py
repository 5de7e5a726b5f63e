"""What the ranks of the tests of lower precisions do; see ``tests/parallel/test_precision_layouts.py``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.parity import REFERENCE, STEPS, Layout, Variant, end_trainers, make_config, make_trainer, run_steps
from torch import Tensor

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.precision.fp8.backend import BACKENDS
from dist_mtp.precision.fp8.emulated import EmulatedBackend
from dist_mtp.snapshot import restore_newest, save_snapshot

PRECISIONS = ("bf16", "fp8")
"""Each is trained in ``LAYOUTS``."""
LAYOUTS = (Layout("v", "zbv", 2), Layout("v", "dualpipev", 2), Layout("last", "1f1b", 2))
SHARED_EXPERTS = Layout("v", "zbv", 1, 2, 2)
MOMENT_CHANGES = (("fp32", "bf16", "fp32"), ("bf16", "bf16", "fp32"), ("bf16", "fp32", "bf16"), ("fp8", "bf16", "fp32"))
"""Precision, type of the moments, and the other type in which they are loaded."""
WATCHED = {LAYOUTS[0]: (), SHARED_EXPERTS: (("precision.fp8_dispatch", True),)}
"""FP8 runs whose statistics are taken, with what they have configured beside it."""
KEPT = ("model.layers.0.*", "*.eh_proj")
MANY = 64
"""Microbatches whose gradients are summed."""
ACCUMULATING = (REFERENCE, Layout("v", "zbv", 1))
"""Weight gradients come from autograd, or from closures that add to the accumulators themselves."""
ADDITIONS = {"lm_head.weight": 6, "model.embed_tokens.weight": 3}
"""To the accumulator by one microbatch, where more than one: of 3 heads in 2 chunks, of 3 look-ups."""
TINY_LR, MANY_STEPS = 1e-7, 400


def variant_of(precision: str, moment_dtype: str) -> Variant:
    return Variant(2, extra=(("precision.name", precision), ("optim.moment_dtype", moment_dtype)))


VARIANTS = tuple(variant_of(precision, moments) for precision in PRECISIONS for moments in ("fp32", "bf16"))
ROUNDED_MOMENTS = variant_of("fp32", "bf16")
"""Under ``precision=fp32`` DeepSpeed uses another optimizer of its own."""


def reordered(variant: Variant) -> Variant:
    """Trained on each step's microbatches last first; a variant of its own, so that its run folder is, too."""
    return dataclasses.replace(variant, extra=(*variant.extra, ("run.name", "reordered")))


def nudged(variant: Variant) -> Variant:
    """The weights of one letter are moved by one unit in their last bf16 place before step 2: FP8 can hide a single one."""
    return dataclasses.replace(variant, extra=(*variant.extra, ("run.name", "nudged")))


def moments_run(folder: Path, precision: str, moment_dtype: str, part: str) -> Path:
    return folder / "moments" / f"{precision}-{moment_dtype}-{part}"


def world_of_1(folder: Path) -> None:
    for variant in VARIANTS:
        run_steps(make_config(folder, REFERENCE, variant))
        run_steps(make_config(folder, REFERENCE, reordered(variant)), on_start=_reverse_microbatches)
        run_steps(make_config(folder, REFERENCE, nudged(variant)), on_start=_nudge_a_letter)
    run_steps(make_config(folder, REFERENCE, ROUNDED_MOMENTS))
    for layout in ACCUMULATING:
        _accumulate(folder, layout)
    _move_masters(folder)


def world_of_2(folder: Path) -> None:
    for variant in VARIANTS:
        for layout in LAYOUTS:
            run_steps(make_config(folder, layout, variant))
    run_steps(make_config(folder, SHARED_EXPERTS, ROUNDED_MOMENTS))
    for change in MOMENT_CHANGES:
        _resume_moments(folder, *change)
    for layout in WATCHED:
        _watch_fp8(folder, layout)
    (folder / f"refusal.rank{dist.get_rank()}").write_text(_refusal_of_one_rank(folder))
    end_trainers()  # the refused one's process groups must not be left to the interpreter's end, where gloo may abort


def _reverse_microbatches(trainer: Any) -> None:
    in_order = trainer.runtime.train_step
    trainer.runtime.train_step = lambda batches: in_order([batches[i] for i in reversed(range(len(batches)))])


def _nudge_a_letter(trainer: Any) -> None:
    train_step = trainer.train_step

    def with_nudge() -> Any:
        if trainer.step == 2:
            # In the embedding, of which no precision keeps a copy.
            trainer.model.model.embed_tokens.weight.data.view(torch.int16)[ord("e")] += 1
        return train_step()

    trainer.train_step = with_nudge


def _accumulate(folder: Path, layout: Layout) -> None:
    """Sum the gradients of many microbatches, then take each alone; write down by parameter how the sum compares."""
    variant = dataclasses.replace(variant_of("bf16", "fp32"), micro_batches=MANY)
    trainer = make_trainer(make_config(folder, layout, variant))
    batches = trainer.batches.step("train", 0, 0.3).micro_batches
    accumulators: dict[str, Tensor] = {name: p.main_grad for name, p in trainer.engine.named_parameters()}
    trainer.runtime.train_step(batches)
    sums = {name: accumulator.clone() for name, accumulator in accumulators.items()}
    exact = {name: torch.zeros_like(total, dtype=torch.float64) for name, total in sums.items()}
    sizes = {name: torch.zeros_like(total, dtype=torch.float64) for name, total in sums.items()}
    in_bf16 = {name: torch.zeros_like(total, dtype=torch.bfloat16) for name, total in sums.items()}
    for batch in batches:
        trainer.engine.optimizer.clear_hp_grads()
        _backward_of_one(trainer, batch)
        for name, single in accumulators.items():
            exact[name] += single
            sizes[name] += single.abs()
            in_bf16[name] += single.bfloat16()
    facts = {}
    for name, total in sums.items():
        # An fp32 sum of n numbers is off by at most (n - 1) * 2^-24 of the sum of their sizes, in any order.
        bound = MANY * ADDITIONS.get(name, 1) * 2**-24 * sizes[name]
        facts[name] = {
            "dtype": str(total.dtype),
            "of_bound": float(((total - exact[name]).abs() / bound.clamp_min(1e-300)).max()),
            "error": float((total - exact[name]).norm() / exact[name].norm()),
            "error_of_bf16_sum": float((in_bf16[name] - exact[name]).norm() / exact[name].norm()),
        }
    (folder / f"accumulation-{layout}.json").write_text(json.dumps(facts))


def _backward_of_one(trainer: Any, batch: Any) -> None:
    """Forward and backward of one microbatch, its gradients left in the accumulators."""
    stages = [stage for _, stage in sorted(trainer.stages.items())]
    hidden, grad = None, None
    for stage in stages:
        hidden = stage.forward(0, hidden, batch)
    for stage in reversed(stages):
        grad = stage.backward(0, grad, defer_weights=False)


def _move_masters(folder: Path) -> None:
    """Many steps at a tiny rate along one gradient, +1 or -1 an element; write masters and weights before, after one step
    and at the end."""
    extra = (
        ("precision.name", "bf16"),
        ("model.initializer_range", 0.006),
        ("optim.clip_norm", 0.0),
        ("optim.weight_decay", 0.0),
        ("run.name", "masters"),
    )
    engine: Any = make_trainer(make_config(folder, REFERENCE, Variant(1, extra=extra))).engine
    generator = torch.Generator().manual_seed(1)
    parameters = dict(engine.named_parameters())
    signs = {n: torch.randint(2, p.shape, generator=generator).bfloat16() * 2 - 1 for n, p in parameters.items()}
    tensors = {f"sign/{name}": sign for name, sign in signs.items()}
    for step in range(MANY_STEPS + 1):
        if step in (0, 1, MANY_STEPS):
            for fragment in engine.fragments():
                weight = parameters[fragment.parameter].detach()
                tensors[f"master_{step}/{fragment.parameter}"] = fragment.tensors["param"].view(weight.shape).clone()
                tensors[f"weight_{step}/{fragment.parameter}"] = weight.clone()
        for name, parameter in parameters.items():
            parameter.grad = signs[name].clone()
        engine.reduce()
        engine.step(TINY_LR)
    save_file(tensors, folder / "masters.safetensors")


def _resume_moments(folder: Path, precision: str, moment_dtype: str, other: str) -> None:
    """Train with a checkpoint before the last step; from there, go on in another run, and load it with other moments."""

    def config_of(part: str, dtype: str, resume: str = "never") -> Config:
        extra = (("precision.name", precision), ("optim.moment_dtype", dtype))
        config = make_config(folder, SHARED_EXPERTS, Variant(1, extra=extra))
        target = moments_run(folder, precision, moment_dtype, part)
        target.mkdir(parents=True, exist_ok=True)
        return dataclasses.replace(
            config,
            resume=resume,
            run=dataclasses.replace(config.run, dir=str(target)),
            checkpoint=dataclasses.replace(config.checkpoint, every=STEPS - 1),
        )

    make_trainer(config_of("begun", moment_dtype)).run()
    begun = moments_run(folder, precision, moment_dtype, "begun") / "checkpoints" / f"step_{STEPS - 1:08d}"
    make_trainer(config_of("continued", moment_dtype, str(begun))).run()
    config = config_of("converted", other, str(begun))
    trainer = make_trainer(config)
    corpus = trainer.corpus.info["fingerprint"]
    step = restore_newest(config, trainer.engine, trainer.mesh, corpus=corpus, report=print)
    save_snapshot(config, trainer.engine, trainer.mesh, step=step, corpus=corpus)


def _watch_fp8(folder: Path, layout: Layout) -> None:
    """Train in FP8 with statistics; write down how many cached weights are not those of the parameters: after training,
    and after a restore into a trainer whose cache is full."""
    extra = (("precision.name", "fp8"), ("precision.fp8_statistics_every", 2), ("precision.fp8_keep_bf16", KEPT))
    config = make_config(folder, layout, Variant(1, extra=(*extra, *WATCHED[layout])))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder / f"watched-{layout}")))
    notices: list[str] = []
    trainer = make_trainer(config)
    trainer.monitor.notice = notices.append
    rows: list[dict[str, float]] = []
    trainer.monitor.log = rows.append
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    trainer.run()
    facts: dict[str, Any] = {"rows": rows, "notices": notices, "layers": sorted(trainer.fp8.layers)}
    facts["after_steps"] = _stale(trainer)
    again = make_trainer(dataclasses.replace(config, resume="auto"))
    _stale(again)  # fills the cache
    restore_newest(again.config, again.engine, again.mesh, corpus=again.corpus.info["fingerprint"], report=print)
    facts["after_restore"] = _stale(again)
    (folder / f"watched-{layout}.rank{trainer.mesh.rank}.json").write_text(json.dumps(facts))


def _stale(trainer: Any) -> int:
    """Cached weights, made now where there are none, that differ from the parameters' quantised anew."""
    stale = 0
    for name, layer in trainer.fp8.layers.items():
        for parameter in trainer.model.get_submodule(name).parameters(recurse=False):
            cached = layer.weight(parameter).forward
            fresh, _ = layer.backend.quantize_weight(parameter.detach(), power_of_two=layer.power_of_two)
            stale += not torch.equal(cached.dequantize(), fresh.dequantize())
    return stale


def _refusal_of_one_rank(folder: Path) -> str:
    """What a rank hears when the backend cannot run on rank 1."""

    def problem(device: torch.device) -> str:
        return "no fans" if dist.get_rank() == 1 else ""

    config = make_config(folder, LAYOUTS[0], variant_of("fp8", "fp32"))
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, fp8_backend="torch"))
    with mock.patch.dict(BACKENDS, torch=(EmulatedBackend, problem)):
        try:
            make_trainer(config)
        except ConfigError as error:
            return str(error)
    return ""
