# The maximum segment size that a SYN announces (RFC 9293, 3.7.1), made to fit a narrower path.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.abi cimport *
from svcdp._core.checksum cimport delta_add
from svcdp._core.memory cimport htons, load16, ntohs, store16
from svcdp._core.packet cimport TCP_SYN, View
from svcdp._core.xmit cimport update_checksum

cdef enum:
    OPTION_END = 0
    OPTION_NOP = 1
    OPTION_MSS = 2


cdef inline uint16_t swap_bytes(uint16_t word) noexcept nogil:
    return <uint16_t>(word << 8 | word >> 8)


cdef inline void clamp_mss(svcdp_packet *packet, const View *view, uint32_t bound) noexcept nogil:
    """Lower the MSS option of a TCP SYN to `bound`, and update the checksum, or complete it.

    A SYN without the option stays as it is: its sender takes 536 or 1220 bytes. So does one
    whose options contradict themselves.
    """
    cdef uint8_t *tcp = packet.data + view.transport
    cdef uint8_t *value
    cdef uint16_t old, new
    cdef uint32_t end = min(<uint32_t>(tcp[12] >> 4) * 4, view.end - view.transport)
    cdef uint32_t at = 20
    if not view.tcp_flags & TCP_SYN or view.quoted:
        return
    while at < end and tcp[at] != OPTION_END:
        if tcp[at] == OPTION_NOP:
            at += 1
            continue
        if at + 1 >= end or tcp[at + 1] < 2 or tcp[at + 1] > end - at:
            return
        if tcp[at] == OPTION_MSS:
            value = tcp + at + 2
            if tcp[at + 1] != 4 or ntohs(load16(value)) <= bound:
                return
            old = load16(value)
            new = htons(<uint16_t>bound)
            store16(value, new)
            packet.flags |= SVCDP_PACKET_CHANGED
            if at & 1:
                # The option straddles two words of the sum (RFC 1071, 2 (B)).
                old = swap_bytes(old)
                new = swap_bytes(new)
            update_checksum(packet, view, delta_add(0, old, new), False)
            return
        at += tcp[at + 1]
