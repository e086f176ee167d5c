"""The application of a flow by what its first messages say, and the entropy of its payload, without the GIL.

Where the packets are (a capture worker, or the reader of a file) `inspect` of application.pxd looks at the payload of
each TCP and UDP packet, and adds what it finds to the packet's digest (appliance/ring/digest.h); the flow table keeps
the first of it. By what the payload says, not by its port, DNS excepted:

- TLS: a handshake record that begins with a ClientHello (server name, offered ALPN protocols) or a ServerHello. A
  ClientHello in several segments is put together when they come in order, 64 of them at once, 4096 octets each, for 2
  seconds; where more than four meet by their hash, the one that waited longest gives way. What its first segment says
  is told at once. One in several records is read as far as the first one goes.
- QUIC: versions 1 and 2 and the drafts 23 to 34. A client's Initial packets are decrypted, at most 10,000 a second, and
  their CRYPTO frames put together in any order, over several datagrams too, within the same bounds.
- DNS, over UDP and TCP to or from ports 53, 5353 and 5355: name and type of the first question.
- HTTP/1: method and Host of a request, when the header stands in one segment; of a response, that it is one.
- SSH: the identification strings of both sides.

A message that was not seen to its end is flagged partial. Entropy is Shannon's of the first 1024 octets of a payload,
0 to 255 for 0 to 8 bits an octet; of each direction of a flow it is measured once in each second of packet
time, and after a SYN; so flows that end and begin again within a second, without a SYN, may have none.

Rules: no octet at or behind the captured length is read; every loop advances, and ends with the message; no memory is
taken after the start. Names leave as printable ASCII: any other octet, and the backslash, as `\\DDD` (RFC 1035, 5.1),
as do a dot inside of a DNS label and a comma inside of an ALPN name; they are cut to 254 octets.
"""

from typing import Any

from typing_extensions import Buffer

class Inspector:
    """One for each source of packets: its state is that of one stream. About 300 KiB for applications, 260 for
    entropy."""

    def __init__(self, *, applications: bool = True, entropy: bool = False) -> None: ...

def findings(extension: Buffer) -> dict[str, Any]:
    """A digest's extension as a dictionary: `application`, `partial`, `entropy` (None: not measured), and the fields
    that it has (`server_name`, `alpn`, `dns_name`, `dns_type`, `http_host`, `http_method`, `ssh_version`). For tests.
    """

def crypto_findings(*packets: Buffer) -> dict[str, Any]:
    """What the CRYPTO frames in the payloads of a client's Initial packets say, once they are decrypted. For tests."""
