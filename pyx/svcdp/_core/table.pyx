"""The service table, per change: the next snapshot from the last one."""

from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport calloc, free

from svcdp._core.table cimport *


cdef Snapshot *snapshot_new(uint32_t services) except NULL:
    """An empty snapshot with shards enough for so many services."""
    cdef uint32_t shards = 1
    cdef Snapshot *snapshot
    while shards * SHARD_SERVICES < services:
        shards <<= 1
    snapshot = <Snapshot *>calloc(1, sizeof(Snapshot) + (shards - 1) * sizeof(Shard *))
    if snapshot is NULL:
        raise MemoryError(f"cannot allocate a directory of {shards} shards")
    snapshot.mask = shards - 1
    return snapshot


cdef Shard *shard_new(list services) except? NULL:
    """A shard of these services (addresses of Service); NULL for none."""
    cdef uint32_t size = 2
    cdef uint32_t position
    cdef Service *service
    cdef Shard *shard
    if not services:
        return NULL
    while size < 2 * len(services):
        size <<= 1
    shard = <Shard *>calloc(1, sizeof(Shard) + (size - 1) * sizeof(Entry))
    if shard is NULL:
        raise MemoryError("cannot allocate a shard of the service table")
    shard.mask = size - 1
    for pointer in services:
        service = <Service *><uintptr_t>pointer
        position = <uint32_t>service.hash & shard.mask
        while shard.entries[position].service is not NULL:
            position = (position + 1) & shard.mask
        shard.entries[position].hash = service.hash
        shard.entries[position].service = service
    return shard


cdef list shard_services(Shard *shard):
    cdef uint32_t i
    if shard is NULL:
        return []
    return [
        <uintptr_t>shard.entries[i].service
        for i in range(shard.mask + 1) if shard.entries[i].service is not NULL
    ]


cdef list snapshot_services(Snapshot *snapshot):
    """Addresses of all services in it."""
    cdef uint32_t i
    cdef list services = []
    for i in range(snapshot.mask + 1):
        services += shard_services(snapshot.shards[i])
    return services


cdef Snapshot *snapshot_next(Snapshot *old, list added, list removed, list replaced) except NULL:
    """The snapshot after `old`: without the services in `removed`, with those in `added`
    (addresses of Service). Shards that it no longer shares with `old` are put into `replaced`,
    for the caller to free when no packet can see them any more.
    """
    cdef uint32_t count = old.count + <uint32_t>len(added) - <uint32_t>len(removed)
    cdef Snapshot *new
    cdef Service *service
    cdef uint32_t i
    cdef dict shards = {}      # number -> list of services
    cdef list fresh = []
    cdef set gone = set(removed)
    cdef bint grow = count > (old.mask + 1) * SHARD_SERVICES
    new = snapshot_new(2 * count if grow else (old.mask + 1) * SHARD_SERVICES)
    try:
        new.count = count
        if grow:
            shards = {i: [] for i in range(new.mask + 1)}
            for pointer in snapshot_services(old):
                if pointer not in gone:
                    service = <Service *><uintptr_t>pointer
                    shards[(service.hash >> 32) & new.mask].append(pointer)
        else:
            for pointer in added + removed:
                service = <Service *><uintptr_t>pointer
                i = (service.hash >> 32) & new.mask
                if i not in shards:
                    shards[i] = [p for p in shard_services(old.shards[i]) if p not in gone]
            for i in range(new.mask + 1):
                new.shards[i] = old.shards[i]
        for pointer in added:
            service = <Service *><uintptr_t>pointer
            shards[(service.hash >> 32) & new.mask].append(pointer)
        for i, services in shards.items():
            new.shards[i] = shard_new(services)
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
