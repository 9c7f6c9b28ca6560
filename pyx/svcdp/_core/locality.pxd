# Schedulers for caches: lblc lblcr. Packets to an address go where those before them went, so that
# a server meets the same addresses again, unless it has too much to do.
#
# For services of many addresses (by firewall mark), as those of transparent proxies are.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from svcdp._core.atomic cimport add_u32, load_u32, spin_lock, spin_unlock
from svcdp._core.hash cimport mix
from svcdp._core.least cimport pick_wlc
from svcdp._core.load cimport active, is_available, is_ejected, less_loaded, overhead
from svcdp._core.memory cimport copy_address, load32, load64, same_address
from svcdp._core.packet cimport View
from svcdp._core.random cimport next_random
from svcdp._core.service cimport Dest, Member, Service

cdef enum:
    LOCALITY_BUCKETS = 1024
    PLACES_MAX = 24576
    PLACES_CROWDED = 16384     # from here on, idle places are given up
    VISITS_MAX = 65536
    BUCKETS_SWEPT = 2          # for each new place


cdef extern from *:
    const int64_t CROWDED_EXPIRATION "INT64_C(360000000000)"   # ns

# svcdp.Settings, in ns: how long a place is kept without a packet, and (lblcr) a set of several
# servers without a change.
cdef struct Expirations:
    int64_t lblc
    int64_t lblcr

# A server that has a place. lblc: the only one. lblcr: one of a set.
cdef struct Visit:
    Dest *destination
    uint32_t member            # its index, when it was last looked for

# What is known of a destination address.
cdef struct Place:
    uint8_t address[16]
    int64_t used               # ns
    int64_t changed            # ns
    uint32_t visits            # the first, the newest
    uint32_t count

# Free elements of an array. Element 0 is never used: it is nobody.
cdef struct Pool:
    uint32_t fresh             # none behind this one was ever used
    uint32_t free

# Outlives a Service for as long as an edited one takes its place.
cdef struct Locality:
    uint32_t references        # counted under the GIL
    uint8_t lock
    uint64_t key[2]            # of the hash of addresses; 0: not drawn yet
    uint32_t swept             # bucket
    uint32_t place_count
    uint32_t buckets[LOCALITY_BUCKETS]
    Pool free_places
    Pool free_visits
    uint32_t next_place[PLACES_MAX + 1]
    uint32_t next_visit[VISITS_MAX + 1]
    Place places[PLACES_MAX + 1]
    Visit visits[VISITS_MAX + 1]


cdef inline uint32_t take(Pool *pool, const uint32_t *following, uint32_t limit) noexcept nogil:
    """An element that was free, or 0."""
    cdef uint32_t index = pool.free
    if index:
        pool.free = following[index]
    elif pool.fresh < limit:
        pool.fresh += 1
        index = pool.fresh
    return index


cdef inline void give_back(Pool *pool, uint32_t *following, uint32_t index) noexcept nogil:
    following[index] = pool.free
    pool.free = index


# -- places, with the lock held --------------------------------------------------------------------

cdef inline void drop_visit(Locality *locality, Place *place, uint32_t *link) noexcept nogil:
    """Remove the visit that `link` names."""
    cdef uint32_t index = link[0]
    link[0] = locality.next_visit[index]
    place.count -= 1
    add_u32(&locality.visits[index].destination.held, <uint32_t>-1)
    give_back(&locality.free_visits, locality.next_visit, index)


cdef inline void add_visit(
    Locality *locality, Place *place, const Service *service, uint32_t member, int64_t now
) noexcept nogil:
    """Unless the member has been there, or there is no room."""
    cdef Dest *destination = service.members[member].destination
    cdef uint32_t index = place.visits
    while index:
        if locality.visits[index].destination == destination:
            return
        index = locality.next_visit[index]
    index = take(&locality.free_visits, locality.next_visit, VISITS_MAX)
    if index:
        locality.visits[index].destination = destination
        locality.visits[index].member = member
        locality.next_visit[index] = place.visits
        place.visits = index
        place.count += 1
        place.changed = now
        add_u32(&destination.held, 1)


cdef inline void drop_place(Locality *locality, uint32_t *link) noexcept nogil:
    """Remove the place that `link` names."""
    cdef uint32_t index = link[0]
    cdef Place *place = &locality.places[index]
    while place.visits:
        drop_visit(locality, place, &place.visits)
    link[0] = locality.next_place[index]
    locality.place_count -= 1
    give_back(&locality.free_places, locality.next_place, index)


