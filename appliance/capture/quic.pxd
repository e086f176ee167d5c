"""The client's Initial packets of QUIC: their keys are public (RFC 9001, 5.2; RFC 9369), their CRYPTO frames hold a
ClientHello. OpenSSL's libcrypto does the arithmetic; an authentication tag that does not fit ends the look.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from appliance.ring.network_order cimport be32

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_MD:
        pass
    EVP_CIPHER_CTX* EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX* context)
    ctypedef struct EVP_MD_CTX:
        pass
    EVP_MD_CTX* EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX* context)
    EVP_CIPHER* EVP_CIPHER_fetch(void* library, const char* name, const char* properties)
    void EVP_CIPHER_free(EVP_CIPHER* kind)
    EVP_MD* EVP_MD_fetch(void* library, const char* name, const char* properties)
    void EVP_MD_free(EVP_MD* kind)
    int EVP_DigestInit_ex(EVP_MD_CTX* context, const EVP_MD* kind, void* engine)
    int EVP_DigestUpdate(EVP_MD_CTX* context, const void* data, size_t length)
    int EVP_DigestFinal_ex(EVP_MD_CTX* context, uint8_t* out, unsigned int* length)
    int EVP_EncryptInit_ex(
        EVP_CIPHER_CTX* context, const EVP_CIPHER* kind, void* engine, const uint8_t* key, const uint8_t* iv)
    int EVP_EncryptUpdate(EVP_CIPHER_CTX* context, uint8_t* out, int* written, const uint8_t* data, int length)
    int EVP_DecryptInit_ex(
        EVP_CIPHER_CTX* context, const EVP_CIPHER* kind, void* engine, const uint8_t* key, const uint8_t* iv)
    int EVP_DecryptUpdate(EVP_CIPHER_CTX* context, uint8_t* out, int* written, const uint8_t* data, int length)
    int EVP_DecryptFinal_ex(EVP_CIPHER_CTX* context, uint8_t* out, int* written)
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX* context, int what, int length, void* value)
    enum:
        EVP_CTRL_GCM_SET_TAG

cdef enum:
    QUIC_CONNECTION_ID_MAX = 20
    QUIC_CLIENT_ID_MIN = 8  # RFC 9000, 7.2: of the destination that a client makes up
    QUIC_SAMPLE_BYTES = 16
    QUIC_TAG_BYTES = 16
    QUIC_NUMBER_BYTES_MAX = 4
    QUIC_DATAGRAM_MIN = 1200  # RFC 9000, 14.1: of a client's Initial
    QUIC_PACKET_MAX = 2048
    QUIC_PACKETS_MAX = 4  # in one datagram
    SECRET_BYTES = 32
    HASH_BLOCK_BYTES = 64  # of SHA-256
    SALT_BYTES = 20
    HELLO_BYTES_MAX = 4096
    HAVE_BYTES = 512

    FRAME_PADDING = 0x00
    FRAME_PING = 0x01
    FRAME_ACK = 0x02
    FRAME_ACK_ECN = 0x03
    FRAME_CRYPTO = 0x06
    ACK_RANGES_MAX = 256

cdef struct Version:
    uint32_t number
    uint8_t initial_type  # of the long header
    const uint8_t* salt
    const char* label  # of key, iv and hp

cdef extern from *:
    """
    static const unsigned char QUIC_SALT_1[20] = {0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17,
                                                  0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a};
    static const unsigned char QUIC_SALT_2[20] = {0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93,
                                                  0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9};
    static const unsigned char QUIC_SALT_23[20] = {0xc3, 0xee, 0xf7, 0x12, 0xc7, 0x2e, 0xbb, 0x5a, 0x11, 0xa7,
                                                   0xd2, 0x43, 0x2b, 0xb4, 0x63, 0x65, 0xbe, 0xf9, 0xf5, 0x02};
    static const unsigned char QUIC_SALT_29[20] = {0xaf, 0xbf, 0xec, 0x28, 0x99, 0x93, 0xd2, 0x4c, 0x9e, 0x97,
                                                   0x86, 0xf1, 0x9c, 0x61, 0x11, 0xe0, 0x43, 0x90, 0xa8, 0x99};
    """
    const uint8_t* QUIC_SALT_1
    const uint8_t* QUIC_SALT_2
    const uint8_t* QUIC_SALT_23
    const uint8_t* QUIC_SALT_29

# What is known of an Initial packet before its protection is taken away.
cdef struct Initial:
    Version version
    const uint8_t* id  # destination connection ID
    uint32_t id_bytes
    uint32_t number_at  # of the packet number; the packet begins at 0
    uint32_t end

# What libcrypto needs, looked up once: to look it up again takes longer than the arithmetic.
cdef struct Crypto:
    EVP_MD* sha256
    EVP_MD_CTX* hash
    EVP_CIPHER* ecb_kind
    EVP_CIPHER_CTX* ecb
    EVP_CIPHER* gcm_kind
    EVP_CIPHER_CTX* gcm

cdef struct Keys:
    uint8_t[16] key
    uint8_t[12] iv
    uint8_t[16] header

# A ClientHello that comes in pieces, in any order.
cdef struct Pieces:
    uint8_t[HELLO_BYTES_MAX] octets
    uint8_t[HAVE_BYTES] have  # a bit for each


cdef inline bint known_version(uint32_t number, Version* version) noexcept nogil:
    version.number = number
    version.initial_type = 0
    version.label = "quic "
    if number == 1:
        version.salt = QUIC_SALT_1
    elif number == 0x6B3343CF:
        version.initial_type = 1
        version.salt = QUIC_SALT_2
        version.label = "quicv2 "
    elif number >> 8 == 0xFF0000 and 23 <= number & 0xFF <= 34:  # drafts
        version.salt = QUIC_SALT_23 if number & 0xFF < 29 else QUIC_SALT_29 if number & 0xFF < 33 else QUIC_SALT_1
    else:
        return False
    return True


cdef inline bint take_varint(const uint8_t* p, uint32_t* at, uint32_t end, uint64_t* value) noexcept nogil:
    """RFC 9000, 16. False: it is cut."""
    cdef uint32_t bytes, i
    if at[0] >= end:
        return False
    bytes = <uint32_t>1 << (p[at[0]] >> 6)
    if bytes > end - at[0]:
        return False
    value[0] = p[at[0]] & 0x3F
    for i in range(1, bytes):
        value[0] = (value[0] << 8) | p[at[0] + i]
    at[0] += bytes
    return True


cdef inline bint read_initial(const uint8_t* p, uint32_t length, Initial* packet) noexcept nogil:
    """The long header of an Initial packet (RFC 9000, 17.2.2). False: it is none, or cut."""
    cdef uint32_t at = 6
    cdef uint64_t value = 0
    memset(packet, 0, sizeof(Initial))
    if length < 7 or p[0] & 0xC0 != 0xC0 or not known_version(be32(p + 1), &packet.version):
        return False
    if (p[0] >> 4) & 3 != packet.version.initial_type or p[5] > QUIC_CONNECTION_ID_MAX:
        return False
    packet.id = p + at
    packet.id_bytes = p[5]
    at += packet.id_bytes
    if at >= length or p[at] > QUIC_CONNECTION_ID_MAX or p[at] >= length - at:
        return False
    at += 1 + p[at]
    if not take_varint(p, &at, length, &value) or value > length - at:
        return False
    at += <uint32_t>value  # the token
    if not take_varint(p, &at, length, &value) or value > length - at:
        return False
    packet.number_at = at
    packet.end = at + <uint32_t>value
    return value >= QUIC_NUMBER_BYTES_MAX + QUIC_SAMPLE_BYTES


cdef inline bint open_crypto(Crypto* c) noexcept:
    """False: libcrypto lacks memory or an algorithm. close_crypto gives back what there is."""
    c.sha256 = EVP_MD_fetch(NULL, "SHA256", NULL)
    c.hash = EVP_MD_CTX_new()
    c.ecb_kind = EVP_CIPHER_fetch(NULL, "AES-128-ECB", NULL)
    c.ecb = EVP_CIPHER_CTX_new()
    c.gcm_kind = EVP_CIPHER_fetch(NULL, "AES-128-GCM", NULL)
    c.gcm = EVP_CIPHER_CTX_new()
    return (
        c.sha256 != NULL and c.hash != NULL and c.ecb_kind != NULL and c.ecb != NULL and c.gcm_kind != NULL
        and c.gcm != NULL
    )


cdef inline void close_crypto(Crypto* c) noexcept:
    EVP_MD_CTX_free(c.hash)
    EVP_MD_free(c.sha256)
    EVP_CIPHER_CTX_free(c.ecb)
    EVP_CIPHER_free(c.ecb_kind)
    EVP_CIPHER_CTX_free(c.gcm)
    EVP_CIPHER_free(c.gcm_kind)


cdef inline bint hash_two(Crypto* c, const uint8_t* first, uint32_t first_bytes, const uint8_t* second,
                          uint32_t second_bytes, uint8_t* out) noexcept nogil:
    return (
        EVP_DigestInit_ex(c.hash, c.sha256, NULL) == 1
        and EVP_DigestUpdate(c.hash, first, first_bytes) == 1
        and EVP_DigestUpdate(c.hash, second, second_bytes) == 1
        and EVP_DigestFinal_ex(c.hash, out, NULL) == 1
    )


cdef inline bint hmac_sha256(Crypto* c, const uint8_t* key, uint32_t key_bytes, const uint8_t* data, uint32_t length,
                             uint8_t* out) noexcept nogil:
    """RFC 2104, with a key of at most 64 octets; 32 octets to `out`."""
    cdef uint8_t[HASH_BLOCK_BYTES] inner
    cdef uint8_t[HASH_BLOCK_BYTES] outer
    cdef uint32_t i
    memset(inner, 0x36, HASH_BLOCK_BYTES)
    memset(outer, 0x5C, HASH_BLOCK_BYTES)
    for i in range(key_bytes):
        inner[i] ^= key[i]
        outer[i] ^= key[i]
    return (
        hash_two(c, inner, HASH_BLOCK_BYTES, data, length, out)
        and hash_two(c, outer, HASH_BLOCK_BYTES, out, SECRET_BYTES, out)
    )


cdef inline uint32_t add_characters(uint8_t* out, uint32_t at, const char* text) noexcept nogil:
    """Returns the place behind them; three of our own labels never fill the 64 octets."""
    while text[0] != 0 and at < 60:
        out[at] = <uint8_t>text[0]
        at += 1
        text += 1
    return at


cdef inline bint expand_label(Crypto* c, const uint8_t* secret, const char* prefix, const char* label, uint8_t* out,
                              uint32_t bytes) noexcept nogil:
    """HKDF-Expand-Label (RFC 8446, 7.1) with an empty context, for at most 32 octets."""
    cdef uint8_t[64] info
    cdef uint8_t[SECRET_BYTES] block
    cdef uint32_t at = add_characters(info, 3, "tls13 ")
    at = add_characters(info, add_characters(info, at, prefix), label)
    info[0] = 0
    info[1] = <uint8_t>bytes
    info[2] = <uint8_t>(at - 3)
    info[at] = 0
    info[at + 1] = 1
    if not hmac_sha256(c, secret, SECRET_BYTES, info, at + 2, block):
        return False
    memcpy(out, block, bytes)
    return True


cdef inline bint client_keys(Crypto* c, const Initial* packet, Keys* keys) noexcept nogil:
    """RFC 9001, 5.2: out of the version's salt and the destination connection ID."""
    cdef uint8_t[SECRET_BYTES] initial
    cdef uint8_t[SECRET_BYTES] client
    return (
        hmac_sha256(c, packet.version.salt, SALT_BYTES, packet.id, packet.id_bytes, initial)
        and expand_label(c, initial, "", "client in", client, SECRET_BYTES)
        and expand_label(c, client, packet.version.label, "key", keys.key, 16)
        and expand_label(c, client, packet.version.label, "iv", keys.iv, 12)
        and expand_label(c, client, packet.version.label, "hp", keys.header, 16)
    )


