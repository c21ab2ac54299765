"""The host memories of a run, from its config: RAM, and CXL memory, real or emulated; and how fast the latter is."""

from __future__ import annotations

from dataclasses import replace

from offload.config_sections import CxlConfig
from offload.errors import ConfigError
from offload.io import HostTier, Pace, StoreError, numa, tiers
from offload.planner import Hardware

# Bytes that the measurement of a real node takes there for a moment.
_MEASURED = 64 << 20


def host_tiers(cxl: CxlConfig | None, here: bool = True) -> dict[str, HostTier]:
    """The memories that homes and activations may lie in, by name.

    `here`: the run is for this machine; ConfigError when the node is not there, or has too little free memory.
    """
    found = {"cpu": HostTier("cpu")}
    if cxl is None:
        return found
    if cxl.emulate:
        assert cxl.bandwidth is not None  # the config sees to it
        found["cxl"] = HostTier("cxl", pace=Pace(float(cxl.bandwidth), cxl.latency))
    elif here:
        found["cxl"] = HostTier("cxl", nodes=available_nodes(cxl))
    else:
        found["cxl"] = HostTier("cxl", nodes=tuple(cxl.nodes or ()))
    return found


def available_nodes(cxl: CxlConfig) -> tuple[int, ...]:
    """The NUMA nodes that the section means; ConfigError when they are not there, or have too little free memory."""
    try:
        return numa.choose(cxl.nodes, cxl.size)
    except StoreError as error:
        raise ConfigError(
            f"memory.cxl: {error}; name a node that is there, or set memory.cxl.emulate: true to try without one"
        ) from error


def with_rates(hardware: Hardware, tier: HostTier | None, here: bool = True) -> Hardware:
    """The machine with the rates of this CXL memory: those it emulates, or what one thread measures now (`here`)."""
    if tier is None:
        return hardware
    if tier.pace is not None:
        rate, latency, how = tier.pace.bandwidth, tier.pace.latency, "emulated, as memory.cxl says"
    elif here:
        read, write = tiers.measure(tier, _MEASURED)
        rate, latency, how = 2 / (1 / read + 1 / write), 0.0, "measured on this machine, one thread's copies"
    else:
        return hardware
    return replace(hardware, cxl=rate, cxl_latency=latency, source={**hardware.source, "cxl": how})
