# The service table: (address, protocol, port) -> Service.
#
# A snapshot never changes. It is a directory of small hash shards; an update copies the directory
# and the shards that it touches, so its cost follows the change, and packets see all of it or
# nothing.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.hash cimport HashKey, hash_flow
from svcdp._core.memory cimport same_address
from svcdp._core.service cimport Service

cdef enum:
    SHARD_SERVICES = 8         # on average

cdef struct Entry:
    uint64_t hash
    Service *service           # NULL: empty

cdef struct Shard:
    uint32_t mask
    Entry entries[1]           # mask + 1 of them, at most half full

cdef struct Snapshot:
    uint32_t mask              # shards - 1
    uint32_t count             # services
    Shard *shards[1]           # mask + 1 of them; NULL: empty


cdef inline uint64_t service_hash(
    const HashKey *key, const uint8_t *address, uint32_t words, uint16_t port, uint8_t protocol
) noexcept nogil:
    return hash_flow(key, words, address, address, port, port, protocol)


cdef inline Service *shard_find(
    const Shard *shard, uint64_t hash, const uint8_t *address, uint32_t words, uint16_t port,
    uint8_t protocol
) noexcept nogil:
    cdef uint32_t position
    cdef const Entry *entry
    if shard is NULL:
        return NULL
    position = <uint32_t>hash & shard.mask
    while True:
        entry = &shard.entries[position]
        if entry.service is NULL:
            return NULL
        if (
            entry.hash == hash
            and entry.service.port == port
            and entry.service.protocol == protocol
            and entry.service.words == words
            and same_address(entry.service.address, address, words)
        ):
            return entry.service
        position = (position + 1) & shard.mask


cdef inline Shard *shard_of(const Snapshot *snapshot, uint64_t hash) noexcept nogil:
    return snapshot.shards[(hash >> 32) & snapshot.mask]


cdef Snapshot *snapshot_new(uint32_t services) except NULL
cdef list snapshot_services(Snapshot *snapshot)
cdef Snapshot *snapshot_next(
    Snapshot *old, list added, list removed, list replaced
) except NULL
