# Answers to rejected packets: a TCP reset, or ICMP port unreachable.
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from svcdp._core.abi cimport *
from svcdp._core.checksum cimport plain_checksum, transport_checksum
from svcdp._core.memory cimport htonl, htons, load32, ntohl, store16, store32
from svcdp._core.packet cimport *
from svcdp._core.xmit cimport destination_offset, source_offset

cdef enum:
    ANSWER_HOPS = 64
    QUOTE_V4 = 576             # RFC 1812, 4.3.2.3: bytes of the whole answer
    QUOTE_V6 = 1280            # RFC 4443, 2.4 (c)


cdef inline bint may_answer(const View *view) noexcept nogil:
    """Not to packets that were not from one host to one host (RFC 1122, 3.2.2; RFC 4443, 2.4)."""
    cdef const uint8_t *source = view.source
    cdef const uint8_t *target = view.destination
    if view.quoted or view.tcp_flags & TCP_RST:
        return False
    if view.words == 1:
        return 0 < source[0] < 224 and target[0] < 224
    return (
        source[0] != 0xff and target[0] != 0xff
        and (load32(source) | load32(source + 4) | load32(source + 8) | load32(source + 12)) != 0
    )


cdef inline void write_header(
    uint8_t *out, const View *view, uint8_t protocol, uint32_t length
) noexcept nogil:
    """The IP header of an answer of `length` bytes from the view's destination to its source."""
    memset(out, 0, 20 if view.words == 1 else 40)
    memcpy(out + source_offset(view.words), view.destination, 4 * view.words)
    memcpy(out + destination_offset(view.words), view.source, 4 * view.words)
    if view.words == 1:
        out[0] = 0x45
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
    write_header(out, view, PROTOCOL_TCP, header + 20)
    memset(reset, 0, 20)
    store16(reset, view.destination_port)
    store16(reset + 2, view.source_port)
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


cdef inline uint32_t answer_unreachable(
    const uint8_t *data, const View *view, uint8_t *out, uint32_t capacity
) noexcept nogil:
    """Port unreachable, with as much of the packet as fits."""
    cdef uint32_t header = 20 if view.words == 1 else 40
    cdef uint32_t limit = QUOTE_V4 if view.words == 1 else QUOTE_V6
    cdef uint32_t quote = view.end
    cdef uint8_t *icmp = out + header
    if limit > capacity:
        limit = capacity
    if quote > limit - header - 8:
        quote = limit - header - 8
    write_header(
        out, view, PROTOCOL_ICMP if view.words == 1 else PROTOCOL_ICMP6, header + 8 + quote)
    memset(icmp, 0, 8)
    memcpy(icmp + 8, data, quote)
    if view.words == 1:
        icmp[0] = 3
        icmp[1] = 3
        store16(icmp + 2, plain_checksum(icmp, 8 + quote))
    else:
        icmp[0] = 1
        icmp[1] = 4
        store16(icmp + 2, transport_checksum(
            out + 8, out + 24, 4, PROTOCOL_ICMP6, icmp, 8 + quote))
    return header + 8 + quote


cdef inline uint32_t answer(
    const uint8_t *data, uint32_t length, uint8_t *out, uint32_t capacity
) noexcept nogil:
    """Build the answer to a rejected packet. Its length; 0 when it must not be answered."""
    cdef View view
    if capacity < 128 or parse(data, length, &view) != PARSED or not may_answer(&view):
        return 0
    if view.protocol == PROTOCOL_TCP:
        return answer_reset(data, &view, out)
    return answer_unreachable(data, &view, out, capacity)
