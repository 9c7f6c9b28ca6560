# Packets that arrive in fragments. Only the first fragment has ports: it goes through the core as
# a whole packet does, and a bounded table remembers where it went, for the others to follow. One
# that overtakes the first is not waited for.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport spin_lock, spin_unlock
from svcdp._core.checksum cimport apply_delta, delta_address
from svcdp._core.hash cimport HashKey, hash_flow
from svcdp._core.memory cimport copy_address, load16, load32, ntohs, same_address, store16
from svcdp._core.packet cimport *
from svcdp._core.xmit cimport destination_offset, source_offset

cdef enum:
    FRAGMENT_BUCKETS = 1024
    FRAGMENT_WAYS = 4
    FRAGMENT_LIFETIME = 30     # seconds, as long as Linux waits for the rest of a packet
    IP_PAYLOAD_MAX = 65535

# A fragment, and the packet it is part of (RFC 791, RFC 8200: source, destination, identification,
# and for IPv4 the protocol). Copied, because the packet is about to be rewritten.
cdef struct Fragment:
    uint8_t source[16]
    uint8_t target[16]
    uint32_t id                # as on the wire
    uint8_t words
    uint8_t protocol           # 0 for IPv6
    uint8_t more               # it is not the last one
    uint32_t offset            # of its payload, bytes

# Where the first fragment went.
cdef struct FragmentRoute:
    uint8_t source[16]         # its addresses then
    uint8_t target[16]
    uint32_t destination       # id
    uint16_t generation        # and its generation
    uint8_t direction
    uint8_t method             # METHOD_MASQ and so on

cdef struct FragmentEntry:
    int64_t deadline           # ns; 0: free
    Fragment fragment
    FragmentRoute route

cdef struct FragmentBucket:
    FragmentEntry entries[FRAGMENT_WAYS]
    uint8_t lock

cdef struct FragmentTable:
    FragmentBucket *buckets


cdef inline uint8_t read_ipv4_fragment(
    const uint8_t *data, uint32_t length, View *view, Fragment *fragment
) noexcept nogil:
    cdef uint32_t header = (data[0] & 15) * 4
    cdef uint32_t total = ntohs(load16(data + 2))
    cdef uint16_t field = ntohs(load16(data + 6))
    if header < 20 or total < header:
        return SVCDP_REASON_MALFORMED
    if total > length:
        return SVCDP_REASON_TRUNCATED
    view.words = 1
    view.source = data + 12
    view.destination = data + 16
    view.protocol = fragment.protocol = data[9]
    view.transport = header
    view.end = total
    fragment.id = load16(data + 4)
    fragment.offset = <uint32_t>(field & 0x1fff) * 8
    fragment.more = field >> 13 & 1
    return PARSED


cdef inline uint8_t read_ipv6_fragment(
    const uint8_t *data, uint32_t length, View *view, Fragment *fragment
) noexcept nogil:
    cdef uint32_t total, _
    cdef uint32_t offset = 40
    cdef uint16_t field
    cdef uint8_t protocol
    if length < 40:
        return SVCDP_REASON_TRUNCATED
    total = 40 + <uint32_t>ntohs(load16(data + 4))
    if total > length:
        return SVCDP_REASON_TRUNCATED
    protocol = data[6]
    for _ in range(EXTENSION_HEADERS_MAX):
        if offset + 8 > total:
            return SVCDP_REASON_TRUNCATED
        if protocol == PROTOCOL_FRAGMENT:
            break
        if (
            protocol != PROTOCOL_HOP_BY_HOP and protocol != PROTOCOL_ROUTING
            and protocol != PROTOCOL_DESTINATION_OPTIONS
        ):
            return SVCDP_REASON_FRAGMENT
        if protocol == PROTOCOL_ROUTING and data[offset + 3]:
            return SVCDP_REASON_PROTOCOL   # see parse_ip
        protocol = data[offset]
        offset += 8 + <uint32_t>data[offset + 1] * 8
    else:
        return SVCDP_REASON_MALFORMED
    view.words = 4
    view.source = data + 8
    view.destination = data + 24
    view.protocol = data[offset]
    view.transport = offset + 8
    view.end = total
    field = ntohs(load16(data + offset + 2))
    fragment.protocol = 0
    fragment.id = load32(data + offset + 4)
    fragment.offset = field & 0xfff8
    fragment.more = field & 1
    return PARSED


cdef inline uint8_t read_first_fragment(
    const uint8_t *data, uint32_t length, View *view
) noexcept nogil:
    """What parse() does with a whole packet. All headers must be here (RFC 7112, RFC 1858): the
    ports are what decides.
    """
    cdef uint32_t size
    cdef const uint8_t *transport
    # "Quoted": more fragments may follow. That all of this one is here was seen before.
    cdef uint8_t reason = parse_ip(data, 0, length, True, view)
    if reason != PARSED:
        return reason
    transport = data + view.transport
    size = view.end - view.transport
    if view.protocol == PROTOCOL_TCP:
        if size < 20 or <uint32_t>(transport[12] >> 4) * 4 > size:
            return SVCDP_REASON_FRAGMENT
        if transport[12] < 0x50:
            return SVCDP_REASON_MALFORMED
        view.tcp_flags = transport[13]
    elif view.protocol == PROTOCOL_UDP:
        # Its length is that of the whole datagram, which ends elsewhere.
        if size < 8:
            return SVCDP_REASON_FRAGMENT
        if ntohs(load16(transport + 4)) < 8:
            return SVCDP_REASON_MALFORMED
    elif view.protocol == PROTOCOL_SCTP:
        if size < 12:
            return SVCDP_REASON_FRAGMENT
    else:
        return SVCDP_REASON_PROTOCOL
    view.source_port = load16(transport)
    view.destination_port = load16(transport + 2)
    view.fragment = True
    return PARSED


