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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_mtp.doctor.finding import Finding

TIMEOUT_S = 60.0
"""Importing torch included."""
_LAST_LINES = 3


@dataclass(frozen=True)
class Outcome:
    """What became of the ranks."""

    seconds: float
    codes: tuple[int | None, ...]
    """Exit code of each; None for one that was still running when time was up."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """Of rank 0: ``sum``, ``seconds`` of the exchange alone, and ``gpus`` that torch sees."""
    errors: str = ""
    """Last lines that the first rank that failed wrote."""


def check_all_reduce(backend: str, outcome: Outcome) -> Finding:
    """One finding, whatever happened."""
    name, ranks = f"{backend} all-reduce", len(outcome.codes)
    expected = ranks * (ranks + 1) / 2
    if all(code == 0 for code in outcome.codes) and outcome.answer.get("sum") == expected:
        took = f"{1e3 * outcome.answer['seconds']:.1f} ms"
        return Finding(name, "ok", f"{ranks} ranks on this machine, {took}, {outcome.seconds:.0f} s with their start")
    interface = f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
    if None in outcome.codes:
        what = f"{ranks} ranks on this machine did not end within {outcome.seconds:.0f} s"
        return Finding(name, "error", what, f"see that no firewall stops loopback traffic; {interface}=lo may help")
    what = f"failed with exit codes {list(outcome.codes)}: {outcome.errors or 'wrong sum'}"
    return Finding(name, "error", what, f"see that the host name resolves, or set {interface}; else reinstall torch")


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


def try_all_reduce(backend: str, ranks: int, *, started: int | None = None, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Start the ranks and wait for them; none outlives this call.

    Args:
        started: fewer than ``ranks`` leave those waiting for the others.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _ranks(Path(folder), backend, ranks, started or ranks) as processes:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begin + timeout_s - time.monotonic()))
        codes = tuple(process.poll() for process in processes)
        seconds = time.monotonic() - begin
        answer, errors = {}, ""
        if codes[0] == 0:
            answer = json.loads((Path(folder) / "out_0").read_text().splitlines()[-1])
        for rank, code in enumerate(codes):
            if code and not errors:
                said = (Path(folder) / f"err_{rank}").read_text(errors="replace").strip().splitlines()
                errors = " / ".join(line.strip() for line in said[-_LAST_LINES:])
    return Outcome(seconds, codes, answer, errors)


@contextlib.contextmanager
def _ranks(folder: Path, backend: str, ranks: int, started: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for rank in range(started):
            argv = [
                sys.executable,
                "-m",
                "dist_mtp.doctor.all_reduce",
                backend,
                str(rank),
                str(ranks),
                str(folder / "store"),
            ]
            out, err = (stack.enter_context(open(folder / f"{kind}_{rank}", "wb")) for kind in ("out", "err"))
            processes.append(
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_environment())
            )
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


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
    print(json.dumps({"sum": result, "seconds": seconds, "gpus": torch.cuda.device_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
