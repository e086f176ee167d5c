"""[traceflow]: TCP flow traces of the running service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from appliance.config.interface import RingBytes
from appliance.config.values import (
    GIB,
    KIB,
    MIB,
    Bytes,
    Cpus,
    OptionalPath,
    Table,
    between,
    zero_or_between,
)


class Traceflow(Table):
    """TCP flow traces of the running service: one file for each flow; see `appliance trace` for those of files."""

    enabled: bool = Field(default=False, description="write each TCP flow into a file of its own as well")
    directory: OptionalPath = Field(
        default=None,
        description='work/ and ready/ are made below it; "" = traces/ in the directory of the first [[output]]',
    )
    interfaces: tuple[str, ...] = Field(
        default=(), strict=False, description="labels of the interfaces whose packets are traced; [] = all"
    )
    format: Literal["pcap", "json", "plist", "tree"] = Field(
        default="pcap",
        description='"pcap" (nanoseconds), or "json", "plist", "tree", which cost much more time for each packet',
    )
    bidirectional: bool = Field(default=False, description="both directions of a connection are one flow")
    idle_timeout_s: Annotated[int, between(0, 86400)] = Field(
        default=300, description="a flow ends after this long without a packet; 0 = never"
    )
    linger_s: Annotated[int, between(0, 86400)] = Field(
        default=60, description="what comes this long behind FIN or RST is still the flow's; 0 = for ever"
    )
    max_flows: Annotated[int, between(1, 10_000_000)] = Field(
        default=100_000, description="flows in memory at once; beyond it the one longest without a packet ends early"
    )
    buffer_bytes: Annotated[int, between(64 * KIB, 64 * GIB)] = Field(
        default=64 * MIB, description="memory for packets that wait to be written, all flows together"
    )
    ring_bytes: RingBytes = Field(
        default=0, description="shared memory between each output's merge and the traces; 0 = a share of memory_bytes"
    )
    max_flow_bytes: Annotated[int, zero_or_between(KIB, 1 << 60)] = Field(
        default=64 * MIB, description="a flow's file holds its first packets up to this size; 0 = all"
    )
    retain_bytes: Annotated[int, between(MIB, 1 << 60)] = Field(
        default=GIB, description="oldest files go when all together are larger, the unfinished ones included"
    )
    retain_files: Annotated[int, between(1, 100_000_000)] = Field(
        default=100_000, description="oldest files go when there are more"
    )
    retain_seconds: Annotated[int, between(0, 1 << 40)] = Field(
        default=0, description="files go so long after they were finished; 0 = unlimited"
    )
    min_free_bytes: Bytes = Field(
        default=GIB,
        description="oldest files go, then packets are left out, when the file system has less left; 0 = never",
    )
    tunnels: Literal["outer", "inner"] = Field(
        default="outer", description='TCP in a tunnel: "outer" = not looked for, "inner" = of the innermost IP packet'
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the traces' worker runs on; [] = any")
