"""The accounting identities as equations: what the counters of one moment, at rest, must add up to."""

from __future__ import annotations

from appliance.monitor.view import InterfaceView, OutputView, Snapshot


def imbalances(snapshot: Snapshot) -> list[str]:
    """What does not add up, in words. Empty: everything does."""
    found = [fault for view in snapshot.interfaces for fault in of_interface(view)]
    for output in snapshot.outputs:
        found += of_output(output, [view for view in snapshot.interfaces if view.output == output.name])
    return found + of_meter(snapshot)


def of_interface(view: InterfaceView) -> list[str]:
    dropped, flying = view.dropped, view.in_flight
    equations = {
        "received - kernel drops = read + kernel's queue": (
            view.received_packets - dropped["kernel"],
            view.read_packets + flying["kernel"],
        ),
        "read = filtered + foreign + gated + into the ring + ring drops + held for order": (
            view.read_packets,
            sum(dropped[stage] for stage in ("filter", "foreign", "gate", "ring"))
            + view.published_packets
            + flying["reorder"],
        ),
        "into the ring = out of the ring, which is empty": (view.published_packets, view.consumed_packets),
        "out of the ring = written + merge drops + writer drops + unclean + held": (
            view.consumed_packets,
            view.written_packets + dropped["merge"] + dropped["writer"] + dropped["unclean"] + flying["merge"],
        ),
        "received = written + dropped": (view.received_packets, view.written_packets + view.dropped_packets),
        "nothing is in flight": (view.in_flight_packets, 0),
    }
    return [f"{view.label}: {name}: {a} != {b}" for name, (a, b) in equations.items() if a != b]


def of_output(output: OutputView, views: list[InterfaceView]) -> list[str]:
    """`recovered` may hold packets of an earlier run: those were never written in this one, and stand in no view."""
    written = sum(view.written_packets for view in views)
    closed = output.published_packets + output.quarantined_packets + output.open_packets
    found = []
    if output.queued_files:
        found.append(f"{output.name}: {output.queued_files} files wait for their publication")
    elif not closed <= written <= closed + output.recovered_packets:
        found.append(
            f"{output.name}: written {written} is not published {output.published_packets} + quarantined "
            f"{output.quarantined_packets} + open {output.open_packets} + of recovered {output.recovered_packets}"
        )
    return found


def of_meter(snapshot: Snapshot) -> list[str]:
    meter = snapshot.meter
    if meter is None:
        return []
    equations = {
        "digests = observed": (sum(view.digests_published for view in snapshot.interfaces), meter.observed_packets),
        "observed = metered + ignored + unsampled": (
            meter.observed_packets,
            meter.metered_packets + meter.ignored_packets + meter.unsampled_packets,
        ),
        "metered = exported + active + unclean": (
            meter.metered_packets,
            meter.exported_packets + meter.active_flow_packets + meter.lost_unclean_packets,
        ),
    }
    for export in snapshot.exports:
        equations[f"{export.uri}: exported = before + sent + not sent + queued + unclean"] = (
            meter.exported_packets,
            export.before_packets
            + export.sent_packets
            + export.not_sent_packets
            + export.queued_packets
            + export.lost_unclean_packets,
        )
    return [f"meter: {name}: {a} != {b}" for name, (a, b) in equations.items() if a != b]
