# Answers to rejected packets: a TCP reset, or an ICMP error.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from svcdp._core.abi cimport *
from svcdp._core.checksum cimport plain_checksum, transport_checksum
from svcdp._core.memory cimport htonl, htons, load32, ntohl, store16, store32
from svcdp._core.packet cimport *
from svcdp._core.xmit cimport destination_offset, source_offset

cdef enum:
    ANSWER_HOPS = 64
    ANSWER_BURST = 50          # answers that may come at once
    QUOTE_V4 = 576             # RFC 1812, 4.3.2.3: bytes of the whole answer
    QUOTE_V6 = 1280            # RFC 4443, 2.4 (c)

    UNREACHABLE = 3            # ICMP types and codes: RFC 792, RFC 1191
    UNREACHABLE_HOST = 1
    UNREACHABLE_PORT = 3
    UNREACHABLE_TOO_BIG = 4
    TIME_EXCEEDED = 11
    UNREACHABLE6 = 1           # ICMPv6: RFC 4443
    UNREACHABLE6_ADDRESS = 3
    UNREACHABLE6_PORT = 4
    TOO_BIG6 = 2
    TIME_EXCEEDED6 = 3


cdef inline bint may_answer(const View *view) noexcept nogil:
    """Not to packets that were not from one host to one host (RFC 1122, 3.2.2; RFC 4443, 2.4)."""
    cdef const uint8_t *source = view.source
    cdef const uint8_t *target = view.destination
    if view.tcp_flags & TCP_RST:
        return False
    if view.words == 1:
        return 0 < source[0] < 224 and target[0] < 224
    return (
        source[0] != 0xff and target[0] != 0xff
        and (load32(source) | load32(source + 4) | load32(source + 8) | load32(source + 12)) != 0
    )


cdef inline bint answer_in_time(int64_t *due, uint32_t rate, int64_t now) noexcept nogil:
    """Whether one more answer keeps within `rate` a second (0: no bound) and ANSWER_BURST at
    once: RFC 4443, 2.4 (f). `due`: what the caller keeps, 0 at first; `now`: ns.

    The bucket's fill is when it will be full again (GCRA, ITU-T I.371).
    """
    cdef int64_t cost, wait
    if rate == 0:
        return True
    cost = 1000000000 // rate
    wait = due[0] - now
    # Longer than it ever gets: the caller's clock went back.
    if wait < 0 or wait > ANSWER_BURST * cost:
        wait = 0
    if wait > (ANSWER_BURST - 1) * cost:
        return False
    due[0] = now + wait + cost
    return True


cdef inline void write_header(
    uint8_t *out, const View *view, uint8_t protocol, uint8_t tos, uint32_t length
) noexcept nogil:
    """The IP header of an answer of `length` bytes from the view's destination to its source."""
    memset(out, 0, 20 if view.words == 1 else 40)
    memcpy(out + source_offset(view.words), view.destination, 4 * view.words)
    memcpy(out + destination_offset(view.words), view.source, 4 * view.words)
    if view.words == 1:
        out[0] = 0x45
        out[1] = tos
        store16(out + 2, htons(<uint16_t>length))
        store16(out + 6, htons(0x4000))    # don't fragment, so the id may be 0 (RFC 6864)
        out[8] = ANSWER_HOPS
        out[9] = protocol
        store16(out + 10, plain_checksum(out, 20))
    else:
        out[0] = 0x60
        store16(out + 4, htons(<uint16_t>(length - 40)))
        out[6] = protocol
        out[7] = ANSWER_HOPS


cdef inline uint32_t answer_reset(
    const uint8_t *data, const View *view, uint8_t *out
) noexcept nogil:
    """RFC 9293, 3.10.7.1."""
    cdef uint32_t header = 20 if view.words == 1 else 40
    cdef const uint8_t *tcp = data + view.transport
    cdef uint8_t *reset = out + header
    cdef uint32_t length = view.end - view.transport - (tcp[12] >> 4) * 4
    write_header(out, view, PROTOCOL_TCP, 0, header + 20)
    memset(reset, 0, 20)
    store16(reset, load16(tcp + 2))
    store16(reset + 2, load16(tcp))
    reset[12] = 0x50
    if view.tcp_flags & TCP_ACK:
        store32(reset + 4, load32(tcp + 8))
        reset[13] = TCP_RST
    else:
        length += (1 if view.tcp_flags & TCP_SYN else 0) + (1 if view.tcp_flags & TCP_FIN else 0)
        store32(reset + 8, htonl(ntohl(load32(tcp + 4)) + length))
        reset[13] = TCP_RST | TCP_ACK
    store16(reset + 16, transport_checksum(
        out + source_offset(view.words), out + destination_offset(view.words), view.words,
        PROTOCOL_TCP, reset, 20))
    return header + 20


