"""What is told of published files: the manifest through crashes, and hooks that misbehave."""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path

import pytest
from support.lab import wait_until

from appliance.merge import events
from appliance.merge.events import Announcer, Hook, Manifest
from appliance.merge.retention import published_name

NAME = published_name("main")


def name(number: int) -> str:
    return f"main-20261121T080000Z-{number:08d}.pcapng"


def publish(directory: Path, *numbers: int) -> None:
    """Files in ready/ with their sidecars."""
    for part in ("ready", "meta"):
        (directory / part).mkdir(exist_ok=True)
    for number in numbers:
        (directory / "ready" / name(number)).write_bytes(b"")
        (directory / "meta" / f"{name(number)}.json").write_text(json.dumps({"file": name(number)}))


def listed(directory: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (directory / "meta" / "manifest.jsonl").read_text().splitlines()]


def complete(directory: Path) -> None:
    Manifest(str(directory / "meta"), 0o640).complete(str(directory / "ready"), NAME)


def test_files_that_were_published_and_not_told_are_added_in_their_order(tmp_path: Path) -> None:
    publish(tmp_path, 3, 1, 2)
    complete(tmp_path)
    assert listed(tmp_path) == [name(1), name(2), name(3)]
    complete(tmp_path)
    assert listed(tmp_path) == [name(1), name(2), name(3)]


@pytest.mark.parametrize("cut", [1, 10])
def test_half_a_line_is_cut_away_and_told_anew(tmp_path: Path, cut: int) -> None:
    publish(tmp_path, 1, 2)
    complete(tmp_path)
    path = tmp_path / "meta" / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    complete(tmp_path)
    assert listed(tmp_path) == [name(1), name(2)]


def test_a_file_that_a_consumer_took_is_not_told_again_and_garbage_does_no_harm(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    complete(tmp_path)
    path = tmp_path / "meta" / "manifest.jsonl"
    path.write_bytes(b"\xff\n[]\n{}\n" + path.read_bytes())
    (tmp_path / "ready" / name(1)).unlink()
    (tmp_path / "ready" / "somebody's").write_bytes(b"")
    publish(tmp_path, 3)
    (tmp_path / "meta" / f"{name(3)}.json").write_text("[]")
    complete(tmp_path)
    assert path.read_bytes().count(b"\n") == 5


def test_a_manifest_that_has_grown_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MANIFEST_MAX_BYTES", 30)
    manifest = Manifest(str(tmp_path), 0o600)
    for number in range(3):
        manifest.add({"file": f"{number}"})
    assert (tmp_path / "manifest.jsonl").read_text() == '{"file":"2"}\n'
    assert (tmp_path / "manifest.jsonl.1").read_text() == '{"file":"0"}\n{"file":"1"}\n'
    assert stat.S_IMODE((tmp_path / "manifest.jsonl").stat().st_mode) == 0o600


def test_a_link_in_the_manifests_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "manifest.jsonl").symlink_to(target)
    Announcer(Manifest(str(tmp_path), 0o640), None).published("/nowhere", {"file": "x"})
    assert target.read_text() == ""


def test_more_files_than_may_wait_for_a_hook_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HOOKS_WAITING", 2)
    monkeypatch.setattr(events, "HOOKS_AT_THE_END_S", 0.5)
    failed: list[int] = []
    may_go = threading.Event()

    def run(argv: list[str], timeout_s: float) -> str:
        may_go.wait(10)
        return ""

    monkeypatch.setattr(events, "run_command", run)
    hook = Hook(["/bin/true"], 60, lambda: failed.append(1))
    hook.published("0")
    wait_until(lambda: hook._queue.empty(), "the first one is run")
    for number in range(5):
        hook.published(str(number))
    assert len(failed) == 3
    may_go.set()
    hook.finish(lambda: None)


def test_the_end_does_not_wait_long_for_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HOOKS_AT_THE_END_S", 0.5)
    failed: list[int] = []
    hook = Hook(["/bin/sleep"], 1, lambda: failed.append(1))
    hook.published("100")
    hook.published("100")
    begun = time.monotonic()
    hook.finish(lambda: None)
    assert time.monotonic() - begun < 5
    wait_until(lambda: len(failed) == 2, "both are told")


def test_the_command_of_a_hook_changes_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []

    def command(argv: list[str], timeout_s: float) -> str:
        run.append(argv)
        return ""

    monkeypatch.setattr(events, "run_command", command)
    hook = Hook([], 60, lambda: None)
    hook.published("0")
    for path, argv, so_far in (("1", ["first", "-x"], 1), ("2", ["second"], 2), ("3", [], 2)):
        hook.use(argv, 60)
        hook.published(path)
        wait_until(lambda n=so_far: hook._queue.empty() and len(run) == n, "it is run, if there is one")
    hook.finish(lambda: None)
    assert run == [["first", "-x", "1"], ["second", "2"]]


def test_a_hook_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    failed: list[int] = []
    hook = Hook([str(tmp_path / "missing")], 1, lambda: failed.append(1))
    hook.published("x")
    wait_until(lambda: failed == [1], "it is told")
    hook.finish(lambda: None)
