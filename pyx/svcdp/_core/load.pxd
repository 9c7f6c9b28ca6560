# What schedulers ask of the members of a service: who may be picked, and how loaded they are.
from libc.stdint cimport int32_t, uint32_t, uint64_t

from svcdp._core.atomic cimport load_i32, load_u8
from svcdp._core.service cimport EJECTED, Dest, Member, Service

cdef extern from * nogil:
    """
    #ifndef SVCDP_LOAD_H
    #define SVCDP_LOAD_H
    #include <stdint.h>
    /* load / weight < load2 / weight2; a load has up to 37 bits and a weight 31. */
    static inline int svcdp_less_loaded(
        uint64_t load, uint32_t weight, uint64_t load2, uint32_t weight2)
    {
        return (unsigned __int128)load * weight2 < (unsigned __int128)load2 * weight;
    }
    #endif
    """
    bint less_loaded "svcdp_less_loaded"(
        uint64_t load, uint32_t weight, uint64_t load2, uint32_t weight2)


cdef inline bint is_ejected(const Dest *target) noexcept nogil:
    """Whether it is passed over because it did not answer: see passive.pxd."""
    return load_u8(&target.unavailable) & EJECTED


cdef inline bint is_available(const Member *member) noexcept nogil:
    return member.weight and not load_u8(&member.destination.unavailable)


cdef inline uint32_t active(const Dest *target) noexcept nogil:
    """Active connections. Threads count side by side: for a moment it can be below 0."""
    cdef int32_t count = load_i32(&target.active)
    return count if count > 0 else 0


cdef inline uint64_t overhead(const Dest *target) noexcept nogil:
    """The load of lc and wlc: a connection is 1, an active one 256 more (ip_vs.h)."""
    cdef int32_t inactive = load_i32(&target.inactive)
    return <uint64_t>active(target) * 257 + (inactive if inactive > 0 else 0)


cdef inline uint64_t available_weight(const Service *service) noexcept nogil:
    """The sum of the weights of those that may be picked."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(service.member_count):
        if is_available(&service.members[i]):
            total += service.members[i].weight
    return total


cdef inline int32_t member_at(const Service *service, uint64_t sum) noexcept nogil:
    """The member with which the weights of those that may be picked reach a sum, or -1."""
    cdef uint32_t i
    for i in range(service.member_count):
        if is_available(&service.members[i]):
            if sum <= service.members[i].weight:
                return <int32_t>i
            sum -= service.members[i].weight
    return -1
