# SipHash-1-3 of one 32-bit number (Aumasson, Bernstein 2012, with fewer rounds): one compression
# round a word, three to finish.
from libc.stdint cimport uint32_t, uint64_t


cdef inline uint64_t rotate(uint64_t word, uint32_t bits) noexcept nogil:
    return word << bits | word >> (64 - bits)


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = rotate(v[1], 13) ^ v[0]
    v[3] = rotate(v[3], 16) ^ v[2]
    v[0] = rotate(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = rotate(v[1], 17) ^ v[2]
    v[3] = rotate(v[3], 21) ^ v[0]
    v[2] = rotate(v[2], 32)


cdef inline uint64_t siphash13(uint64_t key0, uint64_t key1, uint32_t number) noexcept nogil:
    """Of the number's 4 bytes, little endian. The only block also has the length, 4, on top."""
    cdef uint64_t block = <uint64_t>4 << 56 | number
    cdef uint64_t v[4]
    v[0] = key0 ^ <uint64_t>0x736f6d6570736575
    v[1] = key1 ^ <uint64_t>0x646f72616e646f6d
    v[2] = key0 ^ <uint64_t>0x6c7967656e657261
    v[3] = key1 ^ <uint64_t>0x7465646279746573
    v[3] ^= block
    sip_round(v)
    v[0] ^= block
    v[2] ^= 0xff
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
