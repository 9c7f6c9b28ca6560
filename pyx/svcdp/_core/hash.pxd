# The keyed hash of connections and services: folded 64x64->128-bit multiplications over words
# that are first mixed with secret random ones, so that a peer who does not know the key cannot
# aim at a bucket. Not a cryptographic MAC; what it decides is only where an entry is kept.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.memory cimport load32, load64

cdef extern from * nogil:
    """
    #ifndef SVCDP_HASH_H
    #define SVCDP_HASH_H
    #include <stdint.h>
    static inline uint64_t svcdp_mix(uint64_t a, uint64_t b)
    {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    #endif
    """
    uint64_t mix "svcdp_mix"(uint64_t a, uint64_t b)

cdef struct HashKey:
    uint64_t word[6]


cdef inline uint64_t hash_flow(
    const HashKey *key, uint32_t words, const uint8_t *source, const uint8_t *destination,
    uint16_t source_port, uint16_t destination_port, uint8_t protocol
) noexcept nogil:
    """The hash of a packet's 5-tuple as it is on the wire, so that one packet needs one hash."""
    cdef uint64_t ports = (
        source_port | (<uint64_t>destination_port << 16) | (<uint64_t>protocol << 32)
        | (<uint64_t>words << 40)
    )
    cdef uint64_t h
    if words == 1:
        h = load32(source) | (<uint64_t>load32(destination) << 32)
    else:
        h = (
            mix(load64(source) ^ key.word[2], load64(source + 8) ^ key.word[3])
            ^ mix(load64(destination) ^ key.word[4], load64(destination + 8) ^ key.word[5])
        )
    h = mix(h ^ key.word[0], ports ^ key.word[1])
    return mix(h ^ key.word[1], key.word[0])
