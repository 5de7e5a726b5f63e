"""Measured times of pipeline units, for plans that should fit a device better than its profile does.

``dist-mtp plan measure=true`` measures (``dist_mtp/bench/unit_times.py``) and writes a file; ``pipeline.unit_times_file``
names it. It is read once, where a run is composed: ranks find its numbers in their configuration, so that all of them plan
alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dist_mtp.config import Config, to_dict
from dist_mtp.errors import ConfigError
from dist_mtp.pipeline.costs import Unit, UnitCost, UnitKind, list_units, unit_costs
from dist_mtp.pipeline.devices import DeviceProfile
from dist_mtp.recompute import Recompute

KINDS: tuple[UnitKind, ...] = get_args(UnitKind)
"""Units of one kind have equal shapes in a model, and so one time."""

Seconds = tuple[float, float, float]
"""Forward, input gradient and weight gradient of one microbatch."""
Fact = str | int | float | bool | list[Any] | None

_MEASURE = "measure again with `dist-mtp plan measure=true` and this run's overrides"
_DECISIVE = (
    "model.vocab_size",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_nope_head_dim",
    "model.qk_rope_head_dim",
    "model.v_head_dim",
    "model.intermediate_size",
    "model.n_routed_experts",
    "model.n_shared_experts",
    "model.num_experts_per_tok",
    "model.moe_intermediate_size",
    "model.tie_word_embeddings",
    "mtp.depth",
    "mtp.share_depths",
    "mtp.block",
    "parallel.ep",
    "train.micro_batch_size",
    "train.seq_len",
    "train.loss_chunk",
    "precision.name",
    "precision.fp8_backend",
    "precision.fp8_keep_bf16",
)
"""Keys that change how long a unit takes. The number of layers and of microbatches does not."""
_DECISIVE_ON_CPU = "launcher.threads_per_rank"


@dataclass(frozen=True)
class UnitTimes:
    """What was measured, on what, and with which settings."""

    seconds: Mapping[str, Seconds]
    """Of every kind in the model; computation only, exchanges between the ranks of ``parallel.ep`` not included."""
    device: str
    """Name of the GPU or the processor."""
    device_type: str
    """``cpu`` or ``cuda``."""
    torch: str
    """Version."""
    measured_with: Mapping[str, Fact]
    """Of :func:`decisive_settings`."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``unit_times.json``; times in seconds of one microbatch."""
        return {
            "device": self.device,
            "device_type": self.device_type,
            "torch": self.torch,
            "measured_with": dict(self.measured_with),
            "units": {
                kind: dict(zip(("time_f", "time_i", "time_w"), seconds, strict=True))
                for kind, seconds in self.seconds.items()
            },
        }

    @staticmethod
    def from_json(content: Any) -> UnitTimes:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigError: a field is missing, a kind is none of a unit's, or a time is none that a clock shows.
        """
        try:
            units = {
                kind: (numbers["time_f"], numbers["time_i"], numbers["time_w"])
                for kind, numbers in content["units"].items()
            }
            times = UnitTimes(
                seconds=units,
                device=str(content["device"]),
                device_type=str(content["device_type"]),
                torch=str(content["torch"]),
                measured_with=dict(content["measured_with"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not what dist-mtp plan measure=true writes ({error!r}): {_MEASURE}") from error
        check_seconds(times.seconds)
        return times

    def check_fits(self, config: Config) -> None:
        """Refuse to plan ``config`` (resolved) with times of other settings.

        Raises:
            ConfigError: names the first key that differs and both values, or the kind that was not measured.
        """
        for key, value in decisive_settings(config, self.device_type).items():
            if self.measured_with.get(key) != value:
                raise ConfigError(
                    f"measured with {key}={_shown(self.measured_with.get(key))}, but this run has {key}={_shown(value)}: "
                    f"{_MEASURE}"
                )
        if config.device not in ("auto", self.device_type):
            raise ConfigError(
                f"measured on {self.device} ({self.device_type}), but this run has device={config.device}: {_MEASURE}"
            )
        check_complete(list_units(config), self.seconds)


def read_unit_times(file: Path) -> UnitTimes:
    """What ``dist-mtp plan measure=true`` has written.

    Raises:
        ConfigError: it cannot be read, or is not that.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror}): write it with `dist-mtp plan measure=true` and this run's overrides"
        ) from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ConfigError(f"damaged ({error}): {_MEASURE}") from error
    return UnitTimes.from_json(content)


