# The service table: (address, protocol, port) -> Service.
#
# A snapshot never changes. It is a directory of small hash shards; an update copies the directory
# and the shards that it touches, so its cost follows the change, and packets see all of it or
# nothing.
#
# A range of ports stands in the table as the aligned blocks that it is made of, as prefixes of
# 0 to 16 bits: 16 is one port, 0 every port. The longest prefix wins.
#
# Services of networks stand beside these, by address and bits of the prefix, and get what no other
# service does.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.atomic cimport unlikely
from svcdp._core.hash cimport HashKey, hash_flow
from svcdp._core.memory cimport htonl, htons, mask_address, ntohs, same_address, store32
from svcdp._core.packet cimport PROTOCOL_TCP
from svcdp._core.service cimport Dest, Service

cdef enum:
    SHARD_SERVICES = 8         # on average
    PORT_BITS = 16
    SERVER_BITS = 17           # of the address and port of a destination that may begin
    PROTOCOL_FWMARK = 0        # Service.protocol
    PROTOCOL_ANY = 255         # Service.protocol of a network's: its port is the prefix, bits
    PREFIX_MAX = 128
    FTP_PORT = 21
    FTP_DATA_PORT = 20
    UNPRIVILEGED_PORT = 1024   # the first

cdef struct Entry:
    uint64_t hash
    Service *service           # NULL: empty

cdef struct Shard:
    uint32_t mask
    Entry entries[1]           # mask + 1 of them, at most half full

cdef struct Snapshot:
    uint32_t mask              # shards - 1
    uint32_t count             # entries
    uint32_t lengths           # bit n: there are prefixes of n < 16 bits
    uint32_t marks             # fwmark services
    uint32_t ftps              # TCP services of port 21
    uint32_t servers           # destinations that may begin connections
    uint32_t networks          # services of networks
    uint32_t prefixes[2][PREFIX_MAX + 1]   # of these, by IP family and bits
    uint32_t blocks[PORT_BITS]     # entries with a prefix of so many bits
    Shard *shards[1]           # mask + 1 of them; NULL: empty


cdef inline uint64_t service_hash(
    const HashKey *key, const uint8_t *address, uint32_t words, uint16_t port, uint32_t length,
    uint8_t protocol
) noexcept nogil:
    """`port` in wire order: the first of its block, which is a prefix of `length` bits."""
    return hash_flow(key, words, address, address, port, <uint16_t>length, protocol)


cdef inline Shard *shard_of(const Snapshot *snapshot, uint64_t hash) noexcept nogil:
    return snapshot.shards[(hash >> 32) & snapshot.mask]


cdef inline Service *block_find(
    const HashKey *key, const Snapshot *snapshot, const uint8_t *address, uint32_t words,
    uint16_t port, uint32_t length, uint8_t protocol
) noexcept nogil:
    """The service that has this block of ports (`port` in wire order) as a whole, or NULL."""
    cdef uint64_t hash = service_hash(key, address, words, port, length, protocol)
    cdef const Shard *shard = shard_of(snapshot, hash)
    cdef const Entry *entry
    cdef const Service *service
    cdef uint32_t first = ntohs(port)
    cdef uint32_t last = first + (0xffff >> length)
    cdef uint32_t position
    if shard is NULL:
        return NULL
    position = <uint32_t>hash & shard.mask
    while True:
        entry = &shard.entries[position]
        service = entry.service
        if service is NULL:
            return NULL
        if (
            entry.hash == hash
            and service.first_port <= first and last <= service.last_port
            and service.protocol == protocol
            and service.words == words
            and same_address(service.address, address, words)
        ):
            return entry.service
        position = (position + 1) & shard.mask


