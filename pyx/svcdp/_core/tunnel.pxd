# Tunnels to destinations: IP in IP (RFC 2003, 2473, 4213), GRE (RFC 2784) and GUE version 0
# (draft-ietf-intarea-gue). Outer headers are those that IPVS writes: ip_vs_xmit.c,
# ip_vs_tunnel_xmit and ip_vs_prepare_tunneled_skb.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.checksum cimport plain_checksum, transport_checksum
from svcdp._core.hash cimport mix
from svcdp._core.hop cimport IP_DF, lower_ttl
from svcdp._core.memory cimport copy_address, htons, store16, store32
from svcdp._core.packet cimport *
from svcdp._core.sched cimport next_random
from svcdp._core.service cimport *
from svcdp._core.xmit cimport complete_checksum, destination_offset, source_offset

cdef enum:
    IPV4_MIN_MTU = 68          # RFC 791, 3.2
    IPV6_MIN_MTU = 1280        # RFC 8200, 5
    IP_LENGTH_MAX = 65535      # what an IPv4 header can say
    DEFAULT_MTU = 1500         # where none is configured

    GUE_HEADERS = 12           # UDP's 8, and 4 without options
    GRE_HEADER = 4
    GRE_CHECKSUM = 4           # the checksum and a reserved word

    ECN_MASK = 3
    ECN_CE = 3
    ECN_ECT0 = 2


cdef inline uint32_t tunnel_header(const DestConfig *config) noexcept nogil:
    """Bytes between the outer IP header and the packet inside."""
    if config.tunnel_type == TUNNEL_GUE:
        return GUE_HEADERS
    if config.tunnel_type == TUNNEL_GRE:
        return GRE_HEADER + (GRE_CHECKSUM if config.tunnel_checksum else 0)
    return 0


cdef inline uint32_t tunnel_overhead(const DestConfig *config) noexcept nogil:
    """Bytes by which the tunnel makes packets longer."""
    return (20 if config.source_words == 1 else 40) + tunnel_header(config)


cdef inline uint32_t tunnel_mss(const DestConfig *config, uint32_t words) noexcept nogil:
    """The greatest TCP segment of a family of `words` that fits into the tunnel; 0: none."""
    cdef uint32_t mtu = config.mtu if config.mtu else DEFAULT_MTU
    cdef uint32_t headers = tunnel_overhead(config) + (20 if words == 1 else 40) + 20
    return mtu - headers if mtu > headers else 0


cdef inline uint8_t fits_tunnel(
    svcdp_packet *packet, const View *view, const DestConfig *config, bint pmtu_disc
) noexcept nogil:
    """As fits(): TOO_BIG without packet.answer_mtu when no size would do.

    With `pmtu_disc` off, the outer IPv4 packet is fragmented instead. An outer IPv4 header around
    IPv6 never has DF, so what any IPv6 path takes goes through, and no smaller size is told.
    """
    cdef uint32_t mtu = config.mtu
    packet.answer_mtu = 0
    if mtu == 0:
        return PARSED
    if mtu < tunnel_overhead(config) + (
        IPV4_MIN_MTU if config.source_words == 1 else IPV6_MIN_MTU
    ):
        return SVCDP_REASON_TOO_BIG
    mtu -= tunnel_overhead(config)
    if view.words == 4:
        mtu = max(mtu, <uint32_t>IPV6_MIN_MTU)
    elif not pmtu_disc or not packet.data[6] & IP_DF:
        return PARSED
    if view.end <= mtu or view.quoted:
        return PARSED
    packet.answer_mtu = mtu
    return SVCDP_REASON_TOO_BIG


cdef inline void write_tunnel_header(
    uint8_t *at, uint32_t length, uint8_t inside, const View *view, const Dest *target,
    const DestConfig *config
) noexcept nogil:
    """GUE or GRE in `length` bytes at `at`, the packet included, whose protocol is `inside`."""
    cdef uint16_t checksum
    if config.tunnel_type == TUNNEL_GUE:
        # The source port spreads flows over queues and paths: 49152 and up (RFC 6335, 6).
        store16(at, htons(<uint16_t>(0xc000 | (mix(view.hash, 0x9E3779B97F4A7C15) >> 50))))
        store16(at + 2, config.tunnel_port)
        store16(at + 4, htons(<uint16_t>length))
        store16(at + 6, 0)
        store32(at + 8, 0)
        at[9] = inside
        if config.tunnel_checksum:
            checksum = transport_checksum(
                config.tunnel_source, target.address, config.source_words, PROTOCOL_UDP, at,
                length)
            store16(at + 6, checksum if checksum else 0xffff)
        return
    store16(at, htons(0x8000 if config.tunnel_checksum else 0))
    store16(at + 2, htons(0x0800 if inside == PROTOCOL_IPIP else 0x86dd))
    if config.tunnel_checksum:
        store32(at + 4, 0)
        store16(at + 4, plain_checksum(at, length))


