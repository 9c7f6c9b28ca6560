# Schedulers: which destination gets a new connection.
#
# Each picks a member of a service, by index, or -1 for nobody. Members stand in the kernel's
# order, the newest first, so that the sequence of picks is IPVS's. Here: the dispatch, round
# robins (ip_vs_rr.c, ip_vs_wrr.c) and random choice. Others: least.pxd, hashing.pxd, locality.pxd.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from svcdp._core.atomic cimport likely, unlikely, spin_lock, spin_unlock
from svcdp._core.hashing cimport pick_dh, pick_mh, pick_sh
from svcdp._core.least cimport pick_heaviest, pick_lc, pick_sed, pick_twos, pick_wlc
from svcdp._core.load cimport available_weight, is_available, member_at
from svcdp._core.locality cimport (
    Expirations, pick_lblc, pick_lblcr, server_among, server_of,
)
from svcdp._core.packet cimport View
from svcdp._core.random cimport next_random
from svcdp._core.service cimport Member, SchedState, Service

cdef enum:
    SCHEDULER_RR = 0
    SCHEDULER_WRR = 1
    SCHEDULER_RANDOM = 2
    SCHEDULER_PYTHON = 3
    SCHEDULER_LC = 4
    SCHEDULER_WLC = 5
    SCHEDULER_SED = 6
    SCHEDULER_NQ = 7
    SCHEDULER_FO = 8
    SCHEDULER_OVF = 9
    SCHEDULER_DH = 10
    SCHEDULER_SH = 11
    SCHEDULER_MH = 12
    SCHEDULER_LBLC = 13
    SCHEDULER_LBLCR = 14
    SCHEDULER_TWOS = 15
    SCHEDULER_NONE = 16

    UNFORESEEN = -2


cdef inline int32_t pick_rr(Service *service) noexcept nogil:
    """The next member that is available, around the list."""
    cdef SchedState *state = &service.state
    cdef int32_t position, result = -1
    cdef uint32_t _
    spin_lock(&state.lock)
    position = state.position
    for _ in range(service.member_count):
        position += 1
        if position == <int32_t>service.member_count:
            position = 0
        if is_available(&service.members[position]):
            state.position = result = position
            break
    spin_unlock(&state.lock)
    return result


cdef inline int32_t heavy_member(
    const Service *service, int32_t position, int64_t level
) noexcept nogil:
    """The first available member from the position on of at least that weight, or -1."""
    cdef int32_t i
    for i in range(position, <int32_t>service.member_count):
        if service.members[i].weight >= level and is_available(&service.members[i]):
            return i
    return -1


cdef inline int64_t heaviest_available(const Service *service) noexcept nogil:
    cdef int64_t weight = 0
    cdef uint32_t i
    for i in range(service.member_count):
        if service.members[i].weight > weight and is_available(&service.members[i]):
            weight = service.members[i].weight
    return weight


cdef inline int32_t pick_wrr(Service *service) noexcept nogil:
    """Rounds at sinking levels; at each, every member of at least that weight once."""
    cdef SchedState *state = &service.state
    cdef int32_t result = -1
    cdef int64_t level, step, excess
    spin_lock(&state.lock)
    if state.weight_max > 0:
        level = state.weight
        step = state.weight_step
        result = heavy_member(service, state.position + 1, level)
        if result < 0:
            level = level - step if level > step else state.weight_max
            result = heavy_member(service, 0, level)
        if unlikely(result < 0):
            # Who is heavy enough is overloaded: down to the first level where somebody is not.
            excess = level - heaviest_available(service)
            level -= (excess + step - 1) // step * step
            result = heavy_member(service, 0, level)
        if likely(result >= 0):
            state.position = result
            state.weight = level
        elif state.position < 0 or state.weight > step:
            # Where the kernel's walk ends when it has seen everybody at the lowest level.
            state.position = -1
            state.weight = state.weight_max
    spin_unlock(&state.lock)
    return result


cdef inline int32_t pick_random(Service *service, uint64_t *random) noexcept nogil:
    """Any member, by weight."""
    cdef uint64_t ticket, total
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
    if likely(is_available(&service.members[low])):
        return <int32_t>low
    total = available_weight(service)
    return member_at(service, next_random(random) % total + 1) if total else -1


cdef inline int32_t pick_other(
    Service *service, const View *view, int64_t now, const Expirations *expirations,
    uint64_t *random
) noexcept nogil:
    """By any scheduler but rr."""
    cdef uint8_t scheduler = service.scheduler
    if service.member_count == 0:
        return -1
    if scheduler == SCHEDULER_WRR:
        return pick_wrr(service)
    if scheduler == SCHEDULER_RANDOM:
        return pick_random(service, random)
    if scheduler == SCHEDULER_LC:
        return pick_lc(service)
    if scheduler == SCHEDULER_WLC:
        return pick_wlc(service)
    if scheduler == SCHEDULER_SED or scheduler == SCHEDULER_NQ:
        return pick_sed(service, scheduler == SCHEDULER_NQ)
    if scheduler == SCHEDULER_FO or scheduler == SCHEDULER_OVF:
        return pick_heaviest(service, scheduler == SCHEDULER_OVF)
    if scheduler == SCHEDULER_DH:
        return pick_dh(service, view)
    if scheduler == SCHEDULER_SH:
        return pick_sh(service, view)
    if scheduler == SCHEDULER_MH:
        return pick_mh(service, view)
    if scheduler == SCHEDULER_LBLC:
        return pick_lblc(service, view, now, expirations.lblc, random)
    if scheduler == SCHEDULER_LBLCR:
        return pick_lblcr(service, view, now, expirations.lblcr, random)
    if scheduler == SCHEDULER_TWOS:
        return pick_twos(service, random)
    return -1


cdef inline int32_t pick(
    Service *service, const View *view, int64_t now, const Expirations *expirations,
    uint64_t *random
) noexcept nogil:
    """For the schedulers of the core; SCHEDULER_PYTHON is asked by the engine."""
    if service.scheduler == SCHEDULER_RR:
        return pick_rr(service)
    return pick_other(service, view, now, expirations, random)


cdef inline int32_t foresee(
    Service *service, const View *view, int64_t now, const Expirations *expirations
) noexcept nogil:
    """What pick() would give now, where that can be told without a change; else UNFORESEEN."""
    cdef uint8_t scheduler = service.scheduler
    cdef int32_t member
    if SCHEDULER_LC <= scheduler <= SCHEDULER_MH:
        return pick(service, view, now, expirations, NULL)
    if scheduler == SCHEDULER_LBLC or scheduler == SCHEDULER_LBLCR:
        member = (
            server_of(service, view, now, expirations.lblc, False)
            if scheduler == SCHEDULER_LBLC
            else server_among(service, view, now, expirations.lblcr, False))
        return member if member >= 0 else pick_wlc(service)
    return UNFORESEEN


cdef int advance(Service *service, list edits, Service *before) except -1
cdef int advance_subsets(Service *service, list edits, Service *before) except -1
cdef void forget(Service *service) noexcept