cdef inline uint8_t parse_fragment(
    const uint8_t *data, uint32_t length, View *view, Fragment *fragment
) noexcept nogil:
    """Parse what parse() calls a FRAGMENT. PARSED, or the reason why it passes. The view of the
    first one (offset 0) is like a whole packet's; others have no ports.
    """
    cdef uint8_t reason
    cdef uint32_t size
    reason = SVCDP_REASON_NOT_IP
    if length >= 20 and data[0] >> 4 == 4:
        reason = read_ipv4_fragment(data, length, view, fragment)
    elif length >= 20 and data[0] >> 4 == 6:
        reason = read_ipv6_fragment(data, length, view, fragment)
    if reason != PARSED:
        return reason
    if fragment.offset == 0 and not fragment.more:
        # It is whole; an ICMP error that quotes a later fragment.
        return SVCDP_REASON_FRAGMENT
    size = view.end - view.transport
    if size == 0 or (fragment.more and size & 7) or fragment.offset + size > IP_PAYLOAD_MAX:
        return SVCDP_REASON_MALFORMED
    if fragment.offset == 8 and view.protocol == PROTOCOL_TCP:
        # It could replace the flags of the first one: RFC 3128.
        return SVCDP_REASON_FRAGMENT
    view.source_port = view.destination_port = 0
    view.tcp_flags = 0
    view.quoted = 0
    view.fragment = False
    fragment.words = view.words
    copy_address(fragment.source, view.source, view.words)
    copy_address(fragment.target, view.destination, view.words)
    return PARSED if fragment.offset else read_first_fragment(data, length, view)


cdef inline bint is_translatable(
    const svcdp_packet *packet, const View *view, bint ports_change
) noexcept nogil:
    """Whether NAT can mend the checksum of this first fragment without the others: SCTP's covers
    them, and so does one that is still to be computed.
    """
    if packet.flags & SVCDP_PACKET_CSUM_PARTIAL:
        return False
    return view.protocol != PROTOCOL_SCTP or not ports_change


cdef inline bint same_packet(const Fragment *a, const Fragment *b) noexcept nogil:
    return (
        a.id == b.id and a.words == b.words and a.protocol == b.protocol
        and same_address(a.source, b.source, a.words)
        and same_address(a.target, b.target, a.words)
    )


cdef inline FragmentBucket *bucket_of(
    FragmentTable *table, const HashKey *key, const Fragment *fragment
) noexcept nogil:
    cdef uint64_t hash = hash_flow(
        key, fragment.words, fragment.source, fragment.target, <uint16_t>fragment.id,
        <uint16_t>(fragment.id >> 16), fragment.protocol)
    return &table.buckets[hash % FRAGMENT_BUCKETS]


cdef inline void fragment_remember(
    FragmentTable *table, const HashKey *key, const Fragment *fragment,
    const FragmentRoute *route, int64_t now
) noexcept nogil:
    """Others of this first fragment's packet take its route, for FRAGMENT_LIFETIME. When the
    bucket is full the oldest entry goes.
    """
    cdef FragmentBucket *bucket = bucket_of(table, key, fragment)
    cdef FragmentEntry *entry = &bucket.entries[0]
    cdef uint32_t i
    spin_lock(&bucket.lock)
    for i in range(FRAGMENT_WAYS):
        if bucket.entries[i].deadline and same_packet(&bucket.entries[i].fragment, fragment):
            entry = &bucket.entries[i]
            break
        if bucket.entries[i].deadline < entry.deadline:
            entry = &bucket.entries[i]
    entry.deadline = now + FRAGMENT_LIFETIME * <int64_t>1000000000
    entry.fragment = fragment[0]
    entry.route = route[0]
    spin_unlock(&bucket.lock)


cdef inline bint fragment_find(
    FragmentTable *table, const HashKey *key, const Fragment *fragment, int64_t now,
    FragmentRoute *route
) noexcept nogil:
    """The route of the packet that this is a later fragment of."""
    cdef FragmentBucket *bucket = bucket_of(table, key, fragment)
    cdef FragmentEntry *entry
    cdef uint32_t i
    cdef bint found = False
    spin_lock(&bucket.lock)
    for i in range(FRAGMENT_WAYS):
        entry = &bucket.entries[i]
        if entry.deadline > now and same_packet(&entry.fragment, fragment):
            route[0] = entry.route
            found = True
            break
    spin_unlock(&bucket.lock)
    return found


cdef inline void rewrite_fragment(
    svcdp_packet *packet, const View *view, const FragmentRoute *route
) noexcept nogil:
    """NAT of a later fragment: addresses only; the transport checksum is in the first one."""
    cdef uint8_t *data = packet.data
    cdef uint8_t *source = data + source_offset(view.words)
    cdef uint8_t *target = data + destination_offset(view.words)
    cdef uint16_t delta
    if view.words == 1:
        delta = delta_address(0, source, route.source, 1)
        delta = delta_address(delta, target, route.target, 1)
        store16(data + 10, apply_delta(load16(data + 10), delta))
    copy_address(source, route.source, view.words)
    copy_address(target, route.target, view.words)
    packet.flags |= SVCDP_PACKET_CHANGED


cdef int fragment_table_init(FragmentTable *table) except -1
cdef void fragment_table_free(FragmentTable *table) noexcept
