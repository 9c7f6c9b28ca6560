# Schedulers: which destination gets a new connection.
#
# Each picks a member of a service, by index, or -1 for nobody. Members stand in the kernel's
# order: the newest first, so that the sequence of picks is IPVS's (ip_vs_rr.c, ip_vs_wrr.c).
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from svcdp._core.atomic cimport spin_lock, spin_unlock
from svcdp._core.service cimport Member, SchedState, Service

cdef enum:
    SCHEDULER_RR = 0
    SCHEDULER_WRR = 1
    SCHEDULER_RANDOM = 2
    SCHEDULER_PYTHON = 3


cdef inline uint64_t next_random(uint64_t *state) noexcept nogil:
    """splitmix64 (Steele, Lea, Flood 2014): fast, and good enough to balance."""
    cdef uint64_t z
    state[0] += <uint64_t>0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline int32_t pick_rr(Service *service) noexcept nogil:
    """The next member with a weight, around the list."""
    cdef SchedState *state = &service.state
    cdef int32_t position, result = -1
    cdef uint32_t _
    spin_lock(&state.lock)
    position = state.position
    for _ in range(service.member_count):
        position += 1
        if position == <int32_t>service.member_count:
            position = 0
        if service.members[position].weight:
            state.position = result = position
            break
    spin_unlock(&state.lock)
    return result


cdef inline int32_t pick_wrr(Service *service) noexcept nogil:
    """Rounds at sinking levels; at each, every member of at least that weight once."""
    cdef SchedState *state = &service.state
    cdef int32_t result = -1
    cdef int32_t position
    spin_lock(&state.lock)
    if state.weight_max > 0:
        position = state.position
        while True:
            position += 1
            if position == <int32_t>service.member_count:
                position = 0
                state.weight -= state.weight_step
                if state.weight <= 0:
                    state.weight = state.weight_max
            # Ends: the heaviest member is at least as heavy as the top level.
            if service.members[position].weight >= state.weight:
                state.position = result = position
                break
    spin_unlock(&state.lock)
    return result


cdef inline int32_t pick_random(Service *service, uint64_t *random) noexcept nogil:
    """Any member, by weight."""
    cdef uint64_t ticket
    cdef uint32_t low = 0, high = service.member_count, middle
    if service.weight_total == 0:
        return -1
    ticket = next_random(random) % service.weight_total
    while high - low > 1:
        middle = (low + high) // 2
        if service.members[middle].weight_below <= ticket:
            low = middle
        else:
            high = middle
    return <int32_t>low


cdef inline int32_t pick(Service *service, uint64_t *random) noexcept nogil:
    """For the schedulers of the core; SCHEDULER_PYTHON is asked by the engine."""
    if service.member_count == 0:
        return -1
    if service.scheduler == SCHEDULER_RR:
        return pick_rr(service)
    if service.scheduler == SCHEDULER_WRR:
        return pick_wrr(service)
    return pick_random(service, random)


cdef int advance(Service *service, list edits, Service *before) except -1
