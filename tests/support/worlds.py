"""What the ranks of the layout tests do, one function per number of ranks; see ``tests/parallel/test_layouts.py``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.parity import ALL_VARIANTS, REFERENCE, Layout, Variant, layouts, make_config, run_steps

FOUR_RANK_VARIANTS = (Variant(1), Variant(2, tied=True), Variant(3))
EVALUATED = Variant(2)
"""Evaluated before each step in every layout of two ranks."""
ODD_MICROBATCHES = {
    Layout("v", "zbv", 2): (1, 2, 5),
    Layout("v", "gpipe", 2): (1, 5),
    Layout("last", "1f1b", 2): (1, 5),
    Layout("last", "gpipe", 2): (1, 3),
    Layout("last", "interleaved_1f1b", 2): (1, 6),
}
"""Numbers of microbatches below, and no multiple of, the number of ranks."""
SPECIAL_VARIANTS = (
    Variant(3, extra=(("mtp.share_depths", True),)),
    Variant(2, extra=(("mtp.hidden", "pre_norm"),)),
    Variant(2, extra=(("mtp.normalize", "paper"),)),
    Variant(1, extra=(("mtp.block", "dense"),)),
    Variant(1, extra=(("model.n_routed_experts", 0),)),
    Variant(1, extra=(("pipeline.layout", "uniform"),)),
)
SPECIAL_LAYOUTS = (Layout("v", "zbv", 2), Layout("last", "1f1b", 2))


def evaluated(layout: Layout) -> Variant:
    """A variant of its own, so that its run folder is, too."""
    return dataclasses.replace(EVALUATED, extra=(("eval.batches", 2), ("run.name", f"evaluated-{layout}")))


def world_of_1(folder: Path) -> None:
    odd = [dataclasses.replace(Variant(1), micro_batches=m) for ms in ODD_MICROBATCHES.values() for m in ms]
    for variant in dict.fromkeys([*ALL_VARIANTS, *odd, *SPECIAL_VARIANTS]):
        run_steps(make_config(folder, REFERENCE, variant))


def world_of_2(folder: Path) -> None:
    for layout in layouts(2):
        for variant in ALL_VARIANTS:
            trainer = run_steps(make_config(folder, layout, variant))
            _write_facts(trainer, folder / "facts" / f"{variant}-{layout}")
        run_steps(make_config(folder, layout, evaluated(layout)), evaluate_between=True)
    for layout, counts in ODD_MICROBATCHES.items():
        for count in counts:
            run_steps(make_config(folder, layout, dataclasses.replace(Variant(1), micro_batches=count)))
    for layout in SPECIAL_LAYOUTS:
        for variant in SPECIAL_VARIANTS:
            run_steps(make_config(folder, layout, variant))


def world_of_4(folder: Path) -> None:
    for layout in layouts(4):
        for variant in FOUR_RANK_VARIANTS:
            run_steps(make_config(folder, layout, variant))


def whole_matrix(folder: Path) -> None:
    """Every variant in every layout of this world; ``benchmarks/parity.py``."""
    size = int(os.environ["WORLD_SIZE"])
    for variant in ALL_VARIANTS:
        for layout in layouts(size) if size > 1 else [REFERENCE]:
            run_steps(make_config(folder, layout, variant))


def _write_facts(trainer: Any, path: Path) -> None:
    """What this rank knows about shared parameters and traffic."""
    engine, model = trainer.engine, trainer.model
    flat = [p for group in _optimized_parameters(engine) for p in group]
    facts: dict[str, Any] = {
        "bytes_sent": {f"{a}->{b}": n for (a, b), n in trainer.runtime.bytes_sent.items()},
        "optimized_names": [name for name, p in engine.named_parameters() if any(p is q for q in flat)],
        "optimized_count": len(flat),
    }
    if hasattr(model.model, "embed_tokens"):
        used: list[torch.nn.Module] = []
        hook = model.model.embed_tokens.register_forward_hook(lambda module, *_: used.append(module))
        trainer.evaluate()
        hook.remove()
        facts["embedding_objects"] = len({id(module) for module in used})
        facts["embedding_storages"] = len({module.weight.data_ptr() for module in used})
        facts["embedding_uses"] = len(used)
        facts["embeddings_in_optimizer"] = sum(p is model.model.embed_tokens.weight for p in flat)
    else:
        trainer.evaluate()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(f".rank{trainer.mesh.rank}.json").write_text(json.dumps(facts))
    dist.barrier()


def _optimized_parameters(engine: Any) -> list[list[torch.nn.Parameter]]:
    return engine.optimizer.bit16_groups
