"""The problem of cutting a model into stages, as the searches want it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from dist_mtp.pipeline.costs import UnitCost
from dist_mtp.pipeline.memory_limit import DoesNotFit, MemoryLimit
from dist_mtp.pipeline.sweeps import Floats, Load, Moves, Sweeps, within

Counts = tuple[int, ...]
"""Units per stage."""

_NONE = np.zeros(1)
"""Sums over an empty sequence."""


@dataclass(frozen=True)
class Balance:
    """One model to be cut; makes the searches' inputs.

    Args:
        costs: one per unit, in order.
        stage_to_rank: of a V, or round the ranks once or several times.
        limit: of each rank's memory.
    """

    costs: Sequence[UnitCost]
    stage_to_rank: tuple[int, ...]
    limit: MemoryLimit | None

    @property
    def num_units(self) -> int:
        return len(self.costs)

    @property
    def num_ranks(self) -> int:
        return max(self.stage_to_rank) + 1

    @property
    def num_sweeps(self) -> int:
        return len(self.stage_to_rank) // self.num_ranks

    @property
    def is_v(self) -> bool:
        ranks = tuple(range(self.num_ranks))
        return self.stage_to_rank == ranks + ranks[::-1]

    @property
    def cap(self) -> float:
        return self.limit.bytes if self.limit is not None else math.inf

    @cached_property
    def times(self) -> Floats:
        """``times[k]``: of the first k units."""
        return _sums(cost.time for cost in self.costs)

    @cached_property
    def memory(self) -> tuple[tuple[tuple[Floats, ...], ...], ...]:
        """``memory[rank][combination][stage of the rank][k]``: bytes of the first k units, were they on that stage."""
        if self.limit is None:
            return ((),) * self.num_ranks
        static = _sums(self.limit.static_bytes)
        activations = _sums(cost.activation_bytes for cost in self.costs)
        return tuple(
            tuple(tuple(static + count * activations for count in counts) for counts in combinations)
            for combinations in self.limit.in_flight
        )

    def extra(self, rank: int) -> float:
        return self.limit.extra_bytes[rank] if self.limit is not None else 0.0

    def alternatives(self) -> list[Sweeps]:
        """All ways with up to two stages per rank."""
        if self.is_v:
            return [self._v()]
        if self.num_sweeps == 1:
            return [self._line()]
        return self.pair(0, (0,) * 2 * self.num_ranks + (self.num_units,))

    def _v(self) -> Sweeps:
        ranks = range(self.num_ranks)
        time = Load(self.times, _reverse(self.times))
        return Sweeps(
            num_units=self.num_units,
            times=tuple(time for _ in ranks),
            memory=tuple(
                tuple(Load(down, _reverse(up), self.extra(rank)) for down, up in self.memory[rank]) for rank in ranks
            ),
            least=tuple((int(rank == 0), int(rank == 0)) for rank in ranks),
            least_together=tuple(1 for _ in ranks),
        )

    def _line(self) -> Sweeps:
        ranks = range(self.num_ranks)
        return Sweeps(
            num_units=self.num_units,
            times=tuple(Load(self.times, _NONE) for _ in ranks),
            memory=tuple(tuple(Load(sums, _NONE, self.extra(rank)) for (sums,) in self.memory[rank]) for rank in ranks),
            least=tuple((1, 0) for _ in ranks),
            least_together=tuple(1 for _ in ranks),
        )

    def pair(self, sweep: int, cuts: Sequence[int], window: int | None = None) -> list[Sweeps]:
        """All ways to cut what ``sweep`` and the next one hold, one for each split point; the other sweeps stay as in ``cuts``.

        Args:
            cuts: ``cuts[stage]`` is the first unit of a stage; there is one more for the end.
            window: only split points so near to the present one.
        """
        count, second = self.num_ranks, sweep + 1
        start, stop = cuts[sweep * count], cuts[(sweep + 2) * count]
        held = [
            [stage for stage in range(rank, len(self.stage_to_rank), count) if stage // count not in (sweep, second)]
            for rank in range(count)
        ]

        def others(rank: int, sums: Callable[[int], Floats]) -> float:
            return sum(float(sums(s // count)[cuts[s + 1]] - sums(s // count)[cuts[s]]) for s in held[rank])

        time_bases = [others(rank, lambda _: self.times) for rank in range(count)]
        memory_bases = [
            [self.extra(rank) + others(rank, sums.__getitem__) for sums in self.memory[rank]] for rank in range(count)
        ]
        first_needs, last_needs = int(sweep == 0), int(second == self.num_sweeps - 1)

        def split_at(middle: int) -> Sweeps:
            def load(first: Floats, second: Floats, base: float) -> Load:
                return Load(first[start : middle + 1] - first[start], second[middle : stop + 1] - second[middle], base)

            return Sweeps(
                num_units=stop - start,
                times=tuple(load(self.times, self.times, base) for base in time_bases),
                memory=tuple(
                    tuple(
                        load(sums[sweep], sums[second], base)
                        for sums, base in zip(self.memory[rank], memory_bases[rank], strict=True)
                    )
                    for rank in range(count)
                ),
                least=tuple(
                    (first_needs * int(rank == 0), last_needs * int(rank == count - 1)) for rank in range(count)
                ),
                least_together=tuple(int(all(cuts[s] == cuts[s + 1] for s in held[rank])) for rank in range(count)),
            )

        middles = range(start + first_needs, stop - last_needs + 1)
        if window is not None:
            now = cuts[second * count]
            middles = range(max(middles.start, now - window), min(middles.stop, now + window + 1))
        halves = sorted(middles, key=lambda m: abs(2 * self.times[m] - self.times[start] - self.times[stop]))
        return [split_at(middle) for middle in halves]

    def counts(self, moves: Moves) -> Counts:
        """Units per stage, from units per rank."""
        firsts, seconds = zip(*moves, strict=True)
        if self.is_v:
            return (*firsts, *seconds[::-1])
        return firsts if self.num_sweeps == 1 else (*firsts, *seconds)

    def loads(self, counts: Counts) -> tuple[list[float], list[float]]:
        """Time and, if there is a limit, most bytes of each rank."""
        cuts = list(accumulate(counts, initial=0))
        stages = [
            [stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank] for rank in range(self.num_ranks)
        ]

        def held(rank: int, sums: Sequence[Floats]) -> float:
            return sum(float(x[cuts[s + 1]] - x[cuts[s]]) for x, s in zip(sums, stages[rank], strict=True))

        return (
            [held(rank, [self.times] * len(stages[rank])) for rank in range(self.num_ranks)],
            [
                self.extra(rank) + max((held(rank, sums) for sums in self.memory[rank]), default=0.0)
                for rank in range(self.num_ranks)
            ],
        )

    def fits(self, counts: Counts) -> bool:
        """Whether no rank holds more than the cap."""
        return max(self.loads(counts)[1]) <= within(self.cap)

    def too_large(self, counts: Counts) -> DoesNotFit:
        """What to tell the user if even the partition that needs least memory, ``counts``, needs too much."""
        memory = self.loads(counts)[1]
        rank = max(range(self.num_ranks), key=memory.__getitem__)
        return DoesNotFit(
            f"no partition fits: in the one that needs least, pipeline rank {rank} needs {memory[rank] / 1e9:.4g} GB, and "
            f"may have {self.cap / 1e9:.4g} GB: raise parallel.pp or parallel.ep, recompute activations "
            "(pipeline.recompute), lower train.micro_batch_size or train.seq_len, or set optim.moment_dtype=bf16"
        )

    def too_many_ranks(self) -> DoesNotFit:
        """What to tell the user if the model fits only where some rank has no unit."""
        return DoesNotFit(
            f"the model fits {self.cap / 1e9:.4g} GB per rank only if some of the {self.num_ranks} pipeline ranks hold "
            "nothing: lower parallel.pp"
        )


def uniform_counts(num_units: int, num_stages: int) -> Counts:
    """Equally many units for each stage, the first stages one more if need be; of too few units one is the last stage's."""
    if num_units < num_stages:
        return (1,) * (num_units - 1) + (0,) * (num_stages - num_units) + (1,)
    share, remainder = divmod(num_units, num_stages)
    return tuple(share + (stage < remainder) for stage in range(num_stages))


def _sums(values: Iterable[float]) -> Floats:
    return np.array(list(accumulate(values, initial=0.0)))


def _reverse(sums: Floats) -> Floats:
    """From sums of the first k units to sums of the last k."""
    return sums[-1] - sums[::-1]
