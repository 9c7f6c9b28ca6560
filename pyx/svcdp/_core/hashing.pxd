# Schedulers that hash addresses: dh sh mh. A client stays where it was, whoever else comes and
# goes, and whatever the connection table forgot.
#
# A member that cannot serve keeps its share: the clients that fall on it find nobody, unless the
# service has the flag for fallback.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.load cimport is_available
from svcdp._core.memory cimport load32, ntohl, ntohs
from svcdp._core.packet cimport View
from svcdp._core.service cimport *
from svcdp._core.siphash cimport siphash13

cdef enum:
    BUCKET_BITS = 8            # of dh and sh
    BUCKETS = 256

cdef enum:
    # Both words of the keys that ip_vs_mh.c hashes with.
    MAGLEV_KEY = 2654435761
    MAGLEV_SKIP_KEY = 2654446892

# Where a client that hashes to an entry goes. Services that agree on it share it.
cdef struct HashTable:
    uint32_t references        # counted under the GIL
    uint32_t size
    uint32_t sharers           # only members before this one have an entry
    uint16_t entries[1]        # `size` of them: indices of members


cdef inline uint32_t fold(const uint8_t *address, uint32_t words) noexcept nogil:
    """An address as one number."""
    cdef uint32_t number = load32(address)
    if words == 4:
        number ^= load32(address + 4) ^ load32(address + 8) ^ load32(address + 12)
    return ntohl(number)


cdef inline uint32_t fold_client(const Service *service, const View *view) noexcept nogil:
    """The client as one number: its address, and its port where the service wants that."""
    cdef uint32_t port = ntohs(view.source_port) if service.scheduler_flags & SCHEDULER_PORT else 0
    return fold(view.source, view.words) + port


cdef inline uint32_t bucket_of(uint32_t number) noexcept nogil:
    """Multiplicative hashing by the golden ratio (Knuth 6.4), as the kernel's hash_32()."""
    return <uint32_t>(number * <uint32_t>0x61C88647) >> (32 - BUCKET_BITS)


cdef inline uint32_t maglev_hash(uint32_t number, uint64_t key) noexcept nogil:
    return <uint32_t>siphash13(key, key, number)


cdef inline int32_t pick_dh(const Service *service, const View *view) noexcept nogil:
    """By the destination address (ip_vs_dh.c): buckets are dealt to the members in turn."""
    cdef uint32_t index = bucket_of(fold(view.destination, view.words)) % service.member_count
    return <int32_t>index if is_available(&service.members[index]) else -1


cdef inline int32_t pick_sh(const Service *service, const View *view) noexcept nogil:
    """By the client (ip_vs_sh.c): each member has as many buckets in a row as weight."""
    cdef const HashTable *table = <const HashTable *>service.state.table
    cdef uint32_t hash = bucket_of(fold_client(service, view))
    cdef uint32_t k
    cdef uint16_t index = table.entries[hash]
    if is_available(&service.members[index]):
        return index
    if service.scheduler_flags & SCHEDULER_FALLBACK:
        for k in range(BUCKETS):
            index = table.entries[(hash + (k + hash) % BUCKETS) % BUCKETS]
            if is_available(&service.members[index]):
                return index
    return -1


cdef inline int32_t pick_mh(const Service *service, const View *view) noexcept nogil:
    """By the client, and with the least disruption when members change (ip_vs_mh.c; Eisenbud
    and others: Maglev, 2016).
    """
    cdef const HashTable *table = <const HashTable *>service.state.table
    cdef uint32_t number = fold_client(service, view)
    cdef uint32_t first, k, i
    cdef uint16_t index
    if table is NULL:
        return -1
    first = maglev_hash(number, MAGLEV_KEY) % table.size
    index = table.entries[first]
    if is_available(&service.members[index]):
        return index
    if service.scheduler_flags & SCHEDULER_FALLBACK:
        for i in range(table.sharers):
            if is_available(&service.members[i]):
                break
        else:
            return -1
        for k in range(table.size):
            index = table.entries[
                maglev_hash(number + (k + first) % table.size, MAGLEV_KEY) % table.size]
            if is_available(&service.members[index]):
                return index
    return -1


cdef HashTable *sh_table(const Service *service) except? NULL
cdef HashTable *mh_table(const Service *service, const Service *before) except? NULL
cdef list entry_ids(const Service *service)
cdef void release_table(HashTable *table) noexcept