cdef inline uint32_t *bucket_of(
    Locality *locality, const uint8_t *address, uint32_t words
) noexcept nogil:
    cdef uint64_t hash
    if words == 1:
        hash = mix(load32(address) ^ locality.key[0], locality.key[1])
    else:
        hash = mix(load64(address) ^ locality.key[0], load64(address + 8) ^ locality.key[1])
    return &locality.buckets[hash % LOCALITY_BUCKETS]


cdef inline Place *find_place(
    Locality *locality, const View *view, int64_t now, int64_t expiration
) noexcept nogil:
    """That of the packet's destination address, or NULL."""
    cdef uint32_t *link = bucket_of(locality, view.destination, view.words)
    cdef Place *place
    while link[0]:
        place = &locality.places[link[0]]
        if same_address(place.address, view.destination, view.words):
            if now - place.used < expiration:
                return place
            drop_place(locality, link)
            return NULL
        link = &locality.next_place[link[0]]
    return NULL


cdef inline void sweep_places(
    Locality *locality, int64_t now, int64_t expiration
) noexcept nogil:
    """Drop what has expired from the bucket whose turn it is."""
    cdef uint32_t *link = &locality.buckets[locality.swept]
    if locality.place_count > PLACES_CROWDED:
        expiration = min(expiration, CROWDED_EXPIRATION)
    locality.swept = (locality.swept + 1) % LOCALITY_BUCKETS
    while link[0]:
        if now - locality.places[link[0]].used >= expiration:
            drop_place(locality, link)
        else:
            link = &locality.next_place[link[0]]


cdef inline Place *new_place(
    Locality *locality, const View *view, int64_t now, int64_t expiration, uint64_t *random
) noexcept nogil:
    """A place for the packet's destination address, or NULL when there is no room."""
    cdef uint32_t *bucket
    cdef uint32_t index, _
    cdef Place *place
    if locality.key[0] == 0:
        # Unknown to those who send packets, so that they cannot fill one bucket.
        locality.key[0] = next_random(random) | 1
        locality.key[1] = next_random(random) | 1
    for _ in range(BUCKETS_SWEPT):
        sweep_places(locality, now, expiration)
    index = take(&locality.free_places, locality.next_place, PLACES_MAX)
    if index == 0:
        return NULL
    bucket = bucket_of(locality, view.destination, view.words)
    locality.next_place[index] = bucket[0]
    bucket[0] = index
    locality.place_count += 1
    place = &locality.places[index]
    copy_address(place.address, view.destination, view.words)
    place.used = now
    place.visits = place.count = 0
    return place


# -- picks -----------------------------------------------------------------------------------------

cdef inline int32_t member_of(const Service *service, Visit *visit) noexcept nogil:
    """The index of the visit's server among the members, or -1."""
    cdef uint32_t i
    if (
        visit.member < service.member_count
        and service.members[visit.member].destination == visit.destination
    ):
        return <int32_t>visit.member
    for i in range(service.member_count):
        if service.members[i].destination == visit.destination:
            visit.member = i
            return <int32_t>i
    return -1


cdef inline bint is_hot(const Service *service, const Member *member) noexcept nogil:
    """It has more to do than its weight, while somebody has less than half of that."""
    cdef uint32_t i
    if active(member.destination) > member.weight:
        for i in range(service.member_count):
            if <uint64_t>active(service.members[i].destination) * 2 < service.members[i].weight:
                return True
    return False


cdef inline int32_t server_of(
    const Service *service, const View *view, int64_t now, int64_t expiration, bint visit
) noexcept nogil:
    """lblc: who has the packet's address and may serve it, or -1. `visit`: the packet is there."""
    cdef Locality *locality = <Locality *>service.state.locality
    cdef Place *place
    cdef int32_t member = -1
    spin_lock(&locality.lock)
    place = find_place(locality, view, now, expiration)
    if place is not NULL:
        if visit:
            place.used = now
        if place.visits:
            member = member_of(service, &locality.visits[place.visits])
    spin_unlock(&locality.lock)
    if (
        member >= 0
        and service.members[member].weight
        and not is_ejected(service.members[member].destination)
        and not is_hot(service, &service.members[member])
    ):
        return member
    return -1