cdef inline Service *server_find(
    const HashKey *key, const Snapshot *snapshot, const uint8_t *address, uint32_t words,
    uint16_t port, uint8_t protocol, Dest **server
) noexcept nogil:
    """The service of which this is the address and port of a destination that may begin
    connections (its first one, if there are several), or NULL.
    """
    cdef uint64_t hash = service_hash(key, address, words, port, SERVER_BITS, protocol)
    cdef const Shard *shard = shard_of(snapshot, hash)
    cdef const Entry *entry
    cdef Dest *target
    cdef uint32_t position, i
    if shard is NULL:
        return NULL
    position = <uint32_t>hash & shard.mask
    while shard.entries[position].service is not NULL:
        entry = &shard.entries[position]
        if entry.hash == hash and entry.service.words == words:
            for i in range(entry.service.member_count):
                target = entry.service.members[i].destination
                if (
                    target.port == port and target.words == words
                    and same_address(target.address, address, words)
                ):
                    server[0] = target
                    return entry.service
        position = (position + 1) & shard.mask
    return NULL


cdef inline Service *network_find(
    const HashKey *key, const Snapshot *snapshot, const uint8_t *address, uint32_t words
) noexcept nogil:
    """The service of the smallest network that holds the address, or NULL."""
    cdef const uint32_t *counts = snapshot.prefixes[words // 4]
    cdef uint8_t masked[16]
    cdef Service *service
    cdef int length
    for length in range(32 * words, -1, -1):
        if counts[length]:
            mask_address(masked, address, words, length)
            service = block_find(
                key, snapshot, masked, words, htons(<uint16_t>length), PORT_BITS, PROTOCOL_ANY)
            if service is not NULL:
                return service
    return NULL


cdef inline Service *wide_find(
    const HashKey *key, const Snapshot *snapshot, const uint8_t *address, uint32_t words,
    uint16_t port, uint8_t protocol
) noexcept nogil:
    """The service with a range that holds the port, else a persistent one of FTP for what may be
    its data connections (ip_vs_ctl.c, ip_vs_service_find), else that of every port, else of a
    network; or NULL.
    """
    cdef uint32_t host = ntohs(port)
    cdef int length
    cdef Service *service
    for length in range(PORT_BITS - 1, -1, -1):
        if length == 0 and snapshot.ftps and protocol == PROTOCOL_TCP and (
            host == FTP_DATA_PORT or host >= UNPRIVILEGED_PORT
        ):
            service = block_find(
                key, snapshot, address, words, htons(FTP_PORT), PORT_BITS, protocol)
            if service is not NULL and service.persistence:
                return service
        if snapshot.lengths >> length & 1:
            service = block_find(
                key, snapshot, address, words, htons(<uint16_t>(host & ~(0xffff >> length))),
                <uint32_t>length, protocol)
            if service is not NULL:
                return service
    return network_find(key, snapshot, address, words) if snapshot.networks else NULL


cdef inline void mark_address(uint8_t *address, uint32_t mark) noexcept nogil:
    """What stands for an address (16 bytes) in the key of a fwmark service."""
    cdef uint32_t i
    store32(address, htonl(mark))
    for i in range(4, 16, 4):
        store32(address + i, 0)


cdef inline Service *table_find(
    const HashKey *key, const Snapshot *snapshot, const uint8_t *address, uint32_t words,
    uint16_t port, uint8_t protocol, uint32_t mark
) noexcept nogil:
    """The service of a packet to this address and port (wire order) with this mark, or NULL."""
    cdef uint8_t marked[16]
    cdef Service *service
    if unlikely(snapshot.marks and mark):
        mark_address(marked, mark)
        service = block_find(key, snapshot, marked, words, 0, PORT_BITS, PROTOCOL_FWMARK)
        if service is not NULL:
            return service
    service = block_find(key, snapshot, address, words, port, PORT_BITS, protocol)
    if service is NULL and unlikely(snapshot.lengths | snapshot.ftps | snapshot.networks):
        service = wide_find(key, snapshot, address, words, port, protocol)
    return service


cdef Snapshot *snapshot_new(uint32_t entries) except NULL
cdef set snapshot_services(Snapshot *snapshot)
cdef Snapshot *snapshot_next(
    const HashKey *key, Snapshot *old, list added, list removed, list replaced
) except NULL
