# Rewriting packets: NAT in both directions, and ICMP errors about packets that were rewritten.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport unlikely
from svcdp._core.checksum cimport *
from svcdp._core.conn cimport *
from svcdp._core.memory cimport copy_address, htonl, htons, load16, ntohs, store16, store32
from svcdp._core.packet cimport *


cdef inline uint32_t source_offset(uint32_t words) noexcept nogil:
    return 12 if words == 1 else 8


cdef inline uint32_t destination_offset(uint32_t words) noexcept nogil:
    return 16 if words == 1 else 24


cdef inline void store_little32(uint8_t *to, uint32_t value) noexcept nogil:
    to[0] = value & 255
    to[1] = (value >> 8) & 255
    to[2] = (value >> 16) & 255
    to[3] = value >> 24


cdef inline void complete_checksum(uint8_t *data, const View *view) noexcept nogil:
    """Write the full transport checksum."""
    cdef uint8_t *transport = data + view.transport
    cdef uint32_t size = view.end - view.transport
    cdef uint32_t field = 16
    cdef uint16_t checksum
    if view.protocol == PROTOCOL_SCTP:
        store32(transport + 8, 0)
        # RFC 9260: the CRC goes out least significant byte first.
        store_little32(transport + 8, ~crc32c(transport, size, 0xffffffff))
        return
    if view.protocol == PROTOCOL_UDP:
        field = 6
        # Read again, so bounded again: the caller's buffer may have changed meanwhile.
        size = min(size, <uint32_t>ntohs(load16(transport + 4)))
    store16(transport + field, 0)
    checksum = transport_checksum(
        data + source_offset(view.words), data + destination_offset(view.words), view.words,
        view.protocol, transport, size)
    if checksum == 0 and view.protocol == PROTOCOL_UDP:
        checksum = 0xffff
    store16(transport + field, checksum)


cdef inline void update_checksum(
    svcdp_packet *packet, const View *view, uint16_t delta, bint ports_changed
) noexcept nogil:
    """After addresses and ports were rewritten, which changed the sum by `delta`."""
    cdef uint8_t *transport = packet.data + view.transport
    cdef uint16_t checksum
    if unlikely(packet.flags & SVCDP_PACKET_CSUM_PARTIAL):
        complete_checksum(packet.data, view)
        packet.flags &= <uint16_t>~SVCDP_PACKET_CSUM_PARTIAL
    elif view.protocol == PROTOCOL_TCP:
        store16(transport + 16, apply_delta(load16(transport + 16), delta))
    elif view.protocol == PROTOCOL_UDP:
        checksum = load16(transport + 6)
        if unlikely(checksum == 0):
            # "Not computed" gets one, as in IPVS: the rewrite is then covered too. It is over the
            # whole packet, which a fragment is not.
            if not view.fragment:
                complete_checksum(packet.data, view)
        else:
            checksum = apply_delta(checksum, delta)
            store16(transport + 6, checksum if checksum else 0xffff)
    elif ports_changed:
        # SCTP's CRC does not cover addresses.
        complete_checksum(packet.data, view)


cdef inline void translate(
    svcdp_packet *packet, const View *view, Conn *conn, uint32_t words, uint32_t direction
) noexcept nogil:
    """NAT of one packet of a connection, checksums included. `words` is the view's."""
    cdef uint8_t *data = packet.data
    cdef uint8_t *transport = data + view.transport
    cdef uint16_t ip_delta = conn.ip_delta
    cdef uint16_t transport_delta = conn.transport_delta
    cdef bint ports_changed = (
        conn.real_port != conn.virtual_port or conn.source_port != conn.client_port)
    if direction == FROM_CLIENT:
        copy_address(data + destination_offset(words), address_of(conn, REAL, words), words)
        store16(transport + 2, conn.real_port)
        if conn.flags & CONN_MASQUERADE:
            copy_address(data + source_offset(words), address_of(conn, SOURCE, words), words)
            store16(transport, conn.source_port)
    else:
        ip_delta = ~ip_delta
        transport_delta = ~transport_delta
        copy_address(data + source_offset(words), address_of(conn, VIRTUAL, words), words)
        store16(transport, conn.virtual_port)
        if conn.flags & CONN_MASQUERADE:
            copy_address(data + destination_offset(words), address_of(conn, CLIENT, words), words)
            store16(transport + 2, conn.client_port)
    if words == 1:
        store16(data + 10, apply_delta(load16(data + 10), ip_delta))
    update_checksum(packet, view, transport_delta, ports_changed)
    packet.flags |= SVCDP_PACKET_CHANGED


