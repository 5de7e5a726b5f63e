"""Small exchanges of plain numbers and text between ranks, without pickling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dist_mtp import errors
from dist_mtp.errors import ConfigError, DistMtpError

_DONE = "done"


def all_sum(values: Sequence[float], device: torch.device, group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum of each value over the ranks of ``group`` (all ranks by default), in float64: exact for counts."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


def all_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Maximum of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_text(text: str, device: torch.device, *, src: int = 0, group: dist.ProcessGroup | None = None) -> str:
    """Text of rank ``src`` on every rank."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(encoded.numel(), device=device)
    dist.broadcast(length, src=src, group=group)
    if length.item() == 0:
        return ""
    if dist.get_rank() != src:
        encoded = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    dist.broadcast(encoded, src=src, group=group)
    return bytes(encoded.tolist()).decode()


def any_problem(problem: str, device: torch.device) -> str:
    """The problem of one of the ranks that have one, on every rank; empty if none has. So all can raise together."""
    (finder,) = all_max([dist.get_rank() + 1 if problem else 0], device)
    return broadcast_text(problem, device, src=int(finder) - 1) if finder else ""


def from_rank_0(work: Callable[[], str], device: torch.device, *, group: dist.ProcessGroup | None = None) -> str:
    """What ``work`` returns on rank 0, on every rank.

    Raises:
        DistMtpError: the one that rank 0 met, on every rank, so that none is left waiting.
    """
    outcome = ""
    if dist.get_rank() == 0:
        try:
            outcome = f"{_DONE}:{work()}"
        except DistMtpError as error:
            outcome = f"{type(error).__name__}:{error}"
    kind, _, text = broadcast_text(outcome, device, group=group).partition(":")
    if kind == _DONE:
        return text
    refusal: type[DistMtpError] = getattr(errors, kind)
    raise refusal(text)


def check_same_hash(
    digest: str, device: torch.device, what: str, fix: str = "start all ranks with the same arguments"
) -> None:
    """Refuse to go on when ranks disagree.

    Args:
        digest: hexadecimal SHA-256 of ``what`` on this rank.
        fix: what a user does about it.

    Raises:
        ConfigError: on every rank, naming the ranks that differ from rank 0.
    """
    own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    differing = [rank for rank, other in enumerate(gathered) if not torch.equal(other, gathered[0])]
    if differing:
        raise ConfigError(f"ranks {differing} have another {what} than rank 0: {fix}")
