# A bounds-checked view of one IP packet: where its addresses, ports and transport header are.
# Nothing is copied, and no byte outside [data, data + length) is read.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport likely, unlikely
from svcdp._core.memory cimport load16, ntohs

cdef enum:
    PROTOCOL_HOP_BY_HOP = 0
    PROTOCOL_ICMP = 1
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_ROUTING = 43
    PROTOCOL_FRAGMENT = 44
    PROTOCOL_ICMP6 = 58
    PROTOCOL_DESTINATION_OPTIONS = 60
    PROTOCOL_SCTP = 132

    TCP_FIN = 1
    TCP_SYN = 2
    TCP_RST = 4
    TCP_ACK = 16
    TCP_STATE = 23             # the flags that a state machine looks at: all of the above

    # RFC 8200 orders each extension header at most once (destination options twice).
    EXTENSION_HEADERS_MAX = 8

    PARSED = 255  # not a Reason: the packet can be looked up

cdef struct View:
    uint64_t hash
    # The 5-tuple to look up, in wire order. Of an ICMP error about a packet A -> B it is B -> A:
    # the error travels as a reply to the packet that it quotes.
    const uint8_t *source
    const uint8_t *destination
    uint16_t source_port
    uint16_t destination_port
    uint8_t words              # 32-bit words an address
    uint8_t protocol
    uint8_t tcp_flags
    uint8_t reason             # PARSED, or why not
    uint32_t transport         # offset of the transport (or ICMP) header
    uint32_t end               # offset behind the IP packet; padding may follow
    uint32_t quoted            # offset of the IP header quoted by an ICMP error, else 0
    uint32_t quoted_transport
    void *expected             # the record that most likely has the flow's connection, or NULL
    uint32_t expected_direction


cdef inline uint8_t parse_ip(
    const uint8_t *data, uint32_t start, uint32_t length, bint quoted, View *view
) noexcept nogil:
    """Parse the IP header at `start`, IPv6 extension headers included (RFC 791, RFC 8200).

    Fills addresses, words, protocol, transport and end. A quoted packet may be cut short.
    """
    cdef const uint8_t *ip = data + start
    cdef uint32_t room = length - start
    cdef uint32_t offset, total, header, _
    cdef uint16_t fragment
    cdef uint8_t protocol
    if unlikely(room < 20):
        return SVCDP_REASON_TRUNCATED if room and (ip[0] >> 4 == 4 or ip[0] >> 4 == 6) \
            else SVCDP_REASON_NOT_IP
    if ip[0] >> 4 == 4:
        header = (ip[0] & 15) * 4
        total = ntohs(load16(ip + 2))
        if unlikely(header < 20 or total < header):
            return SVCDP_REASON_MALFORMED
        if unlikely(header > room or (total > room and not quoted)):
            return SVCDP_REASON_TRUNCATED
        fragment = ntohs(load16(ip + 6))
        # A quoted first fragment still has its ports; later ones have none.
        if unlikely(fragment & 0x1fff or (fragment & 0x2000 and not quoted)):
            return SVCDP_REASON_FRAGMENT
        view.words = 1
        view.source = ip + 12
        view.destination = ip + 16
        view.protocol = ip[9]
        view.transport = start + header
        view.end = start + (total if total < room else room)
        return PARSED
    if ip[0] >> 4 != 6:
        return SVCDP_REASON_NOT_IP
    if room < 40:
        return SVCDP_REASON_TRUNCATED
    total = 40 + <uint32_t>ntohs(load16(ip + 4))
    if total > room:
        if not quoted:
            return SVCDP_REASON_TRUNCATED
        total = room
    view.words = 4
    view.source = ip + 8
    view.destination = ip + 24
    view.end = start + total
    protocol = ip[6]
    offset = 40
    for _ in range(EXTENSION_HEADERS_MAX + 1):
        if protocol == PROTOCOL_FRAGMENT:
            if offset + 8 > total:
                return SVCDP_REASON_TRUNCATED
            fragment = ntohs(load16(ip + offset + 2))
            # Offset 0 and no more fragments: an atomic fragment is whole (RFC 6946).
            if fragment & 0xfff8 or (fragment & 1 and not quoted):
                return SVCDP_REASON_FRAGMENT
            header = 8
        elif (
            protocol == PROTOCOL_HOP_BY_HOP
            or protocol == PROTOCOL_ROUTING
            or protocol == PROTOCOL_DESTINATION_OPTIONS
        ):
            if offset + 8 > total:
                return SVCDP_REASON_TRUNCATED
            header = 8 + <uint32_t>ip[offset + 1] * 8
            # Segments left: the packet has other destinations to see before its final one, and
            # its checksum is over that one (RFC 8200, 8.1).
            if protocol == PROTOCOL_ROUTING and ip[offset + 3]:
                return SVCDP_REASON_PROTOCOL
        else:
            view.protocol = protocol
            view.transport = start + offset
            return PARSED
        protocol = ip[offset]
        offset += header
        if offset > total:
            return SVCDP_REASON_TRUNCATED
    return SVCDP_REASON_MALFORMED


