# TCP sequence numbers of a stream whose text a helper has made longer or shorter, as in
# ip_vs_app.c: what comes behind the newest change moves by `delta`, what comes before it by
# `previous_delta`.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

from svcdp._core.abi cimport svcdp_packet
from svcdp._core.checksum cimport apply_delta, delta_add, fold
from svcdp._core.memory cimport htonl, load16, load32, ntohl, store16, store32
from svcdp._core.packet cimport View

cdef enum:
    OPTION_END = 0
    OPTION_NOP = 1
    OPTION_SACK = 5

# One direction of a connection; the sync protocol has both, in this order and size.
cdef struct SeqDelta:
    uint32_t position          # sequence number, as its sender counts, of the newest changed text
    int32_t delta              # bytes
    int32_t previous_delta


cdef inline bint is_after(uint32_t a, uint32_t b) noexcept nogil:
    return <int32_t>(a - b) > 0


cdef inline void note_change(SeqDelta *seq, uint32_t position, int32_t difference) noexcept nogil:
    """The text at `position` became longer by `difference`. A retransmission is no new change."""
    if seq.delta == seq.previous_delta == 0 or is_after(position, seq.position):
        seq.previous_delta = seq.delta
        seq.delta = <int32_t>(<uint32_t>seq.delta + <uint32_t>difference)
        seq.position = position


cdef inline uint32_t moved(const SeqDelta *seq, uint32_t number) noexcept nogil:
    """A sequence number of the sender, as the receiver counts."""
    if is_after(number, seq.position):
        return number + <uint32_t>seq.delta
    return number + <uint32_t>seq.previous_delta


cdef inline uint32_t moved_back(const SeqDelta *seq, uint32_t number) noexcept nogil:
    """What the receiver acknowledges, as the sender counts. IPVS adds `delta` here, and so takes
    an acknowledgement of what precedes shortened text for one of its first bytes.
    """
    if is_after(number, seq.position + <uint32_t>seq.previous_delta):
        return number - <uint32_t>seq.delta
    return number - <uint32_t>seq.previous_delta


cdef inline void set_number(uint8_t *tcp, uint32_t offset, uint32_t value) noexcept nogil:
    """Write a number into a TCP header, and its change into the checksum."""
    cdef uint8_t *at = tcp + offset
    cdef uint32_t field = htonl(value)
    cdef uint16_t delta = delta_add(0, load16(at), <uint16_t>field)
    delta = delta_add(delta, load16(at + 2), <uint16_t>(field >> 16))
    if offset & 1:
        delta = <uint16_t>(delta << 8 | delta >> 8)
    store32(at, field)
    store16(tcp + 16, apply_delta(load16(tcp + 16), delta))


cdef inline void move_back_sacks(
    uint8_t *tcp, uint32_t header, const SeqDelta *seq
) noexcept nogil:
    """The edges of what is selectively acknowledged (RFC 2018, 3)."""
    cdef uint32_t offset = 20
    cdef uint32_t length, edge
    while offset + 2 <= header and tcp[offset] != OPTION_END:
        if tcp[offset] == OPTION_NOP:
            offset += 1
            continue
        length = tcp[offset + 1]
        if length < 2 or offset + length > header:
            return
        if tcp[offset] == OPTION_SACK:
            edge = offset + 2
            while edge + 4 <= offset + length:
                set_number(tcp, edge, moved_back(seq, ntohl(load32(tcp + edge))))
                edge += 4
        offset += length


cdef inline void move_numbers(
    svcdp_packet *packet, const View *view, const SeqDelta *own, const SeqDelta *other
) noexcept nogil:
    """Renumber a packet; `own` is of its direction, `other` of the one that it acknowledges."""
    cdef uint8_t *tcp = packet.data + view.transport
    # Read again, so bounded again: the caller's buffer may have changed meanwhile.
    cdef uint32_t header = min(
        <uint32_t>(tcp[12] >> 4) * 4, view.end - view.transport)
    if own.delta or own.previous_delta:
        set_number(tcp, 4, moved(own, ntohl(load32(tcp + 4))))
    if other.delta or other.previous_delta:
        set_number(tcp, 8, moved_back(other, ntohl(load32(tcp + 8))))
        move_back_sacks(tcp, header, other)
