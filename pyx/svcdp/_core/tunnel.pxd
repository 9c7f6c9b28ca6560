# Tunnels to destinations: IP in IP (RFC 2003, 2473, 4213), GRE (RFC 2784) and GUE version 0
# (draft-ietf-intarea-gue). Outer headers are those that IPVS writes: ip_vs_xmit.c,
# ip_vs_tunnel_xmit and ip_vs_prepare_tunneled_skb.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport likely, unlikely
from svcdp._core.checksum cimport fold, plain_checksum, transport_checksum
from svcdp._core.hash cimport mix
from svcdp._core.hop cimport IP_DF, lower_ttl
from svcdp._core.memory cimport (
    htonl, htonll, htons, load16, load64, ntohll, ntohs, store16, store32, store64,
)
from svcdp._core.packet cimport *
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

cdef extern from *:
    # Of the first 8 bytes of an IPv4 header, as one number in host order.
    const uint64_t FIRST_VERSION "UINT64_C(0x4500000000000000)"
    const uint64_t FIRST_TOS "UINT64_C(0x00ff000000000000)"
    const uint64_t FIRST_CE "UINT64_C(0x0003000000000000)"
    const uint64_t FIRST_ECT0 "UINT64_C(0x0002000000000000)"
    const uint64_t FIRST_DF "UINT64_C(0x4000)"
    const uint64_t GOLDEN "UINT64_C(0x9E3779B97F4A7C15)"


cdef inline uint32_t outer_length(const DestConfig *config) noexcept nogil:
    """Bytes of the outer IP header."""
    return 20 if config.source_words == 1 else 40


cdef inline uint32_t tunnel_mss(const DestConfig *config, uint32_t words) noexcept nogil:
    """The greatest TCP segment of a family of `words` that fits into the tunnel; 0: none."""
    cdef uint32_t mtu = config.mtu if config.mtu else DEFAULT_MTU
    cdef uint32_t headers = config.overhead + (20 if words == 1 else 40) + 20
    return mtu - headers if mtu > headers else 0


cdef inline uint8_t fits_tunnel(
    svcdp_packet *packet, const View *view, const DestConfig *config, bint pmtu_disc
) noexcept nogil:
    """As fits(): TOO_BIG without packet.answer_mtu when no size would do.

    With `pmtu_disc` off, the outer IPv4 packet is fragmented instead. An outer IPv4 header around
    IPv6 never has DF, so what any IPv6 path takes goes through, and no smaller size is told.
    """
    cdef uint32_t mtu = config.mtu
    if mtu == 0:
        return PARSED
    packet.answer_mtu = 0
    if mtu < config.overhead + (
        IPV4_MIN_MTU if config.source_words == 1 else IPV6_MIN_MTU
    ):
        return SVCDP_REASON_TOO_BIG
    mtu -= config.overhead
    if view.words == 4:
        mtu = max(mtu, <uint32_t>IPV6_MIN_MTU)
    elif not pmtu_disc or not packet.data[6] & IP_DF:
        return PARSED
    if view.end <= mtu or view.quoted:
        return PARSED
    packet.answer_mtu = mtu
    return SVCDP_REASON_TOO_BIG


cdef inline uint8_t write_tunnel_header(
    uint8_t *at, uint32_t length, uint8_t inside, const View *view, const Dest *target,
    const DestConfig *config
) noexcept nogil:
    """GUE or GRE in `length` bytes at `at`, the packet included, whose protocol is `inside`. The
    protocol of what was written.
    """
    cdef uint16_t checksum
    if config.tunnel_type == TUNNEL_GUE:
        # The source port spreads flows over queues and paths: 49152 and up (RFC 6335, 6).
        store16(at, htons(<uint16_t>(0xc000 | (mix(view.hash, GOLDEN) >> 50))))
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
        return PROTOCOL_UDP
    store16(at, htons(0x8000 if config.tunnel_checksum else 0))
    store16(at + 2, htons(0x0800 if inside == PROTOCOL_IPIP else 0x86dd))
    if config.tunnel_checksum:
        store32(at + 4, 0)
        store16(at + 4, plain_checksum(at, length))
    return PROTOCOL_GRE


cdef inline void write_outer_ipv4(
    uint8_t *outer, uint64_t first, uint32_t ttl_protocol, const DestConfig *config
) noexcept nogil:
    """`first`: the header's first 8 bytes. `ttl_protocol`: the word of both."""
    cdef uint16_t sum = fold(
        (first >> 32) + <uint32_t>first + ttl_protocol + config.outer_sum)
    store64(outer, htonll(first))
    store32(outer + 8, htonl(ttl_protocol << 16 | <uint16_t>~sum))
    store64(outer + 12, load64(config.outer + 12))


cdef inline void write_outer_ipv6(
    uint8_t *outer, uint32_t traffic_class, uint32_t length, uint8_t protocol, uint8_t ttl,
    const DestConfig *config
) noexcept nogil:
    store32(outer, htonl(<uint32_t>6 << 28 | traffic_class << 20))
    store16(outer + 4, htons(<uint16_t>(length - 40)))
    outer[6] = protocol
    outer[7] = ttl
    memcpy(outer + 8, config.outer + 8, 32)


