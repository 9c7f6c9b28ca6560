# Internet checksums (RFC 1071), their incremental update (RFC 1624) and SCTP's CRC32c (RFC 9260,
# appendix A).
#
# Sums are of 16-bit words as the machine loads them: one's complement addition gives the same
# bytes in either order. A *delta* is the folded sum of ~old + new over the words that change;
# the change back has the delta ~delta.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.memory cimport htonl, htons, load16, load32

cdef extern from * nogil:
    """
    #ifndef SVCDP_CHECKSUM_H
    #define SVCDP_CHECKSUM_H
    #include <stdint.h>
    #include <string.h>

    /* The compiler turns the inner loop into vector additions; a 32-bit word carries into the
       upper half of its 64-bit lane, which cannot overflow below 2^32 words. */
    static inline uint64_t svcdp_sum(const uint8_t *p, uint32_t length, uint64_t sum)
    {
        uint32_t word;
        for (; length >= 4; p += 4, length -= 4) {
            memcpy(&word, p, 4);
            sum += word;
        }
        if (length) {
            word = 0;
            memcpy(&word, p, length);
            sum += word;
        }
        return sum;
    }

    /* A number plus itself with its halves swapped has their sum, the carry added, in the upper
       half. */
    static inline uint16_t svcdp_fold(uint64_t sum)
    {
        uint32_t half = (uint32_t)((sum + (sum >> 32 | sum << 32)) >> 32);
        return (uint16_t)((half + (half >> 16 | half << 16)) >> 16);
    }

    /* One nibble a step: 64 bytes of table, and only SCTP packets whose port changes pay. */
    static inline uint32_t svcdp_crc32c(const uint8_t *p, uint32_t length, uint32_t crc)
    {
        static const uint32_t table[16] = {
            0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3,
            0x61c69362, 0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
            0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75};
        while (length--) {
            crc ^= *p++;
            crc = (crc >> 4) ^ table[crc & 15];
            crc = (crc >> 4) ^ table[crc & 15];
        }
        return crc;
    }
    #endif
    """
    uint64_t sum_bytes "svcdp_sum"(const uint8_t *p, uint32_t length, uint64_t sum)
    uint16_t fold "svcdp_fold"(uint64_t sum)
    uint32_t crc32c "svcdp_crc32c"(const uint8_t *p, uint32_t length, uint32_t crc)


cdef inline uint64_t change_word(uint16_t old, uint16_t new) noexcept nogil:
    """What replacing a word adds to a sum."""
    return <uint64_t><uint16_t>~old + new


cdef inline uint64_t change_address(
    const uint8_t *old, const uint8_t *new, uint32_t words
) noexcept nogil:
    """The same of an address."""
    cdef uint64_t sum = 0
    cdef uint32_t i
    for i in range(words):
        sum += <uint64_t><uint32_t>~load32(old + 4 * i) + load32(new + 4 * i)
    return sum


cdef inline uint16_t delta_add(uint16_t delta, uint16_t old, uint16_t new) noexcept nogil:
    """The delta that also replaces the word `old` by `new`."""
    return fold(delta + change_word(old, new))


cdef inline uint16_t delta_address(
    uint16_t delta, const uint8_t *old, const uint8_t *new, uint32_t words
) noexcept nogil:
    return fold(delta + change_address(old, new, words))


cdef inline uint16_t apply_delta(uint16_t checksum, uint16_t delta) noexcept nogil:
    """RFC 1624, equation 3."""
    cdef uint32_t sum = <uint32_t><uint16_t>~checksum + delta
    return <uint16_t>~((sum & 0xffff) + (sum >> 16))   # at most one carry


cdef inline uint16_t transport_checksum(
    const uint8_t *source, const uint8_t *destination, uint32_t words,
    uint8_t protocol, const uint8_t *transport, uint32_t length
) noexcept nogil:
    """Full checksum with the pseudo header of RFC 9293 (IPv4) or RFC 8200 (IPv6).

    The checksum field inside `transport` must be 0.
    """
    cdef uint64_t sum = sum_bytes(source, 4 * words, 0)
    sum = sum_bytes(destination, 4 * words, sum)
    sum += htonl(length)
    sum += htons(protocol)
    return <uint16_t>~fold(sum_bytes(transport, length, sum))


cdef inline uint16_t plain_checksum(const uint8_t *data, uint32_t length) noexcept nogil:
    return <uint16_t>~fold(sum_bytes(data, length, 0))
