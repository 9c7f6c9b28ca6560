# Loads and stores in packets, which are aligned to nothing. Values keep the wire's byte order
# unless the name says otherwise.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #ifndef SVCDP_MEMORY_H
    #define SVCDP_MEMORY_H
    #include <arpa/inet.h>
    #include <endian.h>
    #include <stdint.h>
    #include <string.h>

    static inline uint16_t svcdp_load16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
    static inline uint32_t svcdp_load32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline uint64_t svcdp_load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
    static inline void svcdp_store16(void *p, uint16_t v) { memcpy(p, &v, 2); }
    static inline void svcdp_store32(void *p, uint32_t v) { memcpy(p, &v, 4); }
    static inline void svcdp_store64(void *p, uint64_t v) { memcpy(p, &v, 8); }
    static inline void svcdp_copy128(void *p, const void *q) { memcpy(p, q, 16); }
    #endif
    """
    uint16_t load16 "svcdp_load16"(const void *p)
    uint32_t load32 "svcdp_load32"(const void *p)
    uint64_t load64 "svcdp_load64"(const void *p)
    void store16 "svcdp_store16"(void *p, uint16_t v)
    void store32 "svcdp_store32"(void *p, uint32_t v)
    void store64 "svcdp_store64"(void *p, uint64_t v)
    void copy128 "svcdp_copy128"(void *p, const void *q)
    uint16_t ntohs(uint16_t v)
    uint32_t ntohl(uint32_t v)
    uint16_t htons(uint16_t v)
    uint32_t htonl(uint32_t v)
    uint64_t ntohll "be64toh"(uint64_t v)
    uint64_t htonll "htobe64"(uint64_t v)


# An address is 1 (IPv4) or 4 (IPv6) words of 32 bits, as on the wire.

cdef inline bint same_address(const uint8_t *a, const uint8_t *b, uint32_t words) noexcept nogil:
    if words == 1:
        return load32(a) == load32(b)
    return load64(a) == load64(b) and load64(a + 8) == load64(b + 8)


cdef inline void copy_address(uint8_t *to, const uint8_t *source, uint32_t words) noexcept nogil:
    if words == 1:
        store32(to, load32(source))
    else:
        copy128(to, source)


cdef inline void mask_address(
    uint8_t *to, const uint8_t *source, uint32_t words, uint32_t length
) noexcept nogil:
    """The first `length` bits of an address, then zeros."""
    cdef uint32_t i, bits, mask
    for i in range(words):
        bits = min(length, <uint32_t>32)
        length -= bits
        mask = <uint32_t>(<uint64_t>0xffffffff << (32 - bits))
        store32(to + 4 * i, load32(source + 4 * i) & htonl(mask))