cdef inline uint32_t error_header(uint32_t words) noexcept nogil:
    """Bytes before the quoted packet in an ICMP error."""
    return 28 if words == 1 else 48


cdef inline uint32_t finish_error(
    uint8_t *out, const View *view, uint8_t icmp_type, uint8_t code, uint32_t info, uint32_t quote
) noexcept nogil:
    """Write the headers of an ICMP error about the view's packet, of which the first `quote`
    bytes are in their place behind them. `info` is the second word of the ICMP header. Its length.
    """
    cdef uint32_t header = 20 if view.words == 1 else 40
    cdef uint8_t *icmp = out + header
    write_header(
        out, view, PROTOCOL_ICMP if view.words == 1 else PROTOCOL_ICMP6,
        # RFC 1812, 4.3.2.5: the packet's type of service, with precedence 6 (as in Linux).
        (icmp[9] & 0x1e) | 0xc0, header + 8 + quote)
    icmp[0] = icmp_type
    icmp[1] = code
    store16(icmp + 2, 0)
    store32(icmp + 4, htonl(info))
    if view.words == 1:
        store16(icmp + 2, plain_checksum(icmp, 8 + quote))
    else:
        store16(icmp + 2, transport_checksum(
            out + 8, out + 24, 4, PROTOCOL_ICMP6, icmp, 8 + quote))
    return header + 8 + quote


cdef inline uint32_t answer_error(
    const svcdp_packet *packet, const View *view, uint8_t *out, uint32_t capacity
) noexcept nogil:
    """An ICMP error, with as much of the packet as fits."""
    cdef uint32_t start = error_header(view.words)
    cdef uint32_t limit = min(<uint32_t>(QUOTE_V4 if view.words == 1 else QUOTE_V6), capacity)
    cdef uint32_t quote = min(view.end, limit - start)
    cdef uint8_t icmp_type, code
    cdef uint32_t info = 0
    if packet.answer == SVCDP_ANSWER_TIME_EXCEEDED:
        icmp_type = TIME_EXCEEDED if view.words == 1 else TIME_EXCEEDED6
        code = 0
    elif packet.answer == SVCDP_ANSWER_TOO_BIG:
        icmp_type = UNREACHABLE if view.words == 1 else TOO_BIG6
        code = UNREACHABLE_TOO_BIG if view.words == 1 else 0
        info = packet.answer_mtu
    else:
        icmp_type = UNREACHABLE if view.words == 1 else UNREACHABLE6
        code = UNREACHABLE_PORT if view.words == 1 else UNREACHABLE6_PORT
    memcpy(out + start, packet.data, quote)
    return finish_error(out, view, icmp_type, code, info, quote)


cdef inline uint32_t answer(
    const svcdp_packet *packet, uint8_t *out, uint32_t capacity
) noexcept nogil:
    """Build the answer to a rejected packet: what packet.answer says. Its length; 0 when it must
    not be answered.
    """
    cdef View view
    cdef const uint8_t *transport
    cdef uint32_t size
    # As if quoted: the first fragment of a packet may be answered, later ones may not.
    if capacity < 128 or parse_ip(packet.data, 0, packet.len, True, &view) != PARSED:
        return 0
    transport = packet.data + view.transport
    size = view.end - view.transport
    view.tcp_flags = 0
    if view.protocol == PROTOCOL_TCP:
        if size < 20 or transport[12] < 0x50 or <uint32_t>(transport[12] >> 4) * 4 > size:
            return 0
        view.tcp_flags = transport[13]
    elif view.protocol == PROTOCOL_ICMP or view.protocol == PROTOCOL_ICMP6:
        if not is_ping(packet.data, &view):
            return 0
    if not may_answer(&view):
        return 0
    if view.protocol == PROTOCOL_TCP and packet.answer == SVCDP_ANSWER_DEFAULT:
        return answer_reset(packet.data, &view, out)
    return answer_error(packet, &view, out, capacity)
