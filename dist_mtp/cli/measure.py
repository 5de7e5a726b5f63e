"""``dist-mtp plan measure=true``: time the pipeline's units on this device, and plan with these times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dist_mtp.cli.gpus import cuda_device_name
from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.monitor.atomic import replace_text
from dist_mtp.monitor.formatting import percent
from dist_mtp.pipeline.costs import UnitCost, UnitKind, list_units, unit_costs
from dist_mtp.pipeline.devices import resolve_profile
from dist_mtp.pipeline.nodes import on_nodes
from dist_mtp.pipeline.plan import make_plan
from dist_mtp.pipeline.unit_times import UnitTimes, planned_costs

UNIT_TIMES = "unit_times.json"
"""Beside ``plan.json`` in the run folder."""
_ARGUMENT, _FILE_KEY = "measure", "pipeline.unit_times_file"


def take_measure(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``measure=true`` is among the arguments, and the overrides that are left.

    A file of times that the overrides name is left out when measuring: it is what shall be replaced.

    Raises:
        ConfigError: ``measure`` is neither true nor false.
    """
    wanted = False
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != _ARGUMENT:
            overrides.append(argument)
        elif value.lower() in ("true", "false"):
            wanted = value.lower() == "true"
        else:
            raise ConfigError(f"'{argument}' is not measure=true or measure=false")
    if wanted:
        overrides = [override for override in overrides if override.partition("=")[0] != _FILE_KEY]
    return wanted, overrides


def run(config: Config) -> Config:
    """Measure, print the table and write ``unit_times.json``; returns the configuration with the measured times.

    Args:
        config: resolved. Measured is the device that ranks started here would use.

    Raises:
        ConfigError: the device is not there or too small, or the run folder cannot be written.
    """
    import torch

    from dist_mtp.bench.unit_times import measure_unit_times

    gpu = cuda_device_name(config)
    if gpu is not None and not torch.cuda.is_available():
        raise ConfigError("device=cuda needs a GPU to measure, and torch finds none here: measure where there is one")
    file = Path(config.run_dir) / UNIT_TIMES
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{file.parent} cannot be written ({error.strerror}): choose another run.dir") from error
    device = torch.device("cpu") if gpu is None else torch.device("cuda", 0)
    torch.set_num_threads(config.launcher.threads_per_rank)  # as ranks have
    times = measure_unit_times(config, device)
    replace_text(file, json.dumps(times.to_json(), indent=2) + "\n")
    pipeline = dataclasses.replace(config.pipeline, unit_times={**times.seconds})
    measured = dataclasses.replace(config, pipeline=pipeline)
    print(table(measured, times, gpu))
    print(comparison(measured, gpu))
    print(f"\nwritten to {file}; train with it: dist-mtp train {_FILE_KEY}={file} and the same overrides\n")
    return measured


def table(config: Config, times: UnitTimes, cuda_name: str | None = None) -> str:
    """Aligned lines: per kind of unit what was measured, and what the device profile says.

    Args:
        config: resolved, with the measured times.
        cuda_name: GPU name for ``pipeline.device_profile=auto``.
    """
    profile = on_nodes(resolve_profile(config.pipeline.device_profile, cuda_name), config)
    kinds = [unit.kind for unit in list_units(config)]
    measured: dict[UnitKind, UnitCost] = dict(zip(kinds, planned_costs(config, profile), strict=True))
    analytic: dict[UnitKind, UnitCost] = dict(zip(kinds, unit_costs(config, profile), strict=True))
    head = f"{'unit':<10} {'count':>5}  {'F':>9} {'I':>9} {'W':>9} {'measured':>9}  {'analytic':>9}  {'ratio':>6}"
    lines = [
        f"{times.device}, torch {times.torch}, precision={config.precision.name}; milliseconds of a microbatch",
        head,
    ]
    for kind, cost in measured.items():
        parts = "".join(f" {1e3 * seconds:9.3f}" for seconds in (cost.time_f, cost.time_i, cost.time_w, cost.time))
        estimate = analytic[kind].time
        ratio = cost.time / estimate
        lines.append(f"{kind:<10} {kinds.count(kind):5d} {parts}  {1e3 * estimate:9.3f}  {ratio:6.2f}")
    lines.append(
        f"analytic: device profile {profile.name}. Equal ratios would leave the cut as it is, whatever they are"
    )
    if config.parallel.ep > 1:
        lines.append("measured: computation; exchanges between the ranks of parallel.ep are added from the profile")
    return "\n".join(lines)


def comparison(config: Config, cuda_name: str | None = None) -> str:
    """What the step takes in measured times, cut as the device profile has it and as they have it; two aligned lines.

    Args:
        config: resolved, with the measured times.
        cuda_name: GPU name for ``pipeline.device_profile=auto``.
    """

    def changed(**pipeline: Any) -> Config:
        return dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, **pipeline))

    estimated = ",".join(str(len(stage.units)) for stage in make_plan(changed(unit_times={}), cuda_name).stages)
    lines = []
    for name, plan in (
        ("profile's cut", make_plan(changed(layout=estimated), cuda_name)),
        ("measured cut", make_plan(config, cuda_name)),
    ):
        cut = ",".join(str(len(stage.units)) for stage in plan.stages)
        step, bubble = plan.timeline.step_time, percent(plan.timeline.bubble).strip()
        lines.append(f"{name:<13}  step {step:.4g} s, bubble {bubble} in measured times; units per stage {cut}")
    return "\n".join(lines)
