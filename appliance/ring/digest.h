/* The digest of one packet's headers: what the capture side parses while the bytes are hot, and all that the meter
 * sees. A record of type RECORD_DIGEST in the framing of layout.h: two cache lines, every field aligned to its own
 * size but for the addresses, integers in host byte order, addresses and MACs in wire order.
 *
 *    0 type | 4 length | 8 interface | 12 timestamp high | 16 timestamp low        the prefix of every record
 *   20 version, TTL, IP version, protocol
 *   24 source address | 40 destination address     IPv4: the first 4 octets, the others zero
 *   56 source port, destination port | 60 outer and inner VLAN tag     24..63 with 22 and 23 is the flow key
 *   64 IP octets, payload octets, original length
 *   76 TCP sequence, acknowledgement, window, flags
 *   88 fragment identification, offset, status
 *   96 source MAC, destination MAC
 *  108 ICMP type, code or TCP's MSS, VLAN tags, ToS | 112 MPLS | 116 captured length | 120 payload offset, extension length
 *  124 extension, if any | length again
 *
 * An extension stands between the fixed part and the closing length: what inspection of the payload found, if that is
 * wanted, and only of packets in which it found something. It begins with a digest_extension; then come fields of one
 * octet kind, one octet length, and the value, to its end or to a kind of 0. A reader takes what it knows and skips the
 * rest by `length`. Fields change only with DIGEST_VERSION.
 *
 * A live source leaves the digest of a plain packet (plain.pxd) as a plain_digest, in two thirds of the room: a record
 * of the same type, told by its length, with the headers as they were on the wire. The merge of the digests expands it. */
#ifndef APPLIANCE_RING_DIGEST_H
#define APPLIANCE_RING_DIGEST_H

#include "layout.h"

#define DIGEST_VERSION 1u
#define DIGEST_FIXED_BYTES 124u              /* up to the extension */
#define DIGEST_MIN_BYTES 128u                /* without an extension */
#define DIGEST_MAX_BYTES 128u                /* what a parser writes at most: its caller keeps that much room */
#define DIGEST_EXTENSION_MAX_BYTES 520u      /* a head and two names, in whole words of 4 octets */
#define DIGEST_EXTENDED_MAX_BYTES (DIGEST_MIN_BYTES + DIGEST_EXTENSION_MAX_BYTES) /* the same with inspection */
#define DIGEST_LIMIT_BYTES (DIGEST_MIN_BYTES + 65536u) /* longer is corrupt */

/* status */
#define DIGEST_TRUNCATED 0x0001u          /* the capture holds less than was on the wire */
#define DIGEST_CHECKSUM_NOT_READY 0x0002u /* left to the interface: outgoing, or never on a wire */
#define DIGEST_OUTGOING 0x0004u           /* sent by this host */
#define DIGEST_INCOMING 0x0008u           /* received by this host */
#define DIGEST_DONT_FRAGMENT 0x0010u      /* IPv4 DF */
#define DIGEST_MORE_FRAGMENTS 0x0020u     /* IPv4 MF, IPv6 M */
#define DIGEST_LATER_FRAGMENT 0x0040u     /* fragment offset above 0: no ports */
#define DIGEST_PORTS 0x0080u              /* the ports were read */
#define DIGEST_TCP 0x0100u                /* the TCP fields were read */
#define DIGEST_ICMP 0x0200u               /* ICMP type and code were read */
#define DIGEST_ZERO_LENGTH 0x0400u        /* the IP length field is 0: an offloaded segment (TSO, BIG TCP), no jumbogram */
#define DIGEST_CUT_TRANSPORT 0x0800u      /* the transport header is cut short or contradicts itself */
#define DIGEST_LINK_ADDRESSES 0x1000u     /* the MAC fields were read */
#define DIGEST_OPTIONS 0x2000u            /* IPv4 options or IPv6 extension headers */
/* in tcp_flags of a SYN: its window scale (RFC 7323) + 1, 0 without that option; at most 14 */
#define DIGEST_TCP_FLAGS 0x0FFFu
#define DIGEST_WINDOW_SCALE_SHIFT 12u
/* what the caller of the parser may set */
#define DIGEST_CALLER_STATUS (DIGEST_CHECKSUM_NOT_READY | DIGEST_OUTGOING | DIGEST_INCOMING)

/* what a payload is of */
#define APPLICATION_NONE 0u
#define APPLICATION_TLS 1u
#define APPLICATION_QUIC 2u
#define APPLICATION_DNS 3u
#define APPLICATION_HTTP 4u
#define APPLICATION_SSH 5u
#define APPLICATION_COUNT 6u

