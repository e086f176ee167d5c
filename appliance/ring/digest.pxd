"""The digest record of digest.h, for compiled modules."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef extern from "digest.h" nogil:
    const uint32_t DIGEST_VERSION
    const uint32_t DIGEST_FIXED_BYTES
    const uint32_t DIGEST_MIN_BYTES
    const uint32_t DIGEST_MAX_BYTES
    const uint32_t DIGEST_EXTENSION_MAX_BYTES
    const uint32_t DIGEST_EXTENDED_MAX_BYTES
    const uint32_t DIGEST_LIMIT_BYTES
    const uint32_t PLAIN_HEADERS_BYTES
    const uint32_t PLAIN_DIGEST_BYTES
    const uint32_t DIGEST_TRUNCATED
    const uint32_t DIGEST_CHECKSUM_NOT_READY
    const uint32_t DIGEST_OUTGOING
    const uint32_t DIGEST_INCOMING
    const uint32_t DIGEST_DONT_FRAGMENT
    const uint32_t DIGEST_MORE_FRAGMENTS
    const uint32_t DIGEST_LATER_FRAGMENT
    const uint32_t DIGEST_PORTS
    const uint32_t DIGEST_TCP
    const uint32_t DIGEST_ICMP
    const uint32_t DIGEST_ZERO_LENGTH
    const uint32_t DIGEST_CUT_TRANSPORT
    const uint32_t DIGEST_LINK_ADDRESSES
    const uint32_t DIGEST_OPTIONS
    const uint32_t DIGEST_TCP_FLAGS
    const uint32_t DIGEST_WINDOW_SCALE_SHIFT
    const uint32_t DIGEST_CALLER_STATUS
    const uint32_t APPLICATION_NONE
    const uint32_t APPLICATION_TLS
    const uint32_t APPLICATION_QUIC
    const uint32_t APPLICATION_DNS
    const uint32_t APPLICATION_HTTP
    const uint32_t APPLICATION_SSH
    const uint32_t APPLICATION_COUNT
    const uint32_t EXTENSION_ENTROPY
    const uint32_t EXTENSION_PARTIAL
    const uint32_t FIELD_SERVER_NAME
    const uint32_t FIELD_ALPN
    const uint32_t FIELD_DNS_NAME
    const uint32_t FIELD_DNS_TYPE
    const uint32_t FIELD_HTTP_HOST
    const uint32_t FIELD_HTTP_METHOD
    const uint32_t FIELD_SSH_VERSION
    const uint32_t FIELD_NAME_MAX

    struct digest_extension:
        uint8_t application
        uint8_t flags
        uint8_t entropy

    struct digest:
        uint32_t type
        uint32_t length
        uint32_t interface
        uint32_t timestamp_high
        uint32_t timestamp_low
        uint8_t version
        uint8_t ttl
        uint8_t ip_version
        uint8_t protocol
        uint8_t[16] source_address
        uint8_t[16] destination_address
        uint16_t source_port
        uint16_t destination_port
        uint16_t vlan_outer
        uint16_t vlan_inner
        uint32_t ip_octets
        uint32_t payload_octets
        uint32_t original_length
        uint32_t tcp_sequence
        uint32_t tcp_acknowledgement
        uint16_t tcp_window
        uint16_t tcp_flags
        uint32_t fragment_id
        uint16_t fragment_offset
        uint16_t status
        uint8_t[6] source_mac
        uint8_t[6] destination_mac
        uint8_t icmp_type
        uint8_t icmp_code
        uint16_t tcp_mss  # in the place of the two above
        uint8_t vlan_tags
        uint8_t tos
        uint32_t mpls
        uint32_t captured_length
        uint16_t payload_offset
        uint16_t extension_length
        uint32_t length_again

    struct plain_digest:
        uint32_t type
        uint32_t length
        uint32_t interface
        uint32_t timestamp_high
        uint32_t timestamp_low
        uint8_t version
        uint16_t status
        uint32_t captured_length
        uint32_t original_length
        uint8_t headers[56]
        uint32_t length_again
