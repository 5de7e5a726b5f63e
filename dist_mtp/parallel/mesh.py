"""The process mesh: which rank holds which pipeline stage and which share of the data."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_mtp.config import Config
from dist_mtp.config_checks import use_cuda_for
from dist_mtp.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """This process's place. ``rank = pp_rank * dp + dp_rank``: neighbours in a node share data-parallel traffic."""

    pp: int
    dp: int
    ep: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    pipe_group: dist.ProcessGroup
    """Ranks of this data replica, ordered by pipeline rank."""
    data_group: dist.ProcessGroup
    """Ranks that hold the same stages."""
    ends_group: dist.ProcessGroup | None
    """First and last pipeline rank of this data replica, on those two ranks; None elsewhere and when pp is 1."""
    expert_group: dist.ProcessGroup | None
    """The ``ep`` consecutive ranks of ``data_group`` that share one set of experts; None when ep is 1."""
    grid: Any
    """DeepSpeed's view of the same mesh (``mpu``)."""

    @property
    def rank(self) -> int:
        return self.pp_rank * self.dp + self.dp_rank

    @property
    def expert_rank(self) -> int:
        """Which part of every layer's experts this rank holds."""
        return self.dp_rank % self.ep

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    def global_rank(self, pp_rank: int) -> int:
        """Rank of another pipeline stage's process in this data replica."""
        return pp_rank * self.dp + self.dp_rank


def init_process_group(timeout_s: float, device: str = "auto") -> torch.device:
    """Join the world that the environment describes (see :mod:`dist_mtp.parallel.environment`) and pick this rank's device.

    Args:
        timeout_s: a collective that takes longer raises on the ranks that wait in it.
        device: ``auto``, ``cpu`` or ``cuda``, the configuration's.

    Raises:
        ConfigError: ``cuda`` with fewer GPUs than ranks on this host, or another program has the port of rank 0.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun calls it LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    gpus = torch.cuda.device_count()
    use_cuda = use_cuda_for(device, local_ranks=local_ranks, gpus=gpus)
    if use_cuda:
        torch.cuda.set_device(local_rank)
    else:
        # Read when deepspeed is imported; on a host with GPUs it would take them.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if device == "auto" and gpus > 0 and local_rank == 0:
            print(
                f"training on the CPU: this host has {gpus} GPU{'s' * (gpus > 1)} for {local_ranks} ranks; parallel.pp x "
                f"parallel.dp of at most {gpus} would use the GPU{'s' * (gpus > 1)}",
                file=sys.stderr,
            )
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")

    import deepspeed

    if not use_cuda:
        _skip_shared_memory_op()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']} of {socket.gethostname()}, where the ranks meet, is in use: end the program "
                "that has it, or choose another port (launcher.rendezvous=HOST:PORT, or --master_port of deepspeed and torchrun)"
            ) from error
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", verbose=False, dist_init_required=False)
    return chosen


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory op, which only its inference all-reduce uses.

    ``deepspeed.comm.torch`` (0.19.8) builds it in every ``init_distributed``: minutes on a first run, and a process killed
    meanwhile leaves a lock file that makes every later run of the user wait without a word.
    """
    # Through sys.modules: the attribute deepspeed.comm.torch is PyTorch itself.
    module: Any = sys.modules["deepspeed.comm.torch"]
    module.build_shm_op = lambda: None


def make_mesh(config: Config, device: torch.device) -> Mesh:
    """Build all process groups; every rank must call it at the same time.

    Raises:
        ConfigError: the world does not have ``pp * dp`` ranks.
    """
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid

    pp, dp = config.parallel.pp, config.dp
    if dist.get_world_size() != pp * dp:
        raise ConfigError(
            f"{dist.get_world_size()} ranks were started, but parallel.pp={pp} x parallel.dp={dp} needs {pp * dp}"
        )
    with contextlib.redirect_stdout(None):  # it prints the topology
        grid = PipelineParallelGrid(topology=PipeDataParallelTopology(pp, dp), process_group=dist.group.WORLD)
    pp_rank, dp_rank = grid.get_pipe_parallel_rank(), grid.get_data_parallel_rank()
    ends_group = None
    if pp > 1:
        for replica in range(dp):  # creating a group is collective: every rank creates every group
            group = dist.new_group([replica, (pp - 1) * dp + replica])
            if replica == dp_rank and pp_rank in (0, pp - 1):
                ends_group = group
    return Mesh(
        pp=pp,
        dp=dp,
        ep=config.parallel.ep,
        pp_rank=pp_rank,
        dp_rank=dp_rank,
        device=device,
        pipe_group=grid.get_pipe_parallel_group(),
        data_group=grid.get_data_parallel_group(),
        ends_group=ends_group,
        expert_group=_expert_group(pp, config.parallel.ep) if config.parallel.ep > 1 else None,
        grid=grid,
    )


def _expert_group(pp: int, ep: int) -> dist.ProcessGroup:
    """This rank's expert-parallel group; DeepSpeed keeps it, and the groups in which expert gradients are reduced."""
    from deepspeed.utils import groups

    name = expert_group_name(ep)
    # Kept by name: a mesh with another pp in the same process would get the groups of the first one.
    for kept in ("EXPERT_PARALLEL", "EXPERT_DATA_PARALLEL"):
        getattr(groups, f"_{kept}_GROUP").pop(name, None)
        getattr(groups, f"_{kept}_GROUP_RANKS").pop(name, None)
    groups._create_expert_and_data_parallel(ep, pp_size=pp)
    return groups._get_expert_parallel_group(name)


def expert_group_name(ep: int) -> str:
    """What DeepSpeed calls the groups of ``ep`` ranks that share experts."""
    return f"ep_size_{ep}"
