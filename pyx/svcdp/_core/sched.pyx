"""Schedulers, per change: what they remember, carried over an edit."""

from math import gcd

from libc.stdint cimport uint32_t

from svcdp._core.sched cimport *
from svcdp._core.atomic cimport spin_lock, spin_unlock


cdef tuple extremes(list members):
    """The greatest common divisor of the weights, and the greatest weight."""
    cdef list weights = [weight for _, weight in members]
    return gcd(*weights), max(weights, default=0)


cdef tuple round_of(tuple extremes):
    """(step, top level) of a wrr round, as ip_vs_wrr.c has them."""
    cdef object step = extremes[0] or 1
    return step, max(extremes[1] - (step - 1), 0)


cdef int advance(Service *service, list edits, Service *before) except -1:
    """Give a new service the scheduler state of the one it replaces (or NULL).

    `edits` are the steps between the two, oldest first: ("add", id, weight) at the head of the
    list, ("edit", id, weight), ("remove", id). The kernel adjusts its state at each step, and
    the order of picks depends on it.
    """
    cdef list members = []     # [id, weight], head first
    cdef object position = -1
    cdef object level = 0
    cdef object divisor, heaviest, step, top
    cdef uint32_t i
    cdef bint wrr = service.scheduler == SCHEDULER_WRR
    if before is not NULL:
        for i in range(before.member_count):
            members.append([before.members[i].destination.id, before.members[i].weight])
        if before.scheduler == service.scheduler:
            spin_lock(&before.state.lock)
            position = before.state.position
            level = before.state.weight
            spin_unlock(&before.state.lock)
        elif wrr and members:
            level = round_of(extremes(members))[1]
    divisor, heaviest = extremes(members)
    for edit in edits:
        if edit[0] == "add":
            members.insert(0, [edit[1], edit[2]])
            if position >= 0:
                position += 1
        else:
            index = next(k for k, member in enumerate(members) if member[0] == edit[1])
            if edit[0] == "edit":
                members[index][1] = edit[2]
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
            step, top = round_of((divisor, heaviest))
            if level > top or level == 0:
                level = top
            elif step > 1:
                level = level // step * step + 1
    step, top = round_of(extremes(members))
    service.state.position = position
    service.state.weight = level
    service.state.weight_max = top
    service.state.weight_step = step
    return 0