cdef inline uint64_t address_change(
    Conn *conn, uint32_t old, uint32_t new, uint32_t words
) noexcept nogil:
    """What replacing one of the connection's addresses by another adds to a sum."""
    # Constant arguments: the compiler makes one way of each family.
    if words == 1:
        return change_address(address_of(conn, old, 1), address_of(conn, new, 1), 1)
    return change_address(address_of(conn, old, 4), address_of(conn, new, 4), 4)


cdef inline void compute_deltas(Conn *conn, uint32_t words) noexcept nogil:
    """What rewriting a packet of the client does to its checksums."""
    cdef uint64_t sum = address_change(conn, VIRTUAL, REAL, words)
    if conn.flags & CONN_MASQUERADE:
        sum += address_change(conn, CLIENT, SOURCE, words)
    conn.ip_delta = fold(sum)
    sum += change_word(conn.virtual_port, conn.real_port)
    sum += change_word(conn.client_port, conn.source_port)
    conn.transport_delta = fold(sum)


cdef inline uint16_t set_address(
    uint8_t *at, const uint8_t *address, uint32_t words, uint16_t delta
) noexcept nogil:
    """Write an address; `delta` with this change added."""
    delta = delta_address(delta, at, address, words)
    copy_address(at, address, words)
    return delta


cdef inline uint16_t set_word(uint8_t *at, uint16_t value, uint16_t delta) noexcept nogil:
    delta = delta_add(delta, load16(at), value)
    store16(at, value)
    return delta


cdef inline bint is_error_intact(const uint8_t *data, const View *view) noexcept nogil:
    """Whether the ICMP checksum of the view's error is right."""
    cdef uint32_t length = view.end - view.transport
    cdef uint64_t sum = 0
    if data[0] >> 4 == 6:
        sum = sum_bytes(data + 8, 32, <uint64_t>htonl(length) + htons(PROTOCOL_ICMP6))
    return fold(sum_bytes(data + view.transport, length, sum)) == 0xffff


cdef inline uint8_t translate_error(
    svcdp_packet *packet, const View *view, Conn *conn, uint32_t direction
) noexcept nogil:
    """NAT of an ICMP error that travels in `direction` and quotes a packet of the other one:
    PARSED, or CHECKSUM and untouched.

    The error's source becomes the virtual address whoever sent it, and the quoted packet becomes
    what the receiver of the error once sent, all but its transport checksum (ip_vs_core.c,
    ip_vs_nat_icmp).
    """
    cdef uint32_t words = view.words
    cdef uint8_t *data = packet.data
    cdef uint8_t *source = data + source_offset(words)
    cdef uint8_t *target = data + destination_offset(words)
    cdef uint8_t *quoted = data + view.quoted
    cdef uint8_t *quoted_source = quoted + source_offset(words)
    cdef uint8_t *quoted_target = quoted + destination_offset(words)
    cdef uint8_t *ports = data + view.quoted_transport
    cdef uint8_t *checksum = data + view.transport + 2
    cdef bint masquerade = conn.flags & CONN_MASQUERADE
    cdef uint16_t outer = 0, inner = 0, header
    if not is_error_intact(data, view):
        return SVCDP_REASON_CHECKSUM
    if direction == FROM_DESTINATION:
        outer = set_address(source, address_of(conn, VIRTUAL, words), words, outer)
        inner = set_address(quoted_target, address_of(conn, VIRTUAL, words), words, inner)
        if masquerade:
            outer = set_address(target, address_of(conn, CLIENT, words), words, outer)
            inner = set_address(quoted_source, address_of(conn, CLIENT, words), words, inner)
    else:
        outer = set_address(target, address_of(conn, REAL, words), words, outer)
        inner = set_address(quoted_source, address_of(conn, REAL, words), words, inner)
        if masquerade:
            outer = set_address(source, address_of(conn, SOURCE, words), words, outer)
            inner = set_address(quoted_target, address_of(conn, SOURCE, words), words, inner)
    if words == 1:
        store16(data + 10, apply_delta(load16(data + 10), outer))
        outer = 0              # ICMPv4 has no pseudo header
        header = apply_delta(load16(quoted + 10), inner)
        inner = set_word(quoted + 10, header, inner)
    if direction == FROM_DESTINATION:
        inner = set_word(ports, conn.client_port, inner)
        inner = set_word(ports + 2, conn.virtual_port, inner)
    else:
        inner = set_word(ports, conn.real_port, inner)
        inner = set_word(ports + 2, conn.source_port, inner)
    store16(checksum, apply_delta(load16(checksum), fold(<uint64_t>outer + inner)))
    packet.flags |= SVCDP_PACKET_CHANGED
    return PARSED
