"""From packet bytes to digest records (appliance/ring/digest.h), without the GIL.

Compiled callers use `digest_packet` (one packet, while it is hot) and `digest_records` (a buffer of Enhanced Packet
Blocks) of headers.pxd. The flow that is described is that of the outermost IP header, or, with `inner`, of the
innermost one that tunnels lead to.

Rules of the parser:

- No octet at or behind the captured length is read, and none of them changes a result.
- At most 16 tags, labels, inner frames, tunnels and IPv6 extension headers together; every one advances the cursor.
- A packet is not metered, and counted under a reason, when it holds no IP (`not_ip`), when the capture ends inside the
  headers up to and including IP and its extension headers (`truncated`), when those contradict themselves or exceed
  their packet (`malformed`), when there are too many of them (`too_many_layers`), or when its link type is unknown.
- A transport header that is missing or cut does not matter for that: the ports are 0 and the status says so.
- Later fragments have ports 0; the first one has its ports; an IPv6 atomic fragment (RFC 6946) is no fragment.
- `ip_octets` is the IP length field (IPv6: plus 40; jumbograms: the option's length). Where that is 0 because
  segmentation was left to the interface (BIG TCP), it is what the frame had on the wire, and the status says so.
- With `inner`, a packet inside a tunnel that holds no IP, or whose headers are cut or broken, leaves the packet to the
  last IP header that could be read: it belongs to the tunnel's own flow. Later fragments of a tunnel's packets do, too.
  Tags, labels and link addresses are those of the innermost frame. Headers quoted in ICMP errors are no packets.

Link types: Ethernet with 802.1Q, QinQ, 802.1ad, PPPoE, MPLS (IP or an Ethernet pseudowire below, with or without a
control word) and SNAP; raw IP; Linux cooked (SLL, SLL2); BSD loopback (NULL, LOOP); PPP, also with a direction octet or
in HDLC framing, Cisco HDLC, PPPoE, MPLS and LLC alone.

Tunnels: IPv4 and IPv6 in each other and in themselves, also behind extension headers (segment routing: the key has the
addresses of the IPv6 header as it was on this link); GRE of version 0 with all its options, NVGRE, GRE of version 1
(PPTP); ERSPAN I, II and III; MPLS, Ethernet and EtherIP in IP; over UDP, to a port: VXLAN (4789, 8472), VXLAN-GPE
(4790), Geneve (6081), GRE (4754) and MPLS (6635); over UDP, to or from a port: GTP-U (2152), Teredo (3544), CAPWAP data
(5247) and L2TP of version 2 (1701). ESP ends the way.
"""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

from appliance.capture.application import Inspector

IGNORED: tuple[str, ...]
"""The reasons, in the order of `appliance.counters.IGNORED_REASONS`."""

def parse(
    packet: Buffer,
    linktype: int,
    original_length: int | None = None,
    captured_length: int | None = None,
    *,
    inner: bool = False,
    plain: bool = True,
    left: bool = False,
) -> dict[str, Any]:
    """The digest of one packet as a dictionary of the fields of digest.h, or `{"ignored": reason}`.

    `captured_length` below `len(packet)` leaves octets behind the packet that must not matter. `status` holds the
    DIGEST_* bits; addresses and MACs are bytes in wire order. Without `plain` the short way for the commonest packets
    is not taken, with `left` they are left as they are and expanded, as between a live source and the meter; the result
    is the same. For tests and single looks, not for traffic.
    """

def digests(
    records: Buffer, linktypes: Sequence[int], *, inner: bool = False, inspector: Inspector | None = None
) -> tuple[bytes, dict[str, int]]:
    """All digests of a buffer of records (layout.h), and the ignored packets by reason, with their `octets`.

    `linktypes[i]` is the link type of interface i; at most 256. ValueError: damaged framing.
    """
