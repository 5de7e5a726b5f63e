"""``dist-mtp train -m``: Hydra expands the sweep, every point is one ``dist-mtp train`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dist_mtp.cli.compose import check_overrides, from_composed, register_schema
from dist_mtp.errors import EXIT_DONE
from dist_mtp.monitor.result import read_result


def sweep(overrides: list[str]) -> int:
    """Run all points one after the other, each in ``sweeps/<run name>/<point>``; returns the first failing exit code."""
    register_schema()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://dist_mtp.conf", config_name="config")
    def point(composed: DictConfig) -> float | None:
        config = from_composed(composed)
        job = HydraConfig.get()
        run_dir = Path("sweeps") / config.run_name / (job.job.override_dirname or str(job.job.num))
        arguments = [*job.overrides.task, f"run.dir='{run_dir}'"]
        done = subprocess.run([sys.executable, "-m", "dist_mtp.cli.main", "train", *arguments], check=False)
        codes.append(done.returncode)
        result = read_result(run_dir)
        return None if result is None else result["objective"]

    sys.argv = ["dist-mtp", "--multirun", *check_overrides(overrides)]
    point()
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)
