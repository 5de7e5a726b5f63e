"""What the ranks of ``tests/parallel/test_expert_engine.py`` do: train, save, and go on in other layouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from support.parity import STEPS, Layout, make_config, make_trainer, run_dir
from support.worlds import BALANCED

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.parallel.engine import check_equal_groups
from dist_mtp.parallel.mesh import Mesh

BEGUN_IN = Layout("v", "zbv", 1, 4, 2)
CONTINUED_IN = (
    BEGUN_IN,
    Layout("v", "zbv", 1, 4, 4),
    Layout("v", "dualpipev", 2, 2, 1),
    Layout("last", "1f1b", 2, 2, 2),
)


def continued(folder: Path, layout: Layout) -> Path:
    return folder / "continued" / str(layout)


def world_of_4(folder: Path) -> None:
    """Train to the last step with a checkpoint before it; then, from there, the last step in each layout."""
    begun = make_config(folder, BEGUN_IN, BALANCED)
    _train(dataclasses.replace(begun, checkpoint=dataclasses.replace(begun.checkpoint, every=STEPS - 1)))
    checkpoint = run_dir(folder, BEGUN_IN, BALANCED) / "checkpoints" / f"step_{STEPS - 1:08d}"
    for layout in CONTINUED_IN:
        config = make_config(folder, layout, BALANCED)
        run = dataclasses.replace(config.run, dir=str(continued(folder, layout)))
        trainer = _train(dataclasses.replace(config, run=run, resume=str(checkpoint)))
    (folder / f"refusal.rank{trainer.mesh.rank}").write_text(_refusal_of_unequal_groups(trainer.mesh))


def _train(config: Config) -> Any:
    trainer = make_trainer(config)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    trainer.run()
    return trainer


def _refusal_of_unequal_groups(mesh: Mesh) -> str:
    """The error when the third rank lacks experts."""
    groups = [{"name": "matrices", "params": [1]}, {"name": "ep_size_2", "params": [] if mesh.rank == 2 else [1]}]
    try:
        check_equal_groups(groups, mesh)
    except ConfigError as error:
        return str(error)
    return ""
