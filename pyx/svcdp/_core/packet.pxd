# A bounds-checked view of one IP packet: where its addresses, ports and transport header are.
# Nothing is copied, and no byte outside [data, data + length) is read.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport likely, unlikely
from svcdp._core.memory cimport htons, load16, ntohs

cdef enum:
    PROTOCOL_HOP_BY_HOP = 0
    PROTOCOL_ICMP = 1
    PROTOCOL_IPIP = 4
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_IPV6 = 41
    PROTOCOL_ROUTING = 43
    PROTOCOL_FRAGMENT = 44
    PROTOCOL_GRE = 47
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
    uint8_t fragment           # the first fragment of a packet: its payload goes on in others
    uint8_t reason             # PARSED, or why not
    uint32_t transport         # offset of the transport (or ICMP) header
    uint32_t end               # offset behind the IP packet; padding may follow
    uint32_t quoted            # offset of the IP header quoted by an ICMP error, else 0
    # Of an ICMP error only:
    uint32_t quoted_transport
    uint32_t tunnel            # offset of a tunnel's outer header, else 0; quoted is what is inside
    # What prefetch_record() found:
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


cdef inline bint unwrap(
    const uint8_t *data, uint32_t *at, uint32_t end, uint8_t *protocol
) noexcept nogil:
    """Move `at` from a tunnel's payload to the packet inside. False: it is no such tunnel.

    `protocol`: what leads to the payload, PROTOCOL_UDP for GUE behind its UDP header; out:
    PROTOCOL_IPIP or PROTOCOL_IPV6, which is what the packet says of itself. GRE has its checksum
    at most (RFC 2784), GUE is version 0 without flags, as `tunnel.pxd` writes them.
    """
    cdef const uint8_t *header = data + at[0]
    cdef uint32_t room = end - at[0]
    cdef uint16_t kind
    if protocol[0] == PROTOCOL_GRE:
        if room < 8 or load16(header) & htons(0x7fff):
            return False
        kind = ntohs(load16(header + 2))
        if kind != 0x0800 and kind != 0x86dd:
            return False
        protocol[0] = PROTOCOL_IPIP if kind == 0x0800 else PROTOCOL_IPV6
        at[0] += 8 if header[0] else 4
    elif protocol[0] == PROTOCOL_UDP:
        if room < 4 or header[0] or load16(header + 2):
            return False
        protocol[0] = header[1]
        at[0] += 4
    if at[0] >= end:
        return False
    if protocol[0] == PROTOCOL_IPIP:
        return data[at[0]] >> 4 == 4
    return protocol[0] == PROTOCOL_IPV6 and data[at[0]] >> 4 == 6


cdef inline uint8_t look_up_quoted(
    const uint8_t *data, uint32_t at, const View *inner, View *view
) noexcept nogil:
    """Make the quoted packet at `at`, whose headers `inner` has, what the view looks up."""
    if inner.protocol not in (PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP):
        return SVCDP_REASON_PROTOCOL
    if inner.end - inner.transport < 4:
        return SVCDP_REASON_TRUNCATED
    view.words = inner.words
    view.protocol = inner.protocol
    view.quoted = at
    view.quoted_transport = inner.transport
    view.source = inner.destination
    view.destination = inner.source
    view.source_port = load16(data + inner.transport + 2)
    view.destination_port = load16(data + inner.transport)
    return PARSED


cdef inline uint8_t look_into_tunnel(
    const uint8_t *data, uint32_t payload, uint8_t protocol, View *view
) noexcept nogil:
    """Look through a tunnel that an ICMP error quotes at the packet inside: the view is of that
    one then. Unless PARSED is the answer, the view is as it was.
    """
    cdef View inner
    cdef uint8_t reason
    if not unwrap(data, &payload, view.end, &protocol):
        return SVCDP_REASON_PROTOCOL
    reason = parse_ip(data, payload, view.end, True, &inner)
    if reason == PARSED:
        reason = look_up_quoted(data, payload, &inner, view)
    if reason == PARSED:
        view.tunnel = view.transport + 8
    return reason


cdef inline uint8_t look_into_gue(const uint8_t *data, View *view) noexcept nogil:
    """An ICMP error about a UDP packet that nobody knows may be about a tunnel of ours."""
    if view.protocol != PROTOCOL_UDP or view.tunnel:
        return SVCDP_REASON_PROTOCOL
    if view.end - view.quoted_transport < 8:
        return SVCDP_REASON_TRUNCATED
    return look_into_tunnel(data, view.quoted_transport + 8, PROTOCOL_UDP, view)


cdef inline bint is_ping(const uint8_t *data, const View *view) noexcept nogil:
    """Whether an ICMP message of the view's family is an echo request, which may be answered by an
    error.
    """
    if view.end - view.transport < 8:
        return False
    if view.words == 1:
        return view.protocol == PROTOCOL_ICMP and data[view.transport] == 8
    return view.protocol == PROTOCOL_ICMP6 and data[view.transport] == 128


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
    view.tunnel = 0
    if inner.protocol in (PROTOCOL_IPIP, PROTOCOL_IPV6, PROTOCOL_GRE):
        return look_into_tunnel(data, inner.transport, inner.protocol, view)
    return look_up_quoted(data, view.transport + 8, &inner, view)


cdef inline uint8_t parse(const uint8_t *data, uint32_t length, View *view) noexcept nogil:
    """Fill `view`, all but its hash and what is expected. PARSED, or the reason why the packet
    passes.
    """
    cdef uint32_t size
    cdef const uint8_t *transport
    cdef uint8_t reason = parse_ip(data, 0, length, False, view)
    view.quoted = 0
    view.tcp_flags = 0
    view.fragment = 0
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
