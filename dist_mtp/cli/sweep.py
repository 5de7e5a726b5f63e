"""``dist-mtp train -m``: Hydra expands the sweep, every point is one ``dist-mtp train`` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from dist_mtp.cli.compose import check_overrides, from_composed, register_schema
from dist_mtp.errors import EXIT_CONFIG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_TERMINATED, ConfigError
from dist_mtp.monitor.result import read_result


def sweep(overrides: list[str]) -> int:
    """Run all points one after the other, each in ``sweeps/<run name>/<point>``; returns the first failing exit code.

    A point that fails does not keep the others from running; a signal does.
    """
    register_schema()
    fixed = check_overrides(overrides)
    codes: list[int] = []
    signals: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://dist_mtp.conf", config_name="config")
    def point(composed: DictConfig) -> float | None:
        if signals:
            codes.append(EXIT_INTERRUPTED if signals[0] == signal.SIGINT else EXIT_TERMINATED)
        if {EXIT_INTERRUPTED, EXIT_TERMINATED} & set(codes):
            return None
        job = HydraConfig.get()
        try:
            run_name = from_composed(composed).run_name
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            codes.append(EXIT_CONFIG)
            return None
        run_dir = Path("sweeps") / run_name / _point_name(fixed, job.overrides.task, job.job.num)
        arguments = [*job.overrides.task, f"run.dir='{run_dir}'"]
        codes.append(_run([sys.executable, "-m", "dist_mtp.cli.main", "train", *arguments], signals))
        result = read_result(run_dir)
        return None if result is None else result["objective"]

    sys.argv = ["dist-mtp", "--multirun", *fixed]
    try:
        point()
    except SystemExit:  # Hydra has printed what it cannot compose
        return EXIT_CONFIG
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)


def _run(command: list[str], signals: list[int]) -> int:
    """Exit code of the point, which saves a checkpoint before it ends by a signal; what arrives is added to ``signals``."""
    with subprocess.Popen(command) as process:

        def terminate(number: int, frame: object) -> None:
            signals.append(number)
            process.terminate()

        signal.signal(signal.SIGTERM, terminate)
        # A terminal has sent it to the point as well.
        signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
        return process.wait()


def _point_name(fixed: Sequence[str], overrides: Sequence[str], number: int) -> str:
    """``mtp.depth=0,optim.lr=0.001``: the overrides that tell this point from the others, as a folder's name."""
    parsed = OverridesParser.create().parse_overrides(list(fixed))
    # Sweepers pass on what all points share in this spelling.
    shared = {f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in parsed if not o.is_sweep_override()}
    name = re.sub(r"[^\w.,=+-]", "_", ",".join(override for override in overrides if override not in shared))
    return name if 0 < len(name) <= 200 else str(number)
