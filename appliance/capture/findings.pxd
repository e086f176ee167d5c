"""What inspection finds in a payload, on its way into a digest's extension (appliance/ring/digest.h).

Names come from strangers: they leave as printable ASCII, cut to FIELD_NAME_MAX octets.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from appliance.ring.digest cimport *

cdef enum:
    FINDINGS_BYTES = 516  # two names; the extension's room without its head and padding

cdef struct Findings:
    uint8_t application
    uint8_t flags
    uint8_t entropy
    uint32_t used
    uint8_t[FINDINGS_BYTES] fields

# A name that is being written.
cdef struct Name:
    uint32_t length
    uint8_t[254] octets
    bint cut


cdef inline void add_octet(Name* name, uint8_t octet, bint special) noexcept nogil:
    """`special`: the octet means something else here when it stands alone, and is escaped."""
    cdef bint is_plain = 0x20 <= octet < 0x7F and octet != 0x5C and not special
    if name.length + (1 if is_plain else 4) > FIELD_NAME_MAX:
        name.cut = True
    elif not name.cut and is_plain:
        name.octets[name.length] = octet
        name.length += 1
    elif not name.cut:
        name.octets[name.length] = 0x5C
        name.octets[name.length + 1] = <uint8_t>(48 + octet // 100)
        name.octets[name.length + 2] = <uint8_t>(48 + octet // 10 % 10)
        name.octets[name.length + 3] = <uint8_t>(48 + octet % 10)
        name.length += 4


cdef inline void add_field(Findings* f, uint8_t kind, const uint8_t* value, uint32_t length) noexcept nogil:
    if length > FIELD_NAME_MAX or f.used + 2 + length > FINDINGS_BYTES:
        f.flags |= EXTENSION_PARTIAL
        return
    f.fields[f.used] = kind
    f.fields[f.used + 1] = <uint8_t>length
    memcpy(f.fields + f.used + 2, value, length)
    f.used += 2 + length


cdef inline void add_name(Findings* f, uint8_t kind, const Name* name) noexcept nogil:
    if name.cut:
        f.flags |= EXTENSION_PARTIAL
    if name.length != 0:
        add_field(f, kind, name.octets, name.length)


cdef inline void add_text(Findings* f, uint8_t kind, const uint8_t* text, uint32_t length) noexcept nogil:
    """`length` octets of any kind."""
    cdef Name name
    cdef uint32_t i
    name.length = 0
    name.cut = False
    for i in range(length):
        add_octet(&name, text[i], False)
        if name.cut:
            break
    add_name(f, kind, &name)
