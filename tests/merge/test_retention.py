"""Oldest first, never more than needed, never what somebody holds, never what is not ours."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from merge.outputs import Life, make_pages
from merge.rings import S
from support.lab import wait_until

from appliance.merge.naming import ApplianceNaming, MtracecapNaming, prepare_directories
from appliance.merge.retention import Limits, Retention

NOW = 1_700_000_000 * S
KB = 1000


class Store:
    """A directory with published files, a clock and a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.naming = ApplianceNaming(root, "main", ".pcapng.lz4")
        prepare_directories(self.naming)
        self.page = make_pages([])["merge"]
        self.now_ns = NOW
        self.free_bytes = 1 << 40

    def publish(self, number: int, size: int = KB, age_s: int = 0, sidecar: bool = True) -> str:
        start_ns = self.now_ns - age_s * S
        path = self.naming.final_path(number, start_ns)
        with open(path, "wb") as file:
            file.write(bytes(size))
        os.utime(path, ns=(start_ns, start_ns))
        if sidecar:
            meta = self.naming.sidecar_path(number, start_ns)
            assert meta is not None
            Path(meta).write_text(json.dumps({"last_ns": start_ns}))
        return path

    def retention(self, **limits: int | bool) -> Retention:
        return Retention(
            Limits(**limits),  # type: ignore[arg-type]
            self.naming,
            "main",
            self.page,
            free=lambda _: self.free_bytes,
            now_ns=lambda: self.now_ns,
        )

    def numbers(self, part: str = "ready") -> list[int]:
        names = os.listdir(self.root / part)
        return sorted(int(name.split("-")[2].split(".")[0]) for name in names if name.startswith("main-"))

    def removed(self) -> tuple[int, int]:
        return self.page["expired_files"], self.page["expired_bytes"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_the_oldest_go_until_the_rest_fits_and_not_one_more(store: Store) -> None:
    for number in range(6):
        store.publish(number)
    retention = store.retention(retain_bytes=3 * KB)
    retention.enforce()
    assert store.numbers() == [3, 4, 5]
    assert store.numbers("meta") == [3, 4, 5], "sidecars go with their files"
    assert store.removed() == (3, 3 * KB)
    retention.enforce()
    assert store.removed() == (3, 3 * KB)


def test_other_limits_count_from_the_next_look_on_also_after_there_were_none(store: Store) -> None:
    retention = store.retention()
    for number in range(6):
        retention.add(store.publish(number))
        retention.enforce()
    assert store.numbers() == [0, 1, 2, 3, 4, 5]
    retention.use(Limits(retain_bytes=3 * KB))
    assert store.removed() == (0, 0)
    retention.enforce()
    assert store.numbers() == [3, 4, 5]
    retention.use(Limits())
    for number in range(6, 9):
        retention.add(store.publish(number))
        retention.enforce()
    assert store.numbers() == [3, 4, 5, 6, 7, 8]
    retention.use(Limits(retain_bytes=2 * KB))
    retention.enforce()
    assert store.numbers() == [7, 8]


def test_new_files_count_from_their_publication_on(store: Store) -> None:
    retention = store.retention(retain_bytes=2 * KB)
    retention.enforce()
    for number in range(4):
        retention.add(store.publish(number))
        retention.enforce()
    assert store.numbers() == [2, 3]


def test_the_number_says_which_is_older_not_the_clock(store: Store) -> None:
    for number, age_s in ((0, 0), (1, 7200), (2, 3600)):
        store.publish(number, age_s=age_s)
    store.retention(retain_bytes=2 * KB).enforce()
    assert store.numbers() == [1, 2]


def test_even_the_newest_goes_when_it_alone_is_beyond_the_limit(store: Store) -> None:
    store.publish(0)
    store.publish(1, size=5 * KB)
    store.retention(retain_bytes=4 * KB).enforce()
    assert store.numbers() == []


def test_files_go_when_their_last_packet_is_too_old(store: Store) -> None:
    for number, age_s in ((0, 100), (1, 61), (2, 60), (3, 0)):
        store.publish(number, age_s=age_s)
    retention = store.retention(retain_seconds=60)
    retention.enforce()
    assert store.numbers() == [2, 3]
    store.now_ns += 1
    retention.enforce()
    assert store.numbers() == [3]
    store.now_ns += 60 * S
    retention.enforce()
    assert store.numbers() == []


def test_without_a_sidecar_the_age_is_that_of_the_file(store: Store) -> None:
    store.publish(0, age_s=100, sidecar=False)
    store.publish(1, age_s=10, sidecar=False)
    store.retention(retain_seconds=60).enforce()
    assert store.numbers() == [1]


def test_a_packet_from_the_future_keeps_no_file_for_ever(store: Store) -> None:
    path = store.publish(0, age_s=100)
    (store.root / "meta" / f"{os.path.basename(path)}.json").write_text(json.dumps({"last_ns": NOW * 2}))
    store.retention(retain_seconds=60).enforce()
    assert store.numbers() == []


def test_recorded_packets_of_last_year_are_kept_for_as_long_as_todays(store: Store) -> None:
    path = store.publish(0)
    (store.root / "meta" / f"{os.path.basename(path)}.json").write_text(json.dumps({"last_ns": 1}))
    store.retention(retain_seconds=60, by_packet_time=False).enforce()
    assert store.numbers() == [0]


def test_a_full_disk_costs_the_oldest_files_only_as_many_as_make_room(store: Store) -> None:
    for number in range(5):
        store.publish(number, size=8192)
    disk_bytes = os.stat(store.naming.final_path(0, NOW)).st_blocks * 512
    store.free_bytes = 10 * disk_bytes
    store.retention(min_free_bytes=12 * disk_bytes).enforce()
    assert store.numbers() == [2, 3, 4]


def test_a_disk_that_others_fill_leaves_the_newest_file(store: Store) -> None:
    for number in range(3):
        store.publish(number)
    store.free_bytes = 0
    store.retention(min_free_bytes=1 << 30).enforce()
    assert store.numbers() == [2]


def test_whichever_limit_bites_first(store: Store) -> None:
    for number, age_s in enumerate((300, 200, 100, 0)):
        store.publish(number, age_s=age_s)
    store.retention(retain_bytes=3 * KB, retain_seconds=150, min_free_bytes=1).enforce()
    assert store.numbers() == [2, 3]


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_file_that_somebody_holds_is_stepped_over_until_it_is_free(store: Store, kind: int) -> None:
    held = store.publish(0)
    store.publish(1)
    store.publish(2)
    retention = store.retention(retain_bytes=2 * KB)
    with open(held, "rb") as file:
        fcntl.flock(file, kind)
        retention.enforce()
        assert store.numbers() == [0, 2]
    retention.add(store.publish(3))
    retention.enforce()
    assert store.numbers() == [2, 3]


def test_files_that_consumers_took_are_no_error_and_need_no_room(store: Store) -> None:
    paths = [store.publish(number) for number in range(4)]
    retention = store.retention(retain_bytes=3 * KB)
    os.unlink(paths[0])
    os.rename(paths[2], store.root / "taken")
    retention.enforce()
    assert store.numbers() == [1, 3]
    retention.add(store.publish(4))
    os.unlink(paths[1])
    retention.add(store.publish(5))
    retention.enforce()
    assert store.numbers() == [3, 4, 5]
    assert store.removed() == (0, 0)


def test_the_sidecar_of_a_taken_file_stays_for_a_day_or_as_long_as_files_do(store: Store) -> None:
    os.unlink(store.publish(0, age_s=86_399))
    by_size = store.retention(retain_bytes=KB)
    by_size.enforce()
    assert store.numbers("meta") == [0]
    store.now_ns += 2 * S
    by_size.enforce()
    assert store.numbers("meta") == []
    os.unlink(store.publish(1, age_s=50))
    by_age = store.retention(retain_seconds=60)
    by_age.enforce()
    assert store.numbers("meta") == [1]
    store.now_ns += 11 * S
    by_age.enforce()
    assert store.numbers("meta") == []
    assert store.removed() == (0, 0), "nobody's file was removed"


def test_what_is_not_ours_is_neither_counted_nor_removed(store: Store) -> None:
    ready = store.root / "ready"
    strangers = ["notes.txt", "other-20231114T221400Z-00000000.pcapng", "main-backup.pcapng", "main-x-00000000.pcapng"]
    for name in strangers:
        (ready / name).write_bytes(bytes(100 * KB))
    (ready / "main-20231114T221400Z-00000000.pcapng").mkdir()
    (ready / "main-20231114T221400Z-00000001.pcapng").symlink_to("notes.txt")
    store.publish(7)
    store.free_bytes = 0
    store.retention(retain_bytes=2 * KB, retain_seconds=1, min_free_bytes=1).enforce()
    left = sorted(os.listdir(ready))
    assert set(strangers) <= set(left) and "main-20231114T221400Z-00000000.pcapng" in left
    assert "main-20231114T221400Z-00000001.pcapng" in left
    assert os.path.basename(store.naming.final_path(7, NOW)) in left, "there was nothing to remove"


def test_files_under_an_earlier_ending_are_adopted(store: Store) -> None:
    (store.root / "ready" / "main-20231114T221400Z-00000000.pcap.zst").write_bytes(bytes(KB))
    store.publish(1)
    store.retention(retain_bytes=KB).enforce()
    assert store.numbers() == [1]


def test_a_directory_that_cannot_be_read_is_an_error_in_the_log_and_no_more(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    os.rename(store.root / "ready", store.root / "gone")
    store.retention(retain_bytes=1).enforce()
    assert "ready" in caplog.text


def test_without_limits_nothing_is_even_looked_at(store: Store) -> None:
    store.publish(0, age_s=10**6)
    os.rename(store.root / "meta", store.root / "gone")
    store.retention().enforce()
    assert store.numbers() == [0]


def test_a_naming_without_sidecars_has_no_retention(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sidecars"):
        Retention(Limits(retain_bytes=1), MtracecapNaming(tmp_path), "main", make_pages([])["merge"])


def test_the_publisher_enforces_the_limits_after_each_publication(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    retention = Retention(Limits(retain_bytes=1500), store.naming, "main", store.page)
    life = Life(tmp_path / "out", retention=retention, compressor="lz4")
    for at in range(4):
        life.stream.open(NOW)
        life.sources[0].write(*(record(NOW + at, at) for _ in range(10)))
        life.turn()
        life.stream.close("request")
        wait_until(lambda: life.page["queued_segments"] == 0, "it is published")
    life.finish()
    assert sum(path.stat().st_size for path in life.files()) <= 1500
    assert [s["sequence"] for s in life.sidecars()][-1] == 3
    assert store.page["expired_files"] == 4 - len(life.files()) > 0
    life.close()


def record(at: int, seed: int) -> bytes:
    from merge.rings import packet

    return packet(at, os.urandom(80 + seed))
