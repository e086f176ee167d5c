"""What the validation found, as faults: the key, and what is wrong with it in words that fit every key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from appliance.config.cross_checks import CrossFaultsError, Fault
from appliance.config.keys import SECTIONS, heading, keys
from appliance.config.values import shown


def faults_of(error: ValidationError) -> Iterator[Fault]:
    for detail in error.errors():
        if not detail["loc"]:
            yield from cross_faults_of(detail)
        else:
            yield _key(detail["loc"]), _wording(detail)


def cross_faults_of(detail: Mapping[str, Any]) -> Sequence[Fault]:
    cause = detail.get("ctx", {}).get("error")
    return cause.faults if isinstance(cause, CrossFaultsError) else []


def _key(location: Iterable[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _wording(detail: Mapping[str, Any]) -> str:
    """What is wrong, in words that fit every key; `detail` is one of ValidationError.errors()."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    names = {"int_type": "a whole number", "bool_type": "true or false", "string_type": 'text in "quotes"'}
    if kind == "missing":
        return "is missing" if detail["loc"][-1] != "interface" else "there must be at least one [[interface]]"
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"])
    if kind in names:
        return f"must be {names[kind]}, is {shown(value)}"
    if kind == "literal_error":
        return f"must be {context['expected']}, is {shown(value)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a table, is {shown(value)}"
    if kind == "tuple_type":
        return f"must be a list of tables, written [[{detail['loc'][-1]}]], is {shown(value)}"
    if kind == "value_error":
        return str(context["error"])
    return str(detail["msg"])


def _unknown_key(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    section = ".".join(part for part in location[:-1] if isinstance(part, str))
    by_section = {section: [key.name for key in keys() if key.section == section] for section in SECTIONS}
    own = by_section[section] + [s.rpartition(".")[2] for s in SECTIONS if s and s.rpartition(".")[0] == section]
    homes = [other for other, names in by_section.items() if name in names]
    if homes:
        return f"unknown key here; it belongs into {' or '.join(heading(home) for home in homes)}"
    near = difflib.get_close_matches(name, own, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return "unknown key"