cdef inline void write_outer_header(
    uint8_t *outer, uint32_t length, uint8_t protocol, uint8_t traffic_class, uint8_t ttl,
    uint8_t df, uint16_t id, const Dest *target, const DestConfig *config
) noexcept nogil:
    cdef uint32_t words = config.source_words
    if words == 1:
        outer[0] = 0x45
        outer[1] = traffic_class
        store16(outer + 2, htons(<uint16_t>length))
        store16(outer + 4, id)
        outer[6] = df
        outer[7] = 0
        outer[8] = ttl
        outer[9] = protocol
        store16(outer + 10, 0)
    else:
        outer[0] = 0x60 | traffic_class >> 4
        outer[1] = <uint8_t>(traffic_class << 4)
        store16(outer + 2, 0)
        store16(outer + 4, htons(<uint16_t>(length - 40)))
        outer[6] = protocol
        outer[7] = ttl
    copy_address(outer + source_offset(words), config.tunnel_source, words)
    copy_address(outer + destination_offset(words), target.address, words)
    if words == 1:
        store16(outer + 10, plain_checksum(outer, 20))


cdef inline void encapsulate(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config,
    bint pmtu_disc, uint64_t *random
) noexcept nogil:
    """Wrap a packet whose TTL was lowered and that has the headroom. Padding behind it is cut."""
    cdef uint8_t *inner = packet.data
    cdef uint32_t overhead = tunnel_overhead(config)
    cdef uint32_t header = tunnel_header(config)
    cdef uint8_t *outer = inner - overhead
    cdef uint8_t inside, protocol, traffic_class, ttl, df = 0
    if view.words == 1:
        inside = protocol = PROTOCOL_IPIP
        traffic_class = inner[1]
        ttl = inner[8]
        if pmtu_disc:
            df = inner[6] & IP_DF
    else:
        inside = protocol = PROTOCOL_IPV6
        traffic_class = <uint8_t>(inner[0] << 4 | inner[1] >> 4)
        ttl = inner[7]
    # RFC 3168, 9.1.1, full functionality: what happened before the tunnel stays inside.
    if traffic_class & ECN_MASK == ECN_CE:
        traffic_class = (traffic_class & ~ECN_MASK) | ECN_ECT0
    # The outer header says nothing about checksums that a device still has to write.
    if unlikely(packet.flags & SVCDP_PACKET_CSUM_PARTIAL and not view.quoted):
        complete_checksum(inner, view)
        packet.flags &= <uint16_t>~SVCDP_PACKET_CSUM_PARTIAL
    if config.tunnel_type == TUNNEL_GUE:
        protocol = PROTOCOL_UDP
    elif config.tunnel_type == TUNNEL_GRE:
        protocol = PROTOCOL_GRE
    if header:
        write_tunnel_header(inner - header, view.end + header, inside, view, target, config)
    write_outer_header(
        outer, view.end + overhead, protocol, traffic_class, ttl, df,
        0 if df else <uint16_t>next_random(random), target, config)
    packet.data = outer
    packet.len = view.end + overhead
    packet.headroom -= <uint16_t>overhead
    packet.flags |= SVCDP_PACKET_CHANGED


cdef inline uint8_t send_through(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config,
    bint pmtu_disc, uint64_t *random
) noexcept nogil:
    """Send a packet into the tunnel to `target`: PARSED, or why not.

    TIME_EXCEEDED, NO_HEADROOM: it is as it was. TOO_BIG: answer_mtu bytes would go, or, if that
    is 0, none; its TTL is lowered already, as in the answer.
    """
    cdef uint32_t overhead = tunnel_overhead(config)
    cdef uint8_t reason
    if packet.headroom < overhead:
        return SVCDP_REASON_NO_HEADROOM
    reason = lower_ttl(packet.data, view.words)
    if reason == PARSED:
        reason = fits_tunnel(packet, view, config, pmtu_disc)
    if reason != PARSED:
        return reason
    if view.end + overhead > IP_LENGTH_MAX:
        packet.answer_mtu = 0
        return SVCDP_REASON_TOO_BIG
    encapsulate(packet, view, target, config, pmtu_disc, random)
    return PARSED
