# What every hop owes a packet that it sends on: one hop less to live, and not more bytes than the
# path takes (RFC 1812, 5.2.1 and 5.3.1; RFC 8200, 3 and 5).
from libc.stdint cimport uint8_t, uint32_t

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport unlikely
from svcdp._core.checksum cimport apply_delta
from svcdp._core.memory cimport htons, load16, store16
from svcdp._core.packet cimport PARSED, View

cdef enum:
    IP_DF = 0x40               # don't fragment, in byte 6 of the IPv4 header


cdef inline uint8_t lower_ttl(uint8_t *data, uint32_t words) noexcept nogil:
    """Take a hop from the packet's TTL or hop limit. PARSED, or TIME_EXCEEDED and untouched."""
    cdef uint8_t *ttl = data + (8 if words == 1 else 7)
    if unlikely(ttl[0] <= 1):
        return SVCDP_REASON_TIME_EXCEEDED
    ttl[0] -= 1
    if words == 1:
        # The TTL is the upper byte of its word.
        store16(data + 10, apply_delta(load16(data + 10), <uint16_t>~htons(0x0100)))
    return PARSED


cdef inline uint8_t fits(
    svcdp_packet *packet, const View *view, uint32_t mtu
) noexcept nogil:
    """Whether the packet may take a path of `mtu` bytes (0: unchecked): PARSED, or TOO_BIG with
    packet.answer_mtu set.

    Whoever sends it on fragments IPv4 without DF. Errors are never refused (ip_vs_xmit.c,
    ensure_mtu_is_adequate), nor is what an offload segments later.
    """
    if mtu == 0 or view.end <= mtu or view.quoted or packet.flags & SVCDP_PACKET_CSUM_PARTIAL:
        return PARSED
    if view.words == 1 and not packet.data[6] & IP_DF:
        return PARSED
    packet.answer_mtu = mtu
    return SVCDP_REASON_TOO_BIG