cdef inline bint open_initial(Crypto* c, const uint8_t* p, const Initial* packet, uint8_t* plain,
                              uint32_t* plain_bytes) noexcept nogil:
    """Takes away the protection of header and payload (RFC 9001, 5.3 and 5.4). `plain`: QUIC_PACKET_MAX octets.
    False: this is not the client's, or it was changed."""
    cdef Keys keys
    cdef uint8_t[16] mask
    cdef uint8_t[QUIC_PACKET_MAX] header
    cdef uint32_t header_bytes, number_bytes, payload_bytes, i
    cdef const uint8_t* sample
    cdef const uint8_t* tag
    cdef int written = 0
    if packet.end > QUIC_PACKET_MAX or not client_keys(c, packet, &keys):
        return False
    if EVP_EncryptInit_ex(c.ecb, c.ecb_kind, NULL, keys.header, NULL) != 1:
        return False
    sample = p + packet.number_at + QUIC_NUMBER_BYTES_MAX
    if EVP_EncryptUpdate(c.ecb, mask, &written, sample, QUIC_SAMPLE_BYTES) != 1 or written != 16:
        return False
    number_bytes = ((p[0] ^ mask[0]) & 3) + 1
    header_bytes = packet.number_at + number_bytes
    payload_bytes = packet.end - header_bytes - QUIC_TAG_BYTES
    memcpy(header, p, header_bytes)
    header[0] ^= mask[0] & 0x0F
    for i in range(number_bytes):
        header[packet.number_at + i] ^= mask[1 + i]
        keys.iv[12 - number_bytes + i] ^= header[packet.number_at + i]
    if EVP_DecryptInit_ex(c.gcm, c.gcm_kind, NULL, keys.key, keys.iv) != 1:
        return False
    if EVP_DecryptUpdate(c.gcm, NULL, &written, header, <int>header_bytes) != 1:
        return False
    if EVP_DecryptUpdate(c.gcm, plain, &written, p + header_bytes, <int>payload_bytes) != 1:
        return False
    plain_bytes[0] = payload_bytes
    tag = p + packet.end - QUIC_TAG_BYTES
    if EVP_CIPHER_CTX_ctrl(c.gcm, EVP_CTRL_GCM_SET_TAG, QUIC_TAG_BYTES, <void*>tag) != 1:
        return False
    return EVP_DecryptFinal_ex(c.gcm, mask, &written) == 1


