# The other end of a tunnel: the packet inside, of IP in IP, GRE and GUE as `tunnel.pxd` and IPVS
# write them.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.checksum cimport *
from svcdp._core.memory cimport htonl, htons, load16, ntohs, store16
from svcdp._core.packet cimport *
from svcdp._core.xmit cimport destination_offset, source_offset

cdef enum:
    NOT_ECT = 0
    ECT0 = 2
    CE = 3

# Where the packet inside lies, and the ECN that it leaves the tunnel with.
cdef struct Inside:
    uint32_t start
    uint32_t end
    uint8_t ecn


cdef inline uint8_t traffic_class_of(const uint8_t *ip) noexcept nogil:
    return ip[1] if ip[0] >> 4 == 4 else <uint8_t>(ip[0] << 4 | ip[1] >> 4)


cdef inline bint merge_ecn(uint8_t outer, uint8_t inner, uint8_t *merged) noexcept nogil:
    """RFC 6040, 4.2: congestion seen in the tunnel, told to who understands. False: drop."""
    merged[0] = inner
    if outer == CE:
        merged[0] = CE
        return inner != NOT_ECT
    if inner == ECT0 and outer != NOT_ECT:
        merged[0] = outer
    return True


cdef inline bint parse_offloaded(const uint8_t *ip, uint32_t length, View *view) noexcept nogil:
    """Whether it is a TCP segment with no more than the pseudo header in its checksum: what the
    kernel's receive offload makes of several (net/ipv4/tcp_offload.c).
    """
    cdef uint64_t sum
    if parse(ip, length, view) != PARSED or view.protocol != PROTOCOL_TCP or view.quoted:
        return False
    sum = sum_bytes(ip + source_offset(view.words), 8 * view.words, 0)
    sum += <uint64_t>htonl(view.end - view.transport) + htons(PROTOCOL_TCP)
    return fold(sum) == load16(ip + view.transport + 16)


cdef inline bint find_inside(
    const uint8_t *data, uint32_t at, uint32_t end, uint8_t protocol, uint8_t traffic_class,
    Inside *inside
) noexcept nogil:
    """Find the packet in a tunnel's payload from `at` to `end`. `protocol` leads to the payload,
    PROTOCOL_UDP to GUE; `traffic_class` is the outer header's. False: there is none, or it is
    damaged.
    """
    cdef uint32_t room, header
    cdef const uint8_t *ip
    cdef View view
    cdef uint8_t kind = protocol
    inside.start = at
    if not unwrap(data, &inside.start, end, &kind):
        return False
    ip = data + inside.start
    room = end - inside.start
    if kind == PROTOCOL_IPIP:
        header = (ip[0] & 15) * 4
        if room < 20 or header < 20 or header > room or plain_checksum(ip, header):
            return False
        inside.end = inside.start + ntohs(load16(ip + 2))
        if inside.end < inside.start + header:
            return False
    else:
        if room < 40:
            return False
        inside.end = inside.start + 40 + ntohs(load16(ip + 4))
    if inside.end > end:
        return False
    if protocol == PROTOCOL_GRE and data[at] and plain_checksum(data + at, end - at):
        # The offload has checked it, and joined packets without a new one (net/ipv4/gre_offload.c).
        if not parse_offloaded(ip, inside.end - inside.start, &view):
            return False
    return merge_ecn(traffic_class & 3, traffic_class_of(ip) & 3, &inside.ecn)


cdef inline bint find_tunnelled(
    const uint8_t *data, uint32_t length, uint16_t port, Inside *inside
) noexcept nogil:
    """As find_inside(), of a whole packet. `port`: of GUE, wire order."""
    cdef View outer
    cdef uint32_t at
    if parse_ip(data, 0, length, False, &outer) != PARSED:
        return False
    if outer.words == 1 and plain_checksum(data, outer.transport):
        return False
    at = outer.transport
    if outer.protocol == PROTOCOL_UDP:
        if outer.end - at < 8 or load16(data + at + 2) != port:
            return False
        if not 8 <= ntohs(load16(data + at + 4)) <= outer.end - at:
            return False
        outer.end = at + ntohs(load16(data + at + 4))
        if load16(data + at + 6) and transport_checksum(
            data + source_offset(outer.words), data + destination_offset(outer.words),
            outer.words, PROTOCOL_UDP, data + at, outer.end - at
        ):
            return False
        at += 8
    return find_inside(data, at, outer.end, outer.protocol, traffic_class_of(data), inside)


cdef inline void set_ecn(uint8_t *ip, uint8_t ecn) noexcept nogil:
    cdef uint16_t old = load16(ip)
    if ip[0] >> 4 == 6:
        ip[1] = (ip[1] & 0xcf) | <uint8_t>(ecn << 4)
        return
    ip[1] = (ip[1] & 0xfc) | ecn
    store16(ip + 10, apply_delta(load16(ip + 10), delta_add(0, old, load16(ip))))
