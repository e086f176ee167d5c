"""A row of the flow table as a dictionary: for tests, and for whoever looks into a table from Python."""

from libc.stdint cimport uint32_t

from appliance.meter.flow_row cimport Direction, FlowRow, TEXT_COUNT, TcpReport


cdef inline dict direction_fields(const Direction* x):
    return {
        "packets": x.packets, "octets": x.octets, "first_ns": x.first_ns, "last_ns": x.last_ns,
        "payload_octets": x.payload_octets, "tcp_sequence": x.tcp_sequence,
        "min_length": x.min_length, "max_length": x.max_length, "min_ttl": x.min_ttl, "max_ttl": x.max_ttl,
        "tos": x.tos, "fragment_flags": x.fragment_flags, "entropy": x.entropy if x.has_entropy else None,
        "tcp_flags": x.tcp_flags, "tcp_initial_flags": x.tcp_initial_flags, "tcp_later_flags": x.tcp_later_flags,
    }


cdef inline dict tcp_fields(const TcpReport* r):
    return {
        "goodput_octets": r.goodput_octets, "retransmitted_packets": r.retransmitted_packets,
        "out_of_order_packets": r.out_of_order_packets, "lost_segments": r.lost_segments,
        "duplicate_acks": r.duplicate_acks, "zero_windows": r.zero_windows, "stalls": r.stalls,
        "keep_alives": r.keep_alives, "max_window": r.max_window,
        "rtt_min_us": r.rtt_min_us, "rtt_last_us": r.rtt_last_us, "rtt_samples": r.rtt_samples,
        "initial_rtt_us": r.initial_rtt_us, "mss": r.mss, "window_scale": r.window_scale,
    }


cdef inline dict row_fields(const FlowRow* row):
    cdef Py_ssize_t address_bytes = 4 if row.ip_version == 4 else 16
    return {
        "source_address": (<const char*>row.source_address)[:address_bytes],
        "destination_address": (<const char*>row.destination_address)[:address_bytes],
        "source_port": row.source_port, "destination_port": row.destination_port,
        "protocol": row.protocol, "ip_version": row.ip_version,
        "vlan_tags": row.vlan_tags, "vlan_outer": row.vlan_outer, "vlan_inner": row.vlan_inner,
        "interface": row.interface, "mpls": row.mpls, "icmp_type_code": row.icmp_type_code,
        "end_reason": row.end_reason, "due_ns": row.due_ns,
        "biflow_direction": row.biflow_direction, "flow_id": row.flow_id,
        "start_ns": row.start_ns, "end_ns": row.end_ns,
        "source_mac": (<const char*>row.source_mac)[:6], "destination_mac": (<const char*>row.destination_mac)[:6],
        "packet_sequence": [
            (row.notes[i].time_ns, row.notes[i].length, row.notes[i].direction, row.notes[i].tcp_flags)
            for i in range(row.noted_packets)
        ],
        "forward": direction_fields(&row.forward), "reverse": direction_fields(&row.reverse),
        "rtt_min_us": row.rtt_min_us, "rtt_last_us": row.rtt_last_us, "rtt_samples": row.rtt_samples,
        "dns_type": row.dns_type, "texts": [
            (<const char*>row.texts[i].octets)[: row.texts[i].length].decode("latin-1") if row.texts[i].length else ""
            for i in range(TEXT_COUNT)
        ],
        "forward_tcp": tcp_fields(&row.forward_tcp), "reverse_tcp": tcp_fields(&row.reverse_tcp),
    }
