/* SPDX-License-Identifier: Apache-2.0
 *
 * The plain data that crosses svcdp's borders: between the core and its
 * callers in C, Cython or through cffi. Needs stdint.h and nothing else.
 * Every enum here has a Python twin in svcdp/types.py; a test compares them.
 */
#ifndef SVCDP_ABI_H
#define SVCDP_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* <cffi> */

/* What the caller must do with a packet. */
enum svcdp_verdict {
    SVCDP_VERDICT_PASS = 0,    /* not ours: send it on as it is */
    SVCDP_VERDICT_FORWARD = 1, /* send it on as it now is */
    SVCDP_VERDICT_DROP = 2,
    SVCDP_VERDICT_REJECT = 3,  /* drop it and send the answer that the core builds */
    SVCDP_VERDICT_COUNT = 4
};

/* Why. Each packet has exactly one, and each is counted. A REJECT by ICMP is a DROP when too many
 * answers were sent lately. */
enum svcdp_reason {
    SVCDP_REASON_NO_SERVICE = 0,      /* PASS: no service, no connection */
    SVCDP_REASON_ESTABLISHED = 1,     /* FORWARD: client to destination, known connection */
    SVCDP_REASON_REPLY = 2,           /* FORWARD: destination to client, known connection */
    SVCDP_REASON_NEW = 3,             /* FORWARD: first packet of a connection */
    SVCDP_REASON_RELATED = 4,         /* FORWARD: ICMP error about a known connection */
    SVCDP_REASON_NO_DESTINATION = 5,  /* REJECT or DROP: the service has nobody to serve */
    SVCDP_REASON_SOURCE_RANGE = 6,    /* DROP: no source rule of the service admits the client */
    SVCDP_REASON_NO_CONNECTION = 7,   /* REJECT or DROP: to a service, opens nothing, not known */
    SVCDP_REASON_TABLE_FULL = 8,      /* DROP: new connection, connection table full */
    SVCDP_REASON_NO_PORT = 9,         /* DROP: no masquerade port, or both replies would look alike */
    SVCDP_REASON_NO_MASQUERADE = 10,  /* DROP: masquerade asked for, no address to do it with */
    SVCDP_REASON_TRUNCATED = 11,      /* PASS: shorter than its headers say */
    SVCDP_REASON_MALFORMED = 12,      /* PASS: headers that contradict themselves */
    SVCDP_REASON_FRAGMENT = 13,       /* PASS or DROP: a fragment, and no way to tell or send it */
    SVCDP_REASON_PROTOCOL = 14,       /* PASS: not TCP, UDP, SCTP or an ICMP error */
    SVCDP_REASON_NOT_IP = 15,         /* PASS: neither IPv4 nor IPv6 */
    SVCDP_REASON_TIME_EXCEEDED = 16,  /* REJECT or DROP: the packet has no hop left */
    SVCDP_REASON_TOO_BIG = 17,        /* REJECT or DROP: longer than the path allows */
    SVCDP_REASON_OVERLOAD = 18,       /* DROP: new connection, and the overload policy is at work */
    SVCDP_REASON_NO_CALL_ID = 19,     /* DROP: the service binds calls, and the packet names none */
    SVCDP_REASON_DESTINATION_GONE = 20, /* DROP: the connection's destination was removed */
    SVCDP_REASON_BYPASS = 21,         /* FORWARD: nobody serves; on to where the client meant */
    SVCDP_REASON_NO_HEADROOM = 22,    /* DROP: no room before the packet for a tunnel's headers */
    SVCDP_REASON_CHECKSUM = 23,       /* DROP: an ICMP error to rewrite has a wrong checksum */
    SVCDP_REASON_COUNT = 24
};

/* What to tell the sender of a rejected packet. */
enum svcdp_answer {
    SVCDP_ANSWER_DEFAULT = 0,       /* TCP reset, else port unreachable */
    SVCDP_ANSWER_UNREACHABLE = 1,   /* port unreachable, for TCP too */
    SVCDP_ANSWER_TIME_EXCEEDED = 2,
    SVCDP_ANSWER_TOO_BIG = 3        /* fragmentation needed, packet too big: answer_mtu */
};

/* svcdp_packet.flags */
enum svcdp_packet_flags {
    SVCDP_PACKET_CSUM_PARTIAL = 1, /* in: the transport checksum field holds only the
                                      pseudo header (offload); a rewrite completes it */
    SVCDP_PACKET_CHANGED = 2,      /* out: bytes of the packet were rewritten */
    SVCDP_PACKET_NEXT_HOP = 4      /* out: it goes to the address of its destination, whatever
                                      its own destination address says (dr) */
};

/* One IP packet on its way through the core. 32 bytes; the caller owns all of it. */
struct svcdp_packet {
    uint8_t *data;        /* first byte of the IP header; rewritten in place. Encapsulation
                             moves it down into the headroom */
    uint32_t len;         /* bytes from data on, link-layer padding included */
    uint32_t mark;        /* in: the packet's firewall mark, host order; out: with the
                             destination's mark or'ed into it when it is forwarded there */
    uint16_t headroom;    /* writable bytes before data */
    uint16_t flags;       /* svcdp_packet_flags */
    uint8_t verdict;      /* out: svcdp_verdict */
    uint8_t reason;       /* out: svcdp_reason */
    uint16_t answer;      /* out, REJECT: svcdp_answer */
    uint32_t destination; /* out: the destination's id, 0 when there is none */
    uint32_t answer_mtu;  /* out, SVCDP_ANSWER_TOO_BIG: bytes that do fit */
};

/* No answer to a rejected packet is longer: RFC 4443 2.4(c). */
#define SVCDP_ANSWER_MAX 1280

/* </cffi> */

#ifdef __cplusplus
}
#endif
#endif
