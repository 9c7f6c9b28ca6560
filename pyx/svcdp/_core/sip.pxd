# The Call-ID of a SIP message in a datagram: RFC 3261, 7.3 and 20.8.
from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    CALL_ID_MAX = 255          # bytes; the sync protocol carries no more

cdef extern from * nogil:
    """
    #ifndef SVCDP_SIP_H
    #define SVCDP_SIP_H
    #include <stdint.h>

    /* A character of a `word`: RFC 3261, 25.1. */
    static inline int svcdp_is_word(uint8_t c)
    {
        static const uint32_t set[8] = {0, 0xd7ffefa6u, 0xbffffffeu, 0x6fffffffu};
        return set[c >> 5] >> (c & 31) & 1;
    }
    #endif
    """
    bint is_word "svcdp_is_word"(uint8_t c)


cdef inline bint is_blank(uint8_t c) noexcept nogil:
    return c == b" " or c == b"\t"


cdef inline bint ends_line(uint8_t c) noexcept nogil:
    return c == b"\r" or c == b"\n"


cdef inline uint32_t skip_line_end(
    const uint8_t *text, uint32_t at, uint32_t length
) noexcept nogil:
    """Behind the CR, LF or CRLF at `at`; RFC 2543 had all three."""
    if text[at] == b"\r" and at + 1 < length and text[at + 1] == b"\n":
        return at + 2
    return at + 1


cdef inline uint32_t next_line(const uint8_t *text, uint32_t at, uint32_t length) noexcept nogil:
    while at < length and not ends_line(text[at]):
        at += 1
    return skip_line_end(text, at, length) if at < length else length


cdef inline uint32_t skip_blanks(
    const uint8_t *text, uint32_t at, uint32_t length
) noexcept nogil:
    """Blanks, and line ends before a blank: a folded line."""
    cdef uint32_t line
    while at < length:
        if ends_line(text[at]):
            line = skip_line_end(text, at, length)
            if line >= length or not is_blank(text[line]):
                break
            at = line
        elif not is_blank(text[at]):
            break
        at += 1
    return at


cdef inline uint32_t skip_word(const uint8_t *text, uint32_t at, uint32_t length) noexcept nogil:
    while at < length and is_word(text[at]):
        at += 1
    return at


cdef inline uint32_t value_of(
    const uint8_t *text, uint32_t at, uint32_t length, const char *name, uint32_t size
) noexcept nogil:
    """Where the value begins of the header at `at`, if it has this name (`size` letters, in lower
    case); else 0.
    """
    cdef uint32_t i
    cdef uint8_t c
    if length - at <= size:
        return 0
    for i in range(size):
        c = text[at + i]
        if b"A" <= c <= b"Z":
            c += 32
        if c != <uint8_t>name[i]:
            return 0
    at += size
    while at < length and is_blank(text[at]):
        at += 1
    if at == length or text[at] != b":":
        return 0
    return skip_blanks(text, at + 1, length)


cdef inline uint32_t call_id(
    const uint8_t *text, uint32_t length, const uint8_t **id
) noexcept nogil:
    """The bytes of the message's Call-ID, which `id` is set to. 0: it has none that is valid."""
    cdef uint32_t at = next_line(text, 0, length)
    cdef uint32_t value, end
    while at < length and not ends_line(text[at]):
        value = value_of(text, at, length, b"call-id", 7)
        if value == 0:
            value = value_of(text, at, length, b"i", 1)
        if value == 0:
            at = next_line(text, at, length)
            continue
        end = skip_word(text, value, length)
        if value < end < length and text[end] == b"@":
            at = end + 1
            end = skip_word(text, at, length)
            if end == at:
                return 0
        at = end
        while at < length and is_blank(text[at]):
            at += 1
        # A value that the datagram ends in may be cut short.
        if at == length or not ends_line(text[at]) or end - value > CALL_ID_MAX:
            return 0
        id[0] = text + value
        return end - value
    return 0