cdef inline void add_piece(Pieces* pieces, uint64_t offset, const uint8_t* p, uint32_t length) noexcept nogil:
    cdef uint32_t i, first
    if offset >= HELLO_BYTES_MAX:
        return
    first = <uint32_t>offset
    length = min(length, HELLO_BYTES_MAX - first)
    memcpy(pieces.octets + first, p, length)
    for i in range(first, first + length):
        pieces.have[i >> 3] |= <uint8_t>(1 << (i & 7))


cdef inline uint32_t whole_octets(const Pieces* pieces) noexcept nogil:
    """How many there are from the first one on without a gap."""
    cdef uint32_t at = 0
    while at < HELLO_BYTES_MAX and pieces.have[at >> 3] == 0xFF:
        at += 8
    while at < HELLO_BYTES_MAX and pieces.have[at >> 3] & (1 << (at & 7)):
        at += 1
    return at


cdef inline bint pass_ack(const uint8_t* p, uint32_t* at, uint32_t end, bint has_ecn) noexcept nogil:
    """RFC 9000, 19.3: largest, delay, number of ranges, first range, the ranges, the ECN counts."""
    cdef uint64_t value = 0
    cdef uint64_t ranges = 0
    cdef uint64_t _i
    if not take_varint(p, at, end, &value) or not take_varint(p, at, end, &value):
        return False
    if not take_varint(p, at, end, &ranges) or ranges > ACK_RANGES_MAX or not take_varint(p, at, end, &value):
        return False
    for _i in range(2 * ranges + (3 if has_ecn else 0)):
        if not take_varint(p, at, end, &value):
            return False
    return True


cdef inline void take_crypto(const uint8_t* p, uint32_t end, Pieces* pieces) noexcept nogil:
    """The CRYPTO frames among those of an Initial packet; each frame is an octet or more."""
    cdef uint32_t at = 0
    cdef uint64_t offset = 0
    cdef uint64_t bytes = 0
    cdef uint8_t kind
    while at < end:
        kind = p[at]
        at += 1
        if kind == FRAME_PADDING or kind == FRAME_PING:
            continue
        if kind == FRAME_ACK or kind == FRAME_ACK_ECN:
            if not pass_ack(p, &at, end, kind == FRAME_ACK_ECN):
                return
        elif kind == FRAME_CRYPTO:
            if not take_varint(p, &at, end, &offset) or not take_varint(p, &at, end, &bytes) or bytes > end - at:
                return
            add_piece(pieces, offset, p + at, <uint32_t>bytes)
            at += <uint32_t>bytes
        else:
            return