cdef inline void encapsulate(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config,
    bint pmtu_disc, uint64_t *random, uint32_t words, uint32_t outer_words, uint32_t tunnel_type
) noexcept nogil:
    """Wrap a packet whose TTL was lowered and that has the headroom. Padding behind it is cut.

    `words` is the view's; `outer_words` and `tunnel_type` are the configuration's.
    """
    cdef uint8_t *inner = packet.data
    cdef uint32_t length = view.end + config.overhead
    cdef uint8_t *outer = inner - config.overhead
    cdef uint32_t ttl
    cdef uint8_t protocol
    # The first 8 bytes of an IPv4 header in host order: type of service, and DF.
    cdef uint64_t first
    if words == 1:
        first = ntohll(load64(inner)) & (FIRST_TOS | (FIRST_DF if pmtu_disc else 0))
        ttl = inner[8]
        protocol = PROTOCOL_IPIP
    else:
        first = (<uint64_t>ntohs(load16(inner)) << 44) & FIRST_TOS
        ttl = inner[7]
        protocol = PROTOCOL_IPV6
    # RFC 3168, 9.1.1, full functionality: what happened before the tunnel stays inside.
    if unlikely(first & FIRST_CE == FIRST_CE):
        first -= FIRST_CE - FIRST_ECT0
    if tunnel_type != TUNNEL_IPIP:
        protocol = write_tunnel_header(
            outer + outer_length(config), length - outer_length(config), protocol, view, target,
            config)
    if outer_words == 1:
        first |= FIRST_VERSION | <uint64_t>length << 32
        if not first & FIRST_DF:
            random[0] += GOLDEN
            first |= <uint64_t><uint16_t>mix(random[0], GOLDEN) << 16
        write_outer_ipv4(outer, first, ttl << 8 | protocol, config)
    else:
        write_outer_ipv6(
            outer, <uint32_t>(first >> 48), length, protocol, <uint8_t>ttl, config)
    packet.data = outer
    packet.len = length
    packet.headroom -= <uint16_t>config.overhead
    packet.flags |= SVCDP_PACKET_CHANGED


cdef inline uint8_t send_as(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config,
    bint pmtu_disc, uint64_t *random, uint32_t words, uint32_t outer_words, uint32_t tunnel_type
) noexcept nogil:
    cdef uint8_t reason
    if unlikely(packet.headroom < config.overhead):
        return SVCDP_REASON_NO_HEADROOM
    reason = lower_ttl(packet.data, words)
    if likely(reason == PARSED):
        reason = fits_tunnel(packet, view, config, pmtu_disc)
    if unlikely(reason != PARSED):
        return reason
    if unlikely(view.end + config.overhead > IP_LENGTH_MAX):
        packet.answer_mtu = 0
        return SVCDP_REASON_TOO_BIG
    encapsulate(
        packet, view, target, config, pmtu_disc, random, words, outer_words, tunnel_type)
    return PARSED


cdef inline uint8_t send_through(
    svcdp_packet *packet, const View *view, const Dest *target, const DestConfig *config,
    bint pmtu_disc, uint64_t *random
) noexcept nogil:
    """Send a packet into the tunnel to `target`: PARSED, or why not.

    TIME_EXCEEDED, NO_HEADROOM: it has its TTL still. TOO_BIG: answer_mtu bytes would go, or, if
    that is 0, none; its TTL is lowered already, as in the answer.
    """
    # The outer header says nothing about checksums that a device still has to write.
    if unlikely(packet.flags & SVCDP_PACKET_CSUM_PARTIAL and not view.quoted):
        complete_checksum(packet.data, view)
        packet.flags &= <uint16_t>~SVCDP_PACKET_CSUM_PARTIAL
    # Constant arguments: the most common tunnel gets a way of its own.
    if likely(config.is_plain_tunnel and view.words == 1):
        return send_as(packet, view, target, config, pmtu_disc, random, 1, 1, TUNNEL_IPIP)
    return send_as(
        packet, view, target, config, pmtu_disc, random, view.words, config.source_words,
        config.tunnel_type)


cdef inline void prepare_tunnel(DestConfig *config, const Dest *target) noexcept nogil:
    """Compute once what all packets of a tunnel to `target` have in common."""
    cdef uint32_t words = config.source_words
    cdef uint32_t i
    memset(config.outer, 0, 40)
    memcpy(config.outer + source_offset(words), config.tunnel_source, 4 * words)
    memcpy(config.outer + destination_offset(words), target.address, 4 * words)
    config.outer_sum = 0
    for i in range(12, 20, 2):
        config.outer_sum += ntohs(load16(config.outer + i))
    config.overhead = outer_length(config)
    if config.tunnel_type == TUNNEL_GUE:
        config.overhead += GUE_HEADERS
    elif config.tunnel_type == TUNNEL_GRE:
        config.overhead += GRE_HEADER + (GRE_CHECKSUM if config.tunnel_checksum else 0)
    config.is_plain_tunnel = words == 1 and config.tunnel_type == TUNNEL_IPIP
