"""FP8 over all ranks: one backend for everybody, statistics of the whole model."""

from __future__ import annotations

import hashlib

from dist_mtp.config import Config
from dist_mtp.errors import ConfigError
from dist_mtp.model.transformer import LanguageModel
from dist_mtp.parallel.collectives import all_max, all_sum, any_problem, check_same_hash
from dist_mtp.parallel.mesh import Mesh
from dist_mtp.precision.fp8.backend import Fp8Backend, make_backend
from dist_mtp.precision.fp8.layer import Fp8Model, attach_fp8
from dist_mtp.precision.fp8.statistics import Fp8Statistics, fits


def make_fp8(config: Config, model: LanguageModel, mesh: Mesh) -> Fp8Model | None:
    """Make this rank's layers multiply in FP8 if ``precision=fp8``. Collective.

    Raises:
        ConfigError: the backend cannot run here, or ranks would use different ones.
    """
    precision = config.precision
    if precision.name != "fp8":
        return None
    backend = _make_backend(precision.fp8_backend, mesh)
    check_same_hash(
        hashlib.sha256(backend.name.encode()).hexdigest(),
        mesh.device,
        "FP8 backend",
        "name one that runs on all of them, precision.fp8_backend=emulated for example",
    )
    return attach_fp8(
        model,
        backend,
        keep_bf16=precision.fp8_keep_bf16,
        power_of_two=precision.fp8_power_of_two_scales,
        fp8_dispatch=precision.fp8_dispatch,
    )


def _make_backend(name: str, mesh: Mesh) -> Fp8Backend:
    """This rank's backend; where it cannot run on one rank, all refuse it. Collective."""
    problem, backend = "", None
    try:
        backend = make_backend(name, mesh.device)
    except ConfigError as error:
        problem = f"rank {mesh.rank}: {error}"
    if found := any_problem(problem, mesh.device):
        raise ConfigError(found)
    assert backend is not None
    return backend


def fp8_metrics(statistics: Fp8Statistics, mesh: Mesh) -> dict[str, float]:
    """``fp8_underflow_KIND_ROLE`` and its like for everything quantised since the last call, on all ranks. Collective."""
    sums, extremes = statistics.take()
    reduced = fits(all_sum(sums, mesh.device), all_max(extremes, mesh.device))
    return {
        f"fp8_{quantity}_{kind}_{role}": value
        for (kind, role), fit in reduced.items()
        for quantity, value in vars(fit).items()
    }