cdef inline int32_t pick_lblc(
    const Service *service, const View *view, int64_t now, int64_t expiration, uint64_t *random
) noexcept nogil:
    """Locality-based least connection (ip_vs_lblc.c): the address's server, else the least loaded
    one. That the server is overloaded does not matter for packets that it already gets; that it is
    ejected does.
    """
    cdef Locality *locality = <Locality *>service.state.locality
    cdef Place *place
    cdef int32_t member = server_of(service, view, now, expiration, True)
    if member >= 0:
        return member
    member = pick_wlc(service)
    if member < 0:
        return -1
    spin_lock(&locality.lock)
    place = find_place(locality, view, now, expiration)
    if place is NULL:
        place = new_place(locality, view, now, expiration, random)
    if place is not NULL:
        while place.visits:
            drop_visit(locality, place, &place.visits)
        add_visit(locality, place, service, <uint32_t>member, now)
    spin_unlock(&locality.lock)
    return member


cdef inline int32_t least_visited(
    Locality *locality, const Place *place, const Service *service
) noexcept nogil:
    """As pick_wlc, among the servers that have the place."""
    cdef const Member *member
    cdef int32_t index, result = -1
    cdef uint64_t load, least = 0
    cdef uint32_t visit = place.visits
    cdef uint32_t weight = 0
    while visit:
        index = member_of(service, &locality.visits[visit])
        visit = locality.next_visit[visit]
        if index < 0 or not is_available(&service.members[index]):
            continue
        member = &service.members[index]
        load = overhead(member.destination)
        if result < 0 or less_loaded(load, member.weight, least, weight):
            result = index
            least = load
            weight = member.weight
    return result


cdef inline void drop_most_loaded(
    Locality *locality, Place *place, int64_t now
) noexcept nogil:
    """Take the place from the server with most to do, be it in the service still or not."""
    cdef const Dest *target
    cdef uint64_t load, most = 0
    cdef uint32_t target_weight, weight = 0
    cdef uint32_t *link = &place.visits
    cdef uint32_t *worst = NULL
    while link[0]:
        target = locality.visits[link[0]].destination
        target_weight = load_u32(&target.weight)
        if target_weight:
            load = overhead(target)
            if worst is NULL or less_loaded(most, weight, load, target_weight):
                worst = link
                most = load
                weight = target_weight
        link = &locality.next_visit[link[0]]
    if worst is not NULL:
        drop_visit(locality, place, worst)
        place.changed = now


cdef inline int32_t server_among(
    const Service *service, const View *view, int64_t now, int64_t expiration, bint visit
) noexcept nogil:
    """lblcr: the least loaded of those who have the packet's address, or -1. `visit`: the packet is
    there.
    """
    cdef Locality *locality = <Locality *>service.state.locality
    cdef Place *place
    cdef int32_t member = -1
    spin_lock(&locality.lock)
    place = find_place(locality, view, now, expiration)
    if place is not NULL:
        member = least_visited(locality, place, service)
        if visit:
            place.used = now
            if place.count > 1 and now - place.changed > expiration:
                drop_most_loaded(locality, place, now)
    spin_unlock(&locality.lock)
    if member >= 0 and not is_hot(service, &service.members[member]):
        return member
    return -1


cdef inline int32_t pick_lblcr(
    const Service *service, const View *view, int64_t now, int64_t expiration, uint64_t *random
) noexcept nogil:
    """Locality-based least connection with replication (ip_vs_lblcr.c): the least loaded of the
    address's servers. When that is not enough, the address gets another one; after a long time
    without a change, one less.
    """
    cdef Locality *locality = <Locality *>service.state.locality
    cdef Place *place
    cdef int32_t member = server_among(service, view, now, expiration, True)
    if member >= 0:
        return member
    member = pick_wlc(service)
    if member < 0:
        return -1
    spin_lock(&locality.lock)
    place = find_place(locality, view, now, expiration)
    if place is NULL:
        place = new_place(locality, view, now, expiration, random)
    if place is not NULL:
        add_visit(locality, place, service, <uint32_t>member, now)
    spin_unlock(&locality.lock)
    return member


cdef Locality *new_locality() except NULL
cdef void release_locality(Locality *locality) noexcept
