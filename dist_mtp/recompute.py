"""Which activations are not kept from forward to backward but computed again: ``pipeline.recompute``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dist_mtp.errors import ConfigError

KEY = "pipeline.recompute"


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward. The first three are those of DeepSeek-V3 (arXiv 2412.19437, section 3.2.3)."""

    norms: bool = False
    """Outputs of the norms that feed linear layers, from the norms' inputs."""
    mla_up: bool = False
    """Queries, keys and values of latent attention, from the compressed latents."""
    swiglu: bool = False
    """``silu(gate) * up``, from gate and up."""
    units: bool = False
    """Everything: of each half of a layer, and of each MTP module, the input alone is kept."""

    @staticmethod
    def parse(text: str) -> Recompute:
        """From a value of ``pipeline.recompute`` other than ``auto``.

        >>> str(Recompute.parse("swiglu+norms"))
        'norms+swiglu'

        Raises:
            ConfigError: unknown or repeated names.
        """
        if text == "none":
            return KEEP_ALL
        if text == "full":
            return Recompute(units=True)
        names = text.split("+")
        for name in names:
            if name not in _NAMES:
                raise ConfigError(
                    f"{KEY}={text} has the part {name!r}: write auto, none, full, or any of {', '.join(_NAMES)} "
                    f"joined by +, such as {KEY}=norms+swiglu"
                )
            if names.count(name) > 1:
                raise ConfigError(f"{KEY}={text} names {name} {names.count(name)} times: name it once")
        return Recompute(**dict.fromkeys(names, True))

    def __str__(self) -> str:
        """As :meth:`parse` reads it, names in the order of the fields."""
        if self.units:
            return "full"
        return "+".join(name for name in _NAMES if getattr(self, name)) or "none"

    def runs_with(self, dispatcher: str) -> bool:
        """Whether layers that send their tokens by ``moe.dispatcher`` can be computed again.

        DeepEP's dispatch gives rows in another order each time, and its backward needs the order of the first.
        """
        return not (self.units and dispatcher == "deepep")


_NAMES = tuple(field.name for field in fields(Recompute) if field.name != "units")

KEEP_ALL = Recompute()

RECOMPUTE_LEVELS = tuple(map(Recompute.parse, ("none", "norms", "norms+swiglu", "norms+mla_up+swiglu", "full")))
"""What ``auto`` chooses from, cheapest in time first."""
