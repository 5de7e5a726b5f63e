"""A grid as one Slurm job array: every point is checked and its folder prepared here, then one job trains each of them."""

from __future__ import annotations

from collections.abc import Sequence

from dist_mtp.cli.train import prepare_job
from dist_mtp.errors import EXIT_DONE
from dist_mtp.launch import slurm
from dist_mtp.sweep.definition import Sweep, expand
from dist_mtp.sweep.task import finished


def is_array(sweep: Sweep) -> bool:
    """Whether the points are known beforehand and are all to become Slurm jobs."""
    return sweep.settings["launcher"]["name"] == "slurm" and (sweep.sweeper, sweep.launcher) == ("basic", "basic")


def submit(sweep: Sweep, overrides: Sequence[str]) -> int:
    """Queue the points that are not finished; returns 0 once they are, or the first failing exit code if asked to wait.

    Raises:
        ConfigError: a point cannot work, or points ask for different nodes; nothing was queued.
    """
    points = expand(overrides)
    left = [point for point in points if point.config.resume == "never" or finished(point.folder, point.config) is None]
    print(f"{len(points) - len(left)} of {len(points)} points are finished")
    if not left:
        return EXIT_DONE
    jobs = [prepare_job(point.config) for point in left]
    if left[0].config.launcher.dry_run:
        print(slurm.array_script(jobs[0].config, len(jobs), sweep.folder))
        return EXIT_DONE
    return slurm.submit_array([job.config for job in jobs], [job.corpus for job in jobs], sweep.folder)
