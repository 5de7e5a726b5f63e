"""Measuring a step: a clock on every rank, and one timeline from all of them.

Only measured steps have a clock; the others read none. A clock changes no number: it neither computes nor reorders.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mtp.parallel.collectives import all_sum
from dist_mtp.parallel.mesh import Mesh
from dist_mtp.pipeline.plan import Plan
from dist_mtp.pipeline.timeline import MeasuredTimeline, from_marks

MARKS = 3
"""Times of one action, see :meth:`~dist_mtp.pipeline.runtime.PipelineRuntime.train_step`."""


class Clock:
    """Seconds since all ranks left one barrier, of which each counts from its own leave: their clocks need not agree.

    Making one is collective, and is what starts it. On CPU it reads the host's clock. On CUDA it records events, so that
    times are those of the device's stream, and the host is held up only once, by :meth:`seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if self._on_cuda:
            # Events are in the order of the stream: what it still had to do must not count as the first wait.
            torch.cuda.synchronize(device)
        dist.barrier()  # with NCCL, too, the host waits in it
        self.mark()

    def mark(self) -> None:
        """Note the time."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> Tensor:
        """All marks since the start, float64 [actions, 3] on the CPU. Waits for the device."""
        if self._on_cuda:
            self._events[-1].synchronize()  # the last of the stream's, so all are known
            elapsed = [self._events[0].elapsed_time(event) / 1000 for event in self._events[1:]]
        else:
            elapsed = [seconds - self._times[0] for seconds in self._times[1:]]
        return torch.tensor(elapsed, dtype=torch.float64).view(-1, MARKS)


def gather_timeline(clock: Clock, plan: Plan, mesh: Mesh) -> MeasuredTimeline:
    """The step of this rank's data replica, on all of its ranks. Collective."""
    longest = max(len(actions) for actions in plan.table)
    own = torch.zeros(longest, MARKS, dtype=torch.float64, device=mesh.device)
    marks = clock.seconds()
    own[: len(marks)] = marks
    gathered = [torch.empty_like(own) for _ in range(plan.pp)]
    dist.all_gather(gathered, own, group=mesh.pipe_group)
    return from_marks(
        plan.table,
        [times[: len(actions)].tolist() for actions, times in zip(plan.table, gathered, strict=True)],
    )


def timeline_metrics(timeline: MeasuredTimeline, plan: Plan, mesh: Mesh) -> dict[str, float]:
    """Means over all data replicas. Collective.

    ``bubble``, measured, and ``bubble_plan``, simulated; ``stage_K_busy_share`` of each virtual stage; ``pipeline_time``,
    the seconds that the pipeline took of the step; ``p2p_wait_s``, the mean over ranks, so that bubble * pipeline_time -
    p2p_wait_s is what a rank lost otherwise. The bubble takes waits for the all-to-all of ``parallel.ep`` > 1 for
    computation, as they are inside of actions.
    """
    shares = timeline.stage_busy_shares(plan.num_stages)
    waited = sum(timeline.waited) / plan.pp
    # Every rank adds its replica's numbers, so each replica counts pp times.
    sums = all_sum([timeline.bubble, timeline.step_time, waited, *shares], mesh.device)
    bubble, pipeline_time, waited, *shares = (total / mesh.world_size for total in sums)
    return {
        "bubble": bubble,
        "bubble_plan": plan.timeline.bubble,
        "pipeline_time": pipeline_time,
        "p2p_wait_s": waited,
        **{f"stage_{stage}_busy_share": share for stage, share in enumerate(shares)},
    }