def decisive_settings(config: Config, device_type: str) -> dict[str, Fact]:
    """Settings of a resolved configuration that decide how long its units take on a device."""
    keys = (*_DECISIVE, _DECISIVE_ON_CPU) if device_type == "cpu" else _DECISIVE
    sections = to_dict(config)
    settings: dict[str, Fact] = {key: sections[section][name] for key in keys for section, name in [key.split(".")]}
    # As it is computed: names have no order, and ``auto`` is measured without any.
    return settings | {"pipeline.recompute": str(config.recompute)}


def planned_costs(config: Config, profile: DeviceProfile, recompute: Recompute | None = None) -> tuple[UnitCost, ...]:
    """As :func:`~dist_mtp.pipeline.costs.unit_costs`, with the times of ``pipeline.unit_times`` if there are any.

    Two parts stay estimates. Exchanges between the ranks of ``parallel.ep`` are the profile's, as one device cannot measure
    them. What ``recompute`` adds to the measured setting takes its share of the measured forward.

    Args:
        recompute: None takes what ``pipeline.recompute`` names, which is what was measured.

    Raises:
        ConfigError: ``pipeline.unit_times`` has no times of a kind in the model, or impossible ones.
    """
    costs = unit_costs(config, profile, recompute)
    seconds = config.pipeline.unit_times
    if not seconds:
        return costs
    try:
        check_seconds(seconds)
        check_complete(list_units(config), seconds)
    except ConfigError as error:
        raise ConfigError(f"pipeline.unit_times: {error}") from error
    # Of a device that computes in no time exchanges are left, and the other way round.
    exchanging = dataclasses.replace(profile, flops_per_s=math.inf, fp8_flops_per_s=math.inf)
    computing = dataclasses.replace(
        profile, latency_s=0.0, bandwidth_bytes_per_s=math.inf, node_bandwidth_bytes_per_s=math.inf
    )
    return tuple(
        _with_times(cost, seconds[unit.kind], exchange, (more.time_i - base.time_i) / base.time_f)
        for unit, cost, exchange, base, more in zip(
            list_units(config),
            costs,
            unit_costs(config, exchanging, recompute),
            unit_costs(config, computing),
            unit_costs(config, computing, recompute),
            strict=True,
        )
    )


def _with_times(cost: UnitCost, seconds: Seconds, exchange: UnitCost, repeated: float) -> UnitCost:
    """``cost`` with measured times.

    Args:
        repeated: share of the forward that the input gradient computes again, beside what it did when it was measured;
            negative where it did more.
    """
    forward, input_grad, weight_grad = seconds
    return dataclasses.replace(
        cost,
        time_f=forward + exchange.time_f,
        time_i=max(0.0, input_grad + repeated * forward) + exchange.time_i,
        time_w=weight_grad + exchange.time_w,
    )


def check_complete(units: Iterable[Unit], seconds: Mapping[Any, Seconds]) -> None:
    """Raise :class:`~dist_mtp.errors.ConfigError` if a kind among the units was not measured."""
    missing = sorted({unit.kind for unit in units} - set(seconds))
    if missing:
        raise ConfigError(f"no times of {', '.join(missing)}, which this model has: {_MEASURE}")


def check_seconds(seconds: Mapping[Any, Seconds]) -> None:
    """Raise :class:`~dist_mtp.errors.ConfigError` at an unknown kind, or at times that no clock shows."""
    for kind, times in seconds.items():
        if kind not in KINDS:
            raise ConfigError(f"times of '{kind}', which is none of {', '.join(KINDS)}: {_MEASURE}")
        for name, value in zip(("forward", "input gradient", "weight gradient"), times, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"the {name} of {kind} takes {value!r} seconds, which cannot be: {_MEASURE}")
        if sum(times) <= 0:
            raise ConfigError(f"{kind} takes no time at all, which cannot be: {_MEASURE}")


def _shown(value: Fact) -> str:
    return "null" if value is None else str(value)
