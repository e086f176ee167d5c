"""The beginning of TLS: server name and protocols of a ClientHello (RFC 8446, 4.1.2; RFC 6066, 3; RFC 7301).

A message may end early: what stands before its end is found. Every loop advances by 4 octets or more.
"""

from libc.stdint cimport uint8_t, uint32_t

from appliance.capture.findings cimport *
from appliance.ring.network_order cimport be16

cdef enum:
    RECORD_HEADER_BYTES = 5
    HANDSHAKE_HEADER_BYTES = 4
    RECORD_BYTES_MAX = 16384 + 2048
    TLS_HANDSHAKE = 22
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    EXTENSION_SERVER_NAME = 0
    EXTENSION_ALPN = 16
    HOST_NAME = 0


cdef inline uint32_t be24(const uint8_t* p) noexcept nogil:
    return (<uint32_t>p[0] << 16) | (<uint32_t>p[1] << 8) | p[2]


cdef inline bint is_handshake(const uint8_t* p, uint32_t length, uint8_t kind) noexcept nogil:
    """A handshake record of TLS that begins with this message."""
    cdef uint32_t record_bytes
    if length < RECORD_HEADER_BYTES + HANDSHAKE_HEADER_BYTES + 2 or p[0] != TLS_HANDSHAKE or p[1] != 3 or p[2] > 4:
        return False
    record_bytes = be16(p + 3)
    return HANDSHAKE_HEADER_BYTES < record_bytes <= RECORD_BYTES_MAX and p[5] == kind and p[6] == 0 and p[9] == 3


cdef inline uint32_t hello_bytes(const uint8_t* message) noexcept nogil:
    """Of the whole message, its header included; `message`: 4 octets are there."""
    return HANDSHAKE_HEADER_BYTES + be24(message + 1)


cdef inline void read_server_name(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """The first host name of the list."""
    cdef uint32_t name_bytes
    if length < 5 or p[2] != HOST_NAME:
        return
    name_bytes = be16(p + 3)
    if name_bytes <= length - 5:
        add_text(f, FIELD_SERVER_NAME, p + 5, name_bytes)


cdef inline void read_alpn(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """All that are offered, in their order; a comma inside of one is escaped."""
    cdef Name name
    cdef uint32_t at = 2
    cdef uint32_t i
    name.length = 0
    name.cut = False
    while at < length and not name.cut:
        if p[at] == 0 or p[at] > length - at - 1:
            return
        if name.length != 0:
            add_octet(&name, 0x2C, False)
        for i in range(p[at]):
            add_octet(&name, p[at + 1 + i], p[at + 1 + i] == 0x2C)
        at += 1 + p[at]
    add_name(f, FIELD_ALPN, &name)


cdef inline void read_extensions(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """The first of each kind: a second one is forbidden (RFC 8446, 4.2)."""
    cdef uint32_t at = 0
    cdef uint32_t kind, bytes
    cdef bint has_name = False
    cdef bint has_alpn = False
    while length - at >= 4:
        kind = be16(p + at)
        bytes = be16(p + at + 2)
        at += 4
        if bytes > length - at:
            return
        if kind == EXTENSION_SERVER_NAME and not has_name:
            has_name = True
            read_server_name(p + at, bytes, f)
        elif kind == EXTENSION_ALPN and not has_alpn:
            has_alpn = True
            read_alpn(p + at, bytes, f)
        at += bytes


cdef inline void read_hello(const uint8_t* message, uint32_t length, Findings* f) noexcept nogil:
    """A ClientHello, as much of it as there is: header, version, random, session, ciphers, compression, extensions."""
    cdef uint32_t at = HANDSHAKE_HEADER_BYTES + 2 + 32
    cdef uint32_t end
    if length < HANDSHAKE_HEADER_BYTES:
        f.flags |= EXTENSION_PARTIAL
        return
    end = hello_bytes(message)
    if end > length:
        f.flags |= EXTENSION_PARTIAL
        end = length
    if at + 1 > end:
        return
    at += 1 + message[at]
    if at + 2 > end:
        return
    at += 2 + be16(message + at)
    if at + 1 > end:
        return
    at += 1 + message[at]
    if at + 2 > end:
        return
    at += 2
    read_extensions(message + at, min(<uint32_t>be16(message + at - 2), end - at), f)
