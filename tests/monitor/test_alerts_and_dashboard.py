"""The shipped alert rules and dashboard, held against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from monitor.pages import Appliance
from prometheus_client import CollectorRegistry

from appliance.monitor.metrics import SnapshotCollector

CONFIG = Path(__file__).resolve().parents[2] / "config"
RULES = CONFIG / "prometheus" / "appliance-alerts.yml"
RULE_TESTS = CONFIG / "prometheus" / "appliance-alerts.test.yml"
DASHBOARD = CONFIG / "grafana" / "appliance.json"
METRIC = re.compile(r"\bappliance_[a-z_]+")


@pytest.fixture
def known(running: Appliance) -> set[str]:
    """The names of all samples and their labels' names, as `name` and `name{label}`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(running.snapshot))
    samples = [sample for family in registry.collect() for sample in family.samples]
    families = {family.name for family in registry.collect()}
    # Some have no sample while there is nothing to say, as those of the host's figures.
    counters = {f"{family.name}_total" for family in registry.collect() if family.type == "counter"}
    return {sample.name for sample in samples} | families | counters


@pytest.mark.parametrize("arguments", [["check", "rules", str(RULES)], ["test", "rules", str(RULE_TESTS)]])
def test_promtool_agrees_with_the_rules(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text(encoding="utf-8")))
    tested = set(re.findall(r"Appliance\w+", RULE_TESTS.read_text(encoding="utf-8")))
    assert len(alerts) > 10
    assert alerts <= tested


def test_alerts_ask_for_metrics_that_there_are(known: set[str]) -> None:
    asked = set(METRIC.findall(RULES.read_text(encoding="utf-8"))) | set(
        METRIC.findall(RULE_TESTS.read_text(encoding="utf-8"))
    )
    assert asked - known == set()


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "expr" and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def test_the_dashboard_asks_for_metrics_that_there_are(known: set[str]) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {name for expression in expressions(dashboard) for name in METRIC.findall(expression)}
    assert len(asked) > 20
    assert asked - known == set()


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_expressions_of_the_dashboard_are_promql() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    rules = [
        {"record": f"panel:{i}", "expr": expression.replace("$__rate_interval", "5m").replace("$__range", "6h")}
        for i, expression in enumerate(expressions(dashboard))
    ]
    # JSON is YAML.
    text = json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    done = subprocess.run(
        [promtool, "check", "rules", "/dev/stdin"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