cdef inline uint8_t parse_icmp_error(
    const uint8_t *data, uint32_t length, View *view
) noexcept nogil:
    """Look through an ICMP error at the packet it quotes: RFC 792, RFC 4443."""
    cdef View inner
    cdef uint8_t reason
    cdef uint8_t icmp_type
    if view.end - view.transport < 8:
        return SVCDP_REASON_TRUNCATED
    icmp_type = data[view.transport]
    if view.words == 1:
        if view.protocol != PROTOCOL_ICMP or icmp_type not in (3, 4, 11, 12):
            return SVCDP_REASON_PROTOCOL
    elif view.protocol != PROTOCOL_ICMP6 or icmp_type not in (1, 2, 3, 4):
        return SVCDP_REASON_PROTOCOL
    reason = parse_ip(data, view.transport + 8, view.end, True, &inner)
    if reason != PARSED:
        return reason
    if inner.words != view.words:
        return SVCDP_REASON_MALFORMED
    if inner.protocol not in (PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP):
        return SVCDP_REASON_PROTOCOL
    if inner.end - inner.transport < 4:
        return SVCDP_REASON_TRUNCATED
    view.protocol = inner.protocol
    view.quoted = view.transport + 8
    view.quoted_transport = inner.transport
    view.source = inner.destination
    view.destination = inner.source
    view.source_port = load16(data + inner.transport + 2)
    view.destination_port = load16(data + inner.transport)
    return PARSED


cdef inline uint8_t parse(const uint8_t *data, uint32_t length, View *view) noexcept nogil:
    """Fill `view`, all but its hash and probe. PARSED, or the reason why the packet passes."""
    cdef uint32_t size
    cdef const uint8_t *transport
    cdef uint8_t reason = parse_ip(data, 0, length, False, view)
    view.quoted = 0
    view.tcp_flags = 0
    if unlikely(reason != PARSED):
        return reason
    transport = data + view.transport
    size = view.end - view.transport
    if view.protocol == PROTOCOL_TCP:
        if size < 20:
            return SVCDP_REASON_TRUNCATED
        if transport[12] < 0x50:
            return SVCDP_REASON_MALFORMED
        if <uint32_t>(transport[12] >> 4) * 4 > size:
            return SVCDP_REASON_TRUNCATED
        view.tcp_flags = transport[13]
    elif view.protocol == PROTOCOL_UDP:
        if size < 8:
            return SVCDP_REASON_TRUNCATED
        if ntohs(load16(transport + 4)) < 8:
            return SVCDP_REASON_MALFORMED
        if ntohs(load16(transport + 4)) > size:
            return SVCDP_REASON_TRUNCATED
    elif view.protocol == PROTOCOL_SCTP:
        if size < 12:
            return SVCDP_REASON_TRUNCATED
    elif view.protocol == PROTOCOL_ICMP or view.protocol == PROTOCOL_ICMP6:
        return parse_icmp_error(data, length, view)
    else:
        return SVCDP_REASON_PROTOCOL
    view.source_port = load16(transport)
    view.destination_port = load16(transport + 2)
    return PARSED
