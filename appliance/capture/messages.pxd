"""What the first messages of DNS, HTTP and SSH say. Every octet that is read is within `length`; loops are bounded."""

from libc.stdint cimport uint8_t, uint32_t

from appliance.capture.findings cimport *
from appliance.ring.network_order cimport be16

cdef enum:
    DNS_HEADER_BYTES = 12
    DNS_LABEL_MAX = 63
    DNS_OPCODES = 7  # RFC 8490: the largest that is assigned is 6
    DNS_NAME_MAX = 255  # RFC 1035, 2.3.4: on the wire
    HTTP_SCANNED_BYTES = 8192
    HTTP_METHOD_MAX = 20
    HTTP_LONG_LINE = 500  # a request line that fills so much, and goes on in the next segment, is believed
    SSH_LINE_MAX = 255  # RFC 4253, 4.2: with CR LF


cdef inline bint read_dns(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """The first question (RFC 1035, 4.1). Without one, an answer is DNS all the same: multicast ones have none. False:
    it is no DNS message."""
    cdef Name name
    cdef uint32_t at = DNS_HEADER_BYTES
    cdef uint32_t i, label
    if length < DNS_HEADER_BYTES or (p[2] >> 3) & 0x0F >= DNS_OPCODES:
        return False
    name.length = 0
    name.cut = False
    if be16(p + 4) == 0:
        if not p[2] & 0x80 or be16(p + 6) == 0:
            return False
        f.application = APPLICATION_DNS
        return True
    while at < length and at - DNS_HEADER_BYTES < DNS_NAME_MAX:
        label = p[at]
        at += 1
        if label == 0:
            break
        if label > DNS_LABEL_MAX or label > length - at:
            return False
        if name.length != 0:
            add_octet(&name, 0x2E, False)
        for i in range(label):
            add_octet(&name, p[at + i], p[at + i] == 0x2E)
        at += label
    if p[at - 1] != 0 or length - at < 4:
        return False
    if name.length == 0:
        add_octet(&name, 0x2E, False)  # the root
    f.application = APPLICATION_DNS
    add_name(f, FIELD_DNS_NAME, &name)
    add_field(f, FIELD_DNS_TYPE, p + at, 2)
    return True


cdef inline uint32_t line_end(const uint8_t* p, uint32_t at, uint32_t length) noexcept nogil:
    """Where the line that begins at `at` has its line feed; `length`: nowhere."""
    while at < length and p[at] != 0x0A:
        at += 1
    return at


cdef inline bint is_host(const uint8_t* p, uint32_t length) noexcept nogil:
    """`Host:`, in letters of either case."""
    return (
        length >= 5 and (p[0] | 0x20) == 0x68 and (p[1] | 0x20) == 0x6F and (p[2] | 0x20) == 0x73
        and (p[3] | 0x20) == 0x74 and p[4] == 0x3A
    )


cdef inline void read_host(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """The header's value, without the space around it."""
    cdef uint32_t start = 5
    while start < length and (p[start] == 0x20 or p[start] == 0x09):
        start += 1
    while length > start and (p[length - 1] == 0x20 or p[length - 1] == 0x09 or p[length - 1] == 0x0D):
        length -= 1
    add_text(f, FIELD_HTTP_HOST, p + start, length - start)


cdef inline bint is_http_version(const uint8_t* p) noexcept nogil:
    """`HTTP/1.` and a digit: 8 octets."""
    return (
        p[0] == 0x48 and p[1] == 0x54 and p[2] == 0x54 and p[3] == 0x50 and p[4] == 0x2F and p[5] == 0x31
        and p[6] == 0x2E and 0x30 <= p[7] <= 0x39
    )


cdef inline bint read_http(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """A request (RFC 9112, 3): method and host; of a response, that it is one. False: neither."""
    cdef uint32_t method = 0
    cdef uint32_t at, end
    if length >= 13 and is_http_version(p):
        if p[8] != 0x20 or not 0x31 <= p[9] <= 0x35:
            return False
        f.application = APPLICATION_HTTP
        return True
    length = min(length, <uint32_t>HTTP_SCANNED_BYTES)
    while method < length and method <= HTTP_METHOD_MAX and (0x41 <= p[method] <= 0x5A or p[method] == 0x2D):
        method += 1
    if method < 3 or method > HTTP_METHOD_MAX or method == length or p[method] != 0x20:
        return False
    end = line_end(p, method, length)
    if end == length:
        if length < HTTP_LONG_LINE or p[method + 1] != 0x2F:
            return False
    elif end < method + 12 or p[end - 10] != 0x20 or not is_http_version(p + end - 9) or p[end - 1] != 0x0D:
        return False
    f.application = APPLICATION_HTTP
    add_text(f, FIELD_HTTP_METHOD, p, method)
    at = end + 1
    while at < length:
        end = line_end(p, at, length)
        if end == length:
            break
        if end - at <= 1:
            return True  # the empty line: no host
        if is_host(p + at, end - at):
            read_host(p + at, end - at, f)
            return True
        at = end + 1
    f.flags |= EXTENSION_PARTIAL
    return True


cdef inline bint read_ssh(const uint8_t* p, uint32_t length, Findings* f) noexcept nogil:
    """The identification string: SSH-protoversion-softwareversion. False: it is none."""
    cdef uint32_t end
    if length < 9 or p[0] != 0x53 or p[1] != 0x53 or p[2] != 0x48 or p[3] != 0x2D:
        return False
    if not (0x31 <= p[4] <= 0x32 and p[5] == 0x2E):
        return False
    end = line_end(p, 6, min(length, <uint32_t>SSH_LINE_MAX))
    if end == length:
        f.flags |= EXTENSION_PARTIAL
    elif end == SSH_LINE_MAX:
        return False
    f.application = APPLICATION_SSH
    while end > 6 and (p[end - 1] == 0x0D or p[end - 1] == 0x20):
        end -= 1
    add_text(f, FIELD_SSH_VERSION, p, end)
    return True
