"""The kinds of values that keys of every section have, and how each is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
MAX_LABEL_CHARACTERS = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}", re.ASCII)


class Table(BaseModel):
    # No defaults are validated, no strings taken for numbers: what stands in the file is what counts.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_by_name=True, validate_by_alias=True)


def between(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, is {value}")
        return value

    return AfterValidator(check)


def zero_or_between(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if value != 0 and not low <= value <= high:
            raise ValueError(f"must be 0 or between {low} and {high}, is {value}")
        return value

    return AfterValidator(check)


def at_least_one(heading: str) -> AfterValidator:
    def check(tables: tuple[Any, ...]) -> tuple[Any, ...]:
        if not tables:
            raise ValueError(f"there must be at least one {heading}")
        return tables

    return AfterValidator(check)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be 1 to 64 of A-Z a-z 0-9 _ . -, beginning with a letter, a digit or _, is {value!r}")
    return value


def _label(value: str) -> str:
    return _name(value) if value else value


def _printable(value: str) -> str:
    if not value.replace("\n", " ").replace("\t", " ").isprintable() or len(value) > 4096:
        raise ValueError("must be printable text of at most 4096 characters")
    return value


def _path(value: object) -> object:
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("must be a path")
        return Path(value)
    return value


def _path_or_nothing(value: object) -> object:
    return None if value == "" else _path(value)


def shown(value: object) -> str:
    text = repr(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 80 else text[:77] + "..."


Name = Annotated[str, AfterValidator(_name)]
Label = Annotated[str, AfterValidator(_label)]  # a name, or "" for none
Printable = Annotated[str, AfterValidator(_printable)]
Seconds = Annotated[int, between(1, 86400)]
Bytes = Annotated[int, between(0, 1 << 60)]
RotateSeconds = Annotated[int, zero_or_between(1, 7 * 86400)]
SomePath = Annotated[Path, BeforeValidator(_path)]
OptionalPath = Annotated[Path | None, BeforeValidator(_path_or_nothing)]
Cpus = tuple[Annotated[int, between(0, 8191), Field(strict=True)], ...]
