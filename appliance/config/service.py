"""[monitor] and [service]: what is shown to whom, and how the processes are run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from appliance.config.addresses import parse_address
from appliance.config.values import Label, OptionalPath, Seconds, Table, between

_MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with the final zero (sys/un.h)


def _listen(value: str) -> str:
    if value:
        parse_address(value)
    return value


def _socket_path(value: Path | None) -> Path | None:
    if value is not None and len(os.fsencode(value)) > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"must be at most {_MAX_SOCKET_PATH_BYTES} bytes long: a unix socket's address holds no more")
    return value


OptionalAddress = Annotated[str, AfterValidator(_listen)]
OptionalSocketPath = Annotated[OptionalPath, AfterValidator(_socket_path)]


class Monitor(Table):
    """Metrics, status page, control socket."""

    listen: OptionalAddress = Field(
        default="127.0.0.1:9750", description='HOST:PORT of /metrics, /healthz and the status page; "" = none'
    )
    control_socket: OptionalSocketPath = Field(
        default=Path("/run/appliance/control.sock"),
        description='unix socket of `appliance status` and `rotate`; "" = none',
    )

    @property
    def address(self) -> tuple[str, int] | None:
        return parse_address(self.listen) if self.listen else None


class Service(Table):
    """How the processes are run."""

    user: Label = Field(
        default="", description='run as this user when started as root; "" = keep the user, drop the capabilities'
    )
    restart_limit: Annotated[int, between(0, 1000)] = Field(
        default=5, description="a worker that ends more often than this within restart_window_s ends the service"
    )
    restart_window_s: Seconds = Field(default=60, description="see restart_limit")
    drain_timeout_s: Annotated[int, between(1, 600)] = Field(
        default=10, description="how long the workers have to write what they hold when the service stops"
    )
    heartbeat_timeout_s: Annotated[int, between(1, 600)] = Field(
        default=5, description="a worker that shows no sign of life for so long is restarted"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description='least severity that is logged: "debug", "info", "warning", "error"'
    )
