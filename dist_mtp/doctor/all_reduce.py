"""Two ranks on this machine that really add a tensor: ``python -m dist_mtp.doctor.all_reduce`` is one of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_mtp.config import LauncherConfig
from dist_mtp.doctor.finding import Finding
from dist_mtp.errors import ConfigError
from dist_mtp.parallel.environment import prepare_environment

TIMEOUT_S = 60.0
"""Importing torch included."""
_LAST_LINES = 3
_POLL_S = 0.02


@dataclass(frozen=True)
class Outcome:
    """What became of the ranks."""

    seconds: float
    codes: tuple[int | None, ...]
    """Exit code of each; None for one that was still running when time was up or another one failed."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """Of rank 0: ``sum``, ``seconds`` of the exchange alone, ``gpus`` that torch sees, and why ``deepspeed`` cannot be
    imported (empty: it can)."""
    errors: str = ""
    """Last lines that the first rank that failed wrote."""


def check_all_reduce(backend: str, outcome: Outcome) -> Finding:
    """One finding, whatever happened."""
    name, ranks = f"{backend} all-reduce", len(outcome.codes)
    expected = ranks * (ranks + 1) / 2
    if all(code == 0 for code in outcome.codes) and outcome.answer.get("sum") == expected:
        took = f"{1e3 * outcome.answer['seconds']:.1f} ms"
        return Finding(name, "ok", f"{ranks} ranks on this machine, {took}, {outcome.seconds:.0f} s with their start")
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    if None in outcome.codes and not any(outcome.codes):
        what = f"{ranks} ranks on this machine did not end within {outcome.seconds:.0f} s"
        return Finding(name, "error", what, f"see that no firewall stops loopback traffic; {interface}=lo may help")
    what = f"{ranks} ranks on this machine failed: {outcome.errors or f'exit codes {list(outcome.codes)}, wrong sum'}"
    return Finding(
        name, "error", what, f"set launcher.interface, or {interface}, to one that is up; else reinstall torch"
    )


def check_deepspeed_imports(problem: str | None) -> Finding | None:
    """Args: ``problem`` that its import raised, empty if none; None if the rank that would import it has failed."""
    if problem is None:
        return None
    if not problem:
        return Finding("import deepspeed", "ok", "works, and so does torch")
    fix = "pip install --force-reinstall --no-deps the supported version of the package that it names"
    return Finding("import deepspeed", "error", problem, fix)


def check_torch_sees_gpus(listed: int, seen: int | None, *, device: str) -> Finding | None:
    """None where torch sees what the driver lists.

    Args:
        listed: GPUs that ``nvidia-smi`` lists for processes started here.
        seen: by torch; None if it could not be asked.
    """
    if seen is None or seen >= listed:
        return None
    fix = "install a torch built for CUDA and a driver new enough for it, see python -m torch.utils.collect_env"
    return Finding("torch GPUs", "error" if device == "cuda" else "warning", f"torch sees {seen} of {listed} GPUs", fix)


def try_all_reduce(
    backend: str, ranks: int, launcher: LauncherConfig, *, started: int | None = None, timeout_s: float = TIMEOUT_S
) -> Outcome:
    """Start the ranks and wait for them; none outlives this call.

    Args:
        launcher: decides their environment, as it does in training.
        started: fewer than ``ranks`` leave those waiting for the others.
    """
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        _ranks(Path(folder), backend, ranks, started or ranks, launcher) as processes,
    ):
        codes = _wait(processes, begin + timeout_s)
        seconds = time.monotonic() - begin
        answer, errors = {}, ""
        if codes[0] == 0:
            answer = json.loads((Path(folder) / "out_0").read_text().splitlines()[-1])
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            said = (Path(folder) / f"err_{failed}").read_text(errors="replace").strip().splitlines()
            errors = " / ".join(line.strip() for line in said[-_LAST_LINES:])
    return Outcome(seconds, codes, answer, errors)


@contextlib.contextmanager
def _ranks(
    folder: Path, backend: str, ranks: int, started: int, launcher: LauncherConfig
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Running ranks, each with its output in ``folder``."""
    command = [sys.executable, "-m", "dist_mtp.doctor.all_reduce", backend]
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for rank in range(started):
            argv = [*command, str(rank), str(ranks), str(folder / "store")]
            out, err = (stack.enter_context(open(folder / f"{kind}_{rank}", "wb")) for kind in ("out", "err"))
            env = _environment(rank, ranks, launcher)
            processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env))
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> tuple[int | None, ...]:
    """Exit codes, when all have ended, time is up, or one has failed, for which the others would wait."""
    while True:
        codes = tuple(process.poll() for process in processes)
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(_POLL_S)


def _environment(rank: int, ranks: int, launcher: LauncherConfig) -> dict[str, str]:
    """Of a rank that is trained on this machine alone, with the network interface that it would get."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    env = {**os.environ, **{name: str(number) for name, number in place.items()}, "MASTER_ADDR": "127.0.0.1"}
    with contextlib.suppress(ConfigError):  # an interface that does not exist is a finding of its own
        prepare_environment(env, launcher)
    return env


def main(arguments: list[str] | None = None) -> int:
    """One rank: adds rank + 1 over all ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("store", help="a file that does not exist")
    parsed = parser.parse_args(arguments)

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", parsed.rank) if parsed.backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        parsed.backend,
        init_method=f"file://{parsed.store}",
        rank=parsed.rank,
        world_size=parsed.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    dist.all_reduce(torch.zeros(1, device=device))  # connects
    begin = time.perf_counter()
    total = torch.full((1,), parsed.rank + 1.0, device=device)
    dist.all_reduce(total)
    result = total.item()
    seconds = time.perf_counter() - begin
    dist.destroy_process_group()
    if parsed.rank == 0:
        answer = {"sum": result, "seconds": seconds, "gpus": torch.cuda.device_count(), "deepspeed": _import_problem()}
        print(json.dumps(answer))
    return 0


def _import_problem() -> str:
    """Why DeepSpeed, which needs much more than its own files, cannot be imported; empty if it can."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where its log goes from now on
            import deepspeed  # noqa: F401
    except Exception as error:  # whatever broken packages raise
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
