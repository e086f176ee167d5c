"""A finding of the doctor."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is what to do, "" when there is nothing to do."""

    check: str
    outcome: Outcome
    finding: str
    advice: str = ""


def user_name() -> str:
    """The name of the effective user; its number where it has none (containers)."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
