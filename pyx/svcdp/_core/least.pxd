# Schedulers that look at loads and weights: lc wlc sed nq fo ovf twos.
#
# Each is one walk over the members, head first. Ties go to the earlier one.
from libc.stdint cimport int32_t, uint32_t, uint64_t

from svcdp._core.load cimport (
    active, available_weight, is_available, less_loaded, member_at, overhead,
)
from svcdp._core.random cimport next_random
from svcdp._core.service cimport Member, Service


cdef inline int32_t pick_lc(const Service *service) noexcept nogil:
    """Least connections, whatever the weights (ip_vs_lc.c)."""
    cdef int32_t result = -1
    cdef uint64_t load, least = 0
    cdef uint32_t i
    for i in range(service.member_count):
        if is_available(&service.members[i]):
            load = overhead(service.members[i].destination)
            if result < 0 or load < least:
                result = <int32_t>i
                least = load
    return result


cdef inline int32_t pick_wlc(const Service *service) noexcept nogil:
    """Least connections by weight (ip_vs_wlc.c)."""
    cdef const Member *member
    cdef int32_t result = -1
    cdef uint64_t load, least = 0
    cdef uint32_t i, weight = 0
    for i in range(service.member_count):
        member = &service.members[i]
        if is_available(member):
            load = overhead(member.destination)
            if result < 0 or less_loaded(load, member.weight, least, weight):
                result = <int32_t>i
                least = load
                weight = member.weight
    return result


cdef inline int32_t pick_sed(const Service *service, bint never_queue) noexcept nogil:
    """Shortest expected delay: least active connections by weight, the new one included
    (ip_vs_sed.c); with `never_queue`, the first idle member at once (ip_vs_nq.c).
    """
    cdef const Member *member
    cdef int32_t result = -1
    cdef uint64_t load, least = 0
    cdef uint32_t i, weight = 0
    for i in range(service.member_count):
        member = &service.members[i]
        if is_available(member):
            load = <uint64_t>active(member.destination) + 1
            if never_queue and load == 1:
                return <int32_t>i
            if result < 0 or less_loaded(load, member.weight, least, weight):
                result = <int32_t>i
                least = load
                weight = member.weight
    return result


cdef inline int32_t pick_heaviest(const Service *service, bint overflow) noexcept nogil:
    """The heaviest member (ip_vs_fo.c); with `overflow`, of those that have no more active
    connections than weight (ip_vs_ovf.c).
    """
    cdef const Member *member
    cdef int32_t result = -1
    cdef uint32_t i, weight = 0
    for i in range(service.member_count):
        member = &service.members[i]
        if (
            member.weight > weight
            and is_available(member)
            and not (overflow and active(member.destination) > member.weight)
        ):
            result = <int32_t>i
            weight = member.weight
    return result


cdef inline int32_t pick_twos(const Service *service, uint64_t *random) noexcept nogil:
    """The less loaded of two random members (ip_vs_twos.c; Mitzenmacher 2001)."""
    cdef const Member *one
    cdef const Member *two
    cdef int32_t first, second
    cdef uint64_t total = available_weight(service)
    if total == 0:
        return -1
    # From 0 to the total, both included: 0 is the first member's too, as in the kernel.
    first = member_at(service, next_random(random) % (total + 1))
    second = member_at(service, next_random(random) % (total + 1))
    if first < 0 or second < 0:
        return max(first, second)
    one = &service.members[first]
    two = &service.members[second]
    return second if less_loaded(
        overhead(two.destination), two.weight, overhead(one.destination), one.weight
    ) else first
