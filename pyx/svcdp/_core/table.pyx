"""The service table, per change: the next snapshot from the last one."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from svcdp._core.service cimport ENGINE_SIP, Dest
from svcdp._core.table cimport *


cdef Snapshot *snapshot_new(uint32_t entries) except NULL:
    """An empty snapshot with shards enough for so many entries."""
    cdef uint32_t shards = 1
    cdef Snapshot *snapshot
    while shards * SHARD_SERVICES < entries:
        shards <<= 1
    snapshot = <Snapshot *>calloc(1, sizeof(Snapshot) + (shards - 1) * sizeof(Shard *))
    if snapshot is NULL:
        raise MemoryError(f"cannot allocate a directory of {shards} shards")
    snapshot.mask = shards - 1
    return snapshot


cdef list port_blocks(uint32_t first, uint32_t last):
    """[(first port, bits)] of the aligned blocks that a range of ports is made of."""
    cdef list blocks = []
    cdef uint32_t size
    while first <= last:
        size = 1 << PORT_BITS if first == 0 else first & -first
        while first + size - 1 > last:
            size >>= 1
        blocks.append((first, PORT_BITS + 1 - int(size).bit_length()))
        first += size
    return blocks


cdef list entries_of(const HashKey *key, Service *service):
    """[(hash, address of the Service, bits)]: what stands in the table for a service."""
    cdef const Dest *target
    cdef list entries
    cdef uint32_t i
    if service.protocol == PROTOCOL_FWMARK:
        blocks = [(0, PORT_BITS)]
    else:
        blocks = port_blocks(service.first_port, service.last_port)
    entries = [
        (
            service_hash(
                key, service.address, service.words, htons(port), length, service.protocol),
            <uintptr_t>service, length,
        )
        for port, length in blocks
    ]
    # A call that a destination begins comes from the service's port: it must have just one.
    if service.engine == ENGINE_SIP and 0 < service.first_port == service.last_port:
        for i in range(service.member_count):
            target = service.members[i].destination
            entries.append((
                service_hash(
                    key, target.address, target.words, target.port, SERVER_BITS,
                    service.protocol),
                <uintptr_t>service, SERVER_BITS))
    return entries


cdef Shard *shard_new(list entries) except? NULL:
    """A shard of these entries, (hash, address of Service); NULL for none."""
    cdef uint32_t size = 2
    cdef uint32_t position
    cdef uint64_t hash, pointer
    cdef Shard *shard
    if not entries:
        return NULL
    while size < 2 * len(entries):
        size <<= 1
    shard = <Shard *>calloc(1, sizeof(Shard) + (size - 1) * sizeof(Entry))
    if shard is NULL:
        raise MemoryError("cannot allocate a shard of the service table")
    shard.mask = size - 1
    for hash, pointer in entries:
        position = <uint32_t>hash & shard.mask
        while shard.entries[position].service is not NULL:
            position = (position + 1) & shard.mask
        shard.entries[position].hash = hash
        shard.entries[position].service = <Service *>pointer
    return shard


cdef list shard_entries(Shard *shard):
    cdef uint32_t i
    if shard is NULL:
        return []
    return [
        (shard.entries[i].hash, <uintptr_t>shard.entries[i].service)
        for i in range(shard.mask + 1) if shard.entries[i].service is not NULL
    ]


cdef set snapshot_services(Snapshot *snapshot):
    """Addresses of all services in it."""
    cdef uint32_t i
    cdef set services = set()
    for i in range(snapshot.mask + 1):
        services.update(pointer for _, pointer in shard_entries(snapshot.shards[i]))
    return services


cdef int count_entries(Snapshot *snapshot, list entries, int sign) except -1:
    """Add what these entries are to the snapshot's counts, or (-1) take it off."""
    cdef Service *service
    cdef uint32_t length
    for _, pointer, length in entries:
        service = <Service *><uintptr_t>pointer
        snapshot.count += sign
        if length == SERVER_BITS:
            snapshot.servers += sign
        elif length < PORT_BITS:
            snapshot.blocks[length] += sign
        elif service.protocol == PROTOCOL_FWMARK:
            snapshot.marks += sign
        elif service.protocol == PROTOCOL_ANY:
            snapshot.networks += sign
            snapshot.prefixes[service.words // 4][service.first_port] += sign
        elif service.protocol == PROTOCOL_TCP and service.first_port == FTP_PORT:
            snapshot.ftps += sign
    return 0


cdef Snapshot *snapshot_next(
    const HashKey *key, Snapshot *old, list added, list removed, list replaced
) except NULL:
    """The snapshot after `old`: without the services in `removed`, with those in `added`
    (addresses of Service). Shards that it no longer shares with `old` are put into `replaced`,
    for the caller to free when no packet can see them any more.
    """
    cdef list new_entries = [
        entry for pointer in added for entry in entries_of(key, <Service *><uintptr_t>pointer)]
    cdef list old_entries = [
        entry for pointer in removed for entry in entries_of(key, <Service *><uintptr_t>pointer)]
    cdef uint32_t count = old.count + <uint32_t>len(new_entries) - <uint32_t>len(old_entries)
    cdef Snapshot *new
    cdef uint32_t i
    cdef dict shards = {}      # number -> list of entries
    cdef list fresh = []
    cdef set gone = set(removed)
    cdef bint grow = count > (old.mask + 1) * SHARD_SERVICES
    new = snapshot_new(2 * count if grow else (old.mask + 1) * SHARD_SERVICES)
    try:
        new.count = old.count
        new.marks = old.marks
        new.ftps = old.ftps
        new.servers = old.servers
        new.networks = old.networks
        memcpy(new.blocks, old.blocks, sizeof(old.blocks))
        memcpy(new.prefixes, old.prefixes, sizeof(old.prefixes))
        count_entries(new, old_entries, -1)
        count_entries(new, new_entries, 1)
        for i in range(PORT_BITS):
            if new.blocks[i]:
                new.lengths |= <uint32_t>1 << i
        if grow:
            shards = {i: [] for i in range(new.mask + 1)}
            for i in range(old.mask + 1):
                for hash, pointer in shard_entries(old.shards[i]):
                    if pointer not in gone:
                        shards[(hash >> 32) & new.mask].append((hash, pointer))
        else:
            for hash, _, _ in new_entries + old_entries:
                i = (hash >> 32) & new.mask
                if i not in shards:
                    shards[i] = [
                        entry for entry in shard_entries(old.shards[i]) if entry[1] not in gone]
            for i in range(new.mask + 1):
                new.shards[i] = old.shards[i]
        for hash, pointer, _ in new_entries:
            shards[(hash >> 32) & new.mask].append((hash, pointer))
        for i, entries in shards.items():
            new.shards[i] = shard_new(entries)
            fresh.append(<uintptr_t>new.shards[i])
    except BaseException:
        for pointer in fresh:
            free(<void *><uintptr_t>pointer)
        free(new)
        raise
    if grow:
        replaced.extend(<uintptr_t>old.shards[i] for i in range(old.mask + 1))
    else:
        replaced.extend(<uintptr_t>old.shards[i] for i in shards)
    return new