/* extension: flags */
#define EXTENSION_ENTROPY 0x01u /* the entropy was measured */
#define EXTENSION_PARTIAL 0x02u /* the message was not seen to its end: names may be missing */

/* extension: kinds of fields. Names are printable ASCII; every other octet, and the backslash, is \DDD (RFC 1035, 5.1) */
#define FIELD_SERVER_NAME 1u  /* TLS and QUIC: RFC 6066, 3 */
#define FIELD_ALPN 2u         /* offered protocols (RFC 7301), with commas between them */
#define FIELD_DNS_NAME 3u     /* of the first question, without the last dot */
#define FIELD_DNS_TYPE 4u     /* its type: 2 octets in network order */
#define FIELD_HTTP_HOST 5u
#define FIELD_HTTP_METHOD 6u
#define FIELD_SSH_VERSION 7u  /* the identification string (RFC 4253, 4.2) */
#define FIELD_NAME_MAX 254u   /* octets of a name */

struct digest_extension {
    uint8_t application;
    uint8_t flags;
    uint8_t entropy; /* 255 is 8 bits an octet */
    uint8_t unused;
};

struct digest {
    uint32_t type;
    uint32_t length;
    uint32_t interface;
    uint32_t timestamp_high;
    uint32_t timestamp_low;
    uint8_t version;
    uint8_t ttl; /* or hop limit */
    uint8_t ip_version;
    uint8_t protocol; /* the last header of the IPv6 chain */
    uint8_t source_address[16];
    uint8_t destination_address[16];
    uint16_t source_port;
    uint16_t destination_port;
    uint16_t vlan_outer; /* priority, DEI and identifier, as in the tag */
    uint16_t vlan_inner;
    uint32_t ip_octets;       /* IP total length; with DIGEST_ZERO_LENGTH what the frame holds */
    uint32_t payload_octets;  /* behind the transport header, on the wire */
    uint32_t original_length; /* of the frame */
    uint32_t tcp_sequence;
    uint32_t tcp_acknowledgement;
    uint16_t tcp_window;
    uint16_t tcp_flags; /* DIGEST_TCP_FLAGS, the reserved ones and AE included; above them a SYN's window scale */
    uint32_t fragment_id;
    uint16_t fragment_offset; /* octets */
    uint16_t status;
    uint8_t source_mac[6];
    uint8_t destination_mac[6];
    union {
        struct {
            uint8_t icmp_type;
            uint8_t icmp_code;
        };
        uint16_t tcp_mss; /* of a SYN, 0 without that option (RFC 9293, 3.7.1) */
    };
    uint8_t vlan_tags; /* number of VLAN tags */
    uint8_t tos;       /* or traffic class */
    uint32_t mpls;     /* top label stack entry, 0 when there is none */
    uint32_t captured_length;
    uint16_t payload_offset;   /* of the transport payload in the packet, 0 when unknown */
    uint16_t extension_length; /* octets between the fixed part and the closing length */
    uint32_t length_again;     /* here only without an extension */
};

#define PLAIN_HEADERS_BYTES 54u /* Ethernet, IPv4 and TCP, both without options; or UDP and what comes then */
#define PLAIN_DIGEST_BYTES 92u

struct plain_digest {
    uint32_t type;
    uint32_t length;
    uint32_t interface;
    uint32_t timestamp_high;
    uint32_t timestamp_low;
    uint8_t version;
    uint8_t unused;
    uint16_t status; /* of DIGEST_CALLER_STATUS */
    uint32_t captured_length;
    uint32_t original_length;
    uint8_t headers[PLAIN_HEADERS_BYTES + 2u];
    uint32_t length_again;
};

_Static_assert(sizeof(struct plain_digest) == PLAIN_DIGEST_BYTES, "in whole words of 4 octets");
_Static_assert(sizeof(struct digest) == DIGEST_MIN_BYTES, "two cache lines");
_Static_assert(offsetof(struct digest, source_address) == 24, "key");
_Static_assert(offsetof(struct digest, ip_octets) == 64, "the second line begins with the counters");
_Static_assert(DIGEST_EXTENSION_MAX_BYTES >= sizeof(struct digest_extension) + 2 * (2 + FIELD_NAME_MAX), "two names");
_Static_assert(offsetof(struct digest, length_again) == DIGEST_FIXED_BYTES, "fixed part");

#endif
