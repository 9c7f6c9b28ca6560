# ICMP errors about packets of our own tunnels, made into errors that the client understands.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.abi cimport *
from svcdp._core.answer cimport *
from svcdp._core.hop cimport IP_DF
from svcdp._core.memory cimport load16, load32, ntohl, ntohs, same_address
from svcdp._core.packet cimport *
from svcdp._core.service cimport *
from svcdp._core.tunnel cimport IPV4_MIN_MTU, IPV6_MIN_MTU
from svcdp._core.xmit cimport destination_offset, is_error_intact, source_offset


cdef inline bint is_about_tunnel(
    const uint8_t *outer, const Dest *target, const DestConfig *config
) noexcept nogil:
    """Whether the quoted outer header is one that encapsulate() writes for this destination."""
    cdef uint32_t words = config.source_words
    cdef uint8_t protocol = outer[9] if words == 1 else outer[6]
    if outer[0] >> 4 != (4 if words == 1 else 6) or config.method != METHOD_TUNNEL:
        return False
    if config.tunnel_type == TUNNEL_GUE:
        if protocol != PROTOCOL_UDP:
            return False
    elif config.tunnel_type == TUNNEL_GRE:
        if protocol != PROTOCOL_GRE:
            return False
    elif protocol != PROTOCOL_IPIP and protocol != PROTOCOL_IPV6:
        return False
    return (
        same_address(outer + source_offset(words), config.tunnel_source, words)
        and same_address(outer + destination_offset(words), target.address, words)
    )


cdef inline uint32_t mtu_inside(
    uint32_t reported, uint32_t overhead, uint32_t words
) noexcept nogil:
    """What is left of an MTU inside of a tunnel. 0, of routers older than RFC 1191, stays 0."""
    cdef uint32_t least = IPV4_MIN_MTU if words == 1 else IPV6_MIN_MTU
    if reported == 0 and words == 1:
        return 0
    return reported - overhead if reported > least + overhead else least


cdef inline uint8_t relay_tunnel_error(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config
) noexcept nogil:
    """Make, in place, of an ICMP error about our tunnel (view.tunnel) one about the packet inside,
    from the virtual address to the client.

    PARSED when that is done. CHECKSUM: it is damaged. RELATED: it has nothing to say to the
    client, or is not about this tunnel, and is for the local stack: which has to fragment when
    the client may not be told that its packets are too big.

    IPv4 in IPv4 keeps type and code, as in IPVS (ip_vs_core.c, ip_vs_in_icmp). Otherwise all but
    "too big" becomes an unreachable host or address (RFC 2473, 8; RFC 4213, 3.4).
    """
    cdef const uint8_t *icmp = packet.data + view.transport
    cdef const uint8_t *inner = packet.data + view.quoted
    cdef const uint8_t *outer = packet.data + view.tunnel
    cdef bint v6_outer = packet.data[0] >> 4 == 6
    cdef uint8_t icmp_type = icmp[0], code = icmp[1]
    cdef bint too_big = icmp_type == TOO_BIG6 if v6_outer \
        else icmp_type == UNREACHABLE and code == UNREACHABLE_TOO_BIG
    cdef uint32_t info = 0, start, quote
    cdef uint8_t *out
    cdef View inside
    if not is_error_intact(packet.data, view):
        return SVCDP_REASON_CHECKSUM
    if not is_about_tunnel(outer, target, config):
        return SVCDP_REASON_RELATED
    if icmp_type != (UNREACHABLE6 if v6_outer else UNREACHABLE) and not too_big \
            and icmp_type != (TIME_EXCEEDED6 if v6_outer else TIME_EXCEEDED):
        return SVCDP_REASON_RELATED
    if parse_ip(packet.data, view.quoted, view.end, True, &inside) != PARSED:
        return SVCDP_REASON_RELATED
    if too_big:
        if inside.words == 1 and not inner[6] & IP_DF:
            return SVCDP_REASON_RELATED
        info = mtu_inside(
            ntohl(load32(icmp + 4)) if v6_outer else ntohs(load16(icmp + 6)),
            view.quoted - view.tunnel, inside.words)
        icmp_type = UNREACHABLE if inside.words == 1 else TOO_BIG6
        code = UNREACHABLE_TOO_BIG if inside.words == 1 else 0
    elif inside.words == 4:
        icmp_type, code = UNREACHABLE6, UNREACHABLE6_ADDRESS
    elif v6_outer:
        icmp_type, code = UNREACHABLE, UNREACHABLE_HOST
    start = error_header(inside.words)
    quote = min(
        inside.end - view.quoted, (QUOTE_V4 if inside.words == 1 else QUOTE_V6) - start)
    # At least an IP header of the tunnel lies before what is quoted: there is room.
    out = packet.data + view.quoted - start
    packet.headroom += <uint16_t>(out - packet.data)
    packet.data = out
    packet.len = finish_error(out, &inside, icmp_type, code, info, quote)
    packet.flags |= SVCDP_PACKET_CHANGED
    return PARSED
