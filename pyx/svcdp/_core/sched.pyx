"""Schedulers, per change: what they remember, carried over an edit."""

from math import gcd

from libc.stdint cimport uint32_t

from svcdp._core.atomic cimport spin_lock, spin_unlock
from svcdp._core.hashing cimport HashTable, mh_table, release_table, sh_table
from svcdp._core.locality cimport Locality, new_locality, release_locality
from svcdp._core.sched cimport *


cdef tuple extremes(list members):
    """The greatest common divisor of the weights, and the greatest weight."""
    cdef list weights = [entry[1] for entry in members]
    return gcd(*weights), max(weights, default=0)


cdef tuple round_of(tuple extremes):
    """(step, top level) of a wrr round, as ip_vs_wrr.c has them."""
    cdef object step = extremes[0] or 1
    return step, max(extremes[1] - (step - 1), 0)


cdef int begin(Service *service) except -1:
    """Give a new service the scheduler state that it has when its members came one by one. The
    last came last, and stands at the head.
    """
    cdef bint wrr = service.scheduler == SCHEDULER_WRR
    cdef object level = 0
    cdef object divisor = 0
    cdef object heaviest = 0
    cdef Member *member
    cdef uint32_t i
    for i in range(service.member_count, 0, -1):
        member = &service.members[i - 1]
        member.last_weight = member.weight
        divisor = gcd(divisor, member.weight)
        heaviest = max(heaviest, member.weight)
        if wrr:
            level = level_of(level, (divisor, heaviest))
    settle(service, -1, level, (divisor, heaviest))
    prepare(service, NULL)
    return 0


cdef object level_of(object level, tuple extremes):
    """Where a wrr round goes on after an edit."""
    step, top = round_of(extremes)
    if level > top or level == 0:
        return top
    return level // step * step + 1 if step > 1 else level


cdef int settle(Service *service, object position, object level, tuple extremes) except -1:
    step, top = round_of(extremes)
    service.state.position = position
    service.state.weight = level
    service.state.weight_max = top
    service.state.weight_step = step
    return 0


cdef int advance(Service *service, list edits, Service *before) except -1:
    """Give a new service the scheduler state of the one it replaces (or NULL).

    `edits` are the steps between the two, oldest first: ("add", id, weight) at the head of the
    list, ("edit", id, weight), ("remove", id); None: see `begin`. The kernel adjusts its state at
    each step, and the order of picks depends on it. OverflowError when the scheduler has no room
    for so many members. What the service then remembers, `forget` releases.
    """
    cdef list members = []     # [id, weight, last weight that was not 0], head first
    cdef object position = -1
    cdef object level = 0
    cdef object divisor, heaviest
    cdef uint32_t i
    cdef bint wrr = service.scheduler == SCHEDULER_WRR
    cdef bint same = before is not NULL and before.scheduler == service.scheduler
    cdef Member *member
    if edits is None:
        return begin(service)
    if before is not NULL:
        for i in range(before.member_count):
            member = &before.members[i]
            members.append([member.destination.id, member.weight, member.last_weight])
        if same:
            spin_lock(&before.state.lock)
            position = before.state.position
            level = before.state.weight
            spin_unlock(&before.state.lock)
        elif wrr and members:
            level = round_of(extremes(members))[1]
    divisor, heaviest = extremes(members)
    for edit in edits:
        if edit[0] == "add":
            members.insert(0, [edit[1], edit[2], edit[2]])
            if position >= 0:
                position += 1
        else:
            index = next(k for k, entry in enumerate(members) if entry[0] == edit[1])
            if edit[0] == "edit":
                members[index][1] = edit[2]
                members[index][2] = edit[2] or members[index][2]
            else:
                del members[index]
                if position >= index:
                    position -= 1
        if wrr:
            if edit[0] == "add":
                divisor = gcd(divisor, edit[2])
                heaviest = max(heaviest, edit[2])
            else:
                divisor, heaviest = extremes(members)
            position = -1
            level = level_of(level, (divisor, heaviest))
    settle(service, position, level, extremes(members))
    for i in range(service.member_count):
        service.members[i].last_weight = members[i][2]
    prepare(service, before if same else NULL)
    return 0


cdef int advance_subsets(Service *service, list edits, Service *before) except -1:
    """As advance(), for the subsets of a service: `edits` has a list for each of its rules."""
    cdef uint32_t i
    cdef Service *subset
    cdef Service *former
    for i in range(service.rule_count):
        subset = service.rules[i].subset
        if subset is not NULL:
            former = NULL
            if before is not NULL and i < before.rule_count:
                former = before.rules[i].subset
            advance(subset, edits[i], former)
    return 0


cdef int prepare(Service *service, Service *before) except -1:
    """Tables and memory. `before` has the same scheduler, or is NULL."""
    cdef Locality *locality
    if service.scheduler == SCHEDULER_SH:
        service.state.table = sh_table(service)
    elif service.scheduler == SCHEDULER_MH:
        service.state.table = mh_table(service, before)
    elif service.scheduler == SCHEDULER_LBLC or service.scheduler == SCHEDULER_LBLCR:
        if before is NULL:
            service.state.locality = new_locality()
        else:
            locality = <Locality *>before.state.locality
            locality.references += 1
            service.state.locality = locality
    return 0


cdef void forget(Service *service) noexcept:
    """Release what the scheduler of a service that is about to be freed remembers."""
    release_table(<HashTable *>service.state.table)
    release_locality(<Locality *>service.state.locality)
