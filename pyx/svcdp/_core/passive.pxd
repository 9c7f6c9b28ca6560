# Passive health: a destination that leaves clients without an answer is passed over for a while.
#
# Until its destination has answered, a connection is CONN_TRIED, and packets of it come here: they
# all take the long way, since it is not established. What counts as a failure is a reset or an ICMP
# error instead of the answer to the client's SYN, the client's second try, or no answer at all.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from svcdp._core.hashing cimport fold
from svcdp._core.load cimport is_available, is_ejected
from svcdp._core.memory cimport load32, ntohl
from svcdp._core.random cimport next_random
from svcdp._core.sched cimport SCHEDULER_DH, SCHEDULER_MH
from svcdp._core.worker cimport *

cdef extern from *:
    # Sooner a SYN is no retransmission but a flood (RFC 6298: the first one comes after 1 s).
    const int64_t RETRY_AFTER "INT64_C(500000000)"     # ns

cdef enum:
    SEQUENCE = 4               # offsets in the TCP header
    ACKNOWLEDGMENT = 8


cdef inline int64_t ejection_time(const Dest *target) noexcept nogil:
    """ns for which it is ejected now: twice as long each time, as long as it never answers."""
    cdef int64_t time = target.ejection
    cdef uint32_t _
    for _ in range(min(target.ejections, <uint32_t>31)):
        if time >= target.ejection_max:
            break
        time *= 2
    return min(time, target.ejection_max)


cdef inline void eject(
    Engine *engine, Worker *worker, Dest *target, int64_t now
) noexcept nogil:
    """Unless too many are ejected already."""
    cdef Ejected *ejected = &engine.ejected
    spin_lock(&ejected.lock)
    if not is_ejected(target) and ejected.count < EJECTED_MAX:
        ejected.ids[ejected.count] = target.id
        ejected.count += 1
        target.ejected_until = now + ejection_time(target)
        target.ejections += 1
        store_u32(&target.failures, 0)
        or_u8(&target.unavailable, EJECTED)
        worker.ejections += 1
    spin_unlock(&ejected.lock)


cdef inline void blame(
    Engine *engine, Worker *worker, Dest *target, int64_t now
) noexcept nogil:
    """A client found no answer at the destination."""
    if target.ejection == 0 or target.removed:
        return
    store_i64(&target.failed_at, now)
    add_u32(&target.failures_total, 1)
    if add_u32(&target.failures, 1) >= load_u32(&target.failures_max):
        eject(engine, worker, target, now)


cdef inline void lift(Engine *engine, uint32_t index) noexcept nogil:
    """End an ejection. The lock is held."""
    cdef Ejected *ejected = &engine.ejected
    cdef Dest *target = dest_of(&engine.destinations, ejected.ids[index])
    and_u8(&target.unavailable, <uint8_t>~EJECTED)
    ejected.count -= 1
    ejected.ids[index] = ejected.ids[ejected.count]


cdef inline void readmit(Engine *engine, Dest *target) noexcept nogil:
    """It answers after all, or is to be asked again: an ejection ends."""
    cdef Ejected *ejected = &engine.ejected
    cdef uint32_t i
    if likely(not is_ejected(target)):
        return
    spin_lock(&ejected.lock)
    for i in range(ejected.count):
        if ejected.ids[i] == target.id:
            lift(engine, i)
            break
    spin_unlock(&ejected.lock)


cdef inline void readmit_due(Engine *engine, int64_t now) noexcept nogil:
    """End the ejections whose time is over."""
    cdef Ejected *ejected = &engine.ejected
    cdef uint32_t i
    if load_u32(&ejected.count) == 0:
        return
    spin_lock(&ejected.lock)
    for i in range(ejected.count, 0, -1):
        if dest_of(&engine.destinations, ejected.ids[i - 1]).ejected_until <= now:
            lift(engine, i - 1)
    spin_unlock(&ejected.lock)


cdef inline bint all_ejected(const Service *service) noexcept nogil:
    """Whether nobody is left, and only because of ejections."""
    cdef const Member *member
    cdef uint32_t i
    cdef bint some = False
    for i in range(service.member_count):
        member = &service.members[i]
        if is_available(member):
            return False
        some = some or (
            member.weight and load_u8(&member.destination.unavailable) == EJECTED)
    return some


cdef inline bint is_shunned(const Worker *worker, const Dest *target) noexcept nogil:
    """Whether a client is not sent there, though it is bound to it."""
    return target.id == worker.avoided or is_ejected(target)


cdef inline int32_t other_member(const Service *service, int32_t member) noexcept nogil:
    """The next one after it that is available, around the list; the same if there is no other."""
    cdef uint32_t i, index
    for i in range(1, service.member_count):
        index = (<uint32_t>member + i) % service.member_count
        if is_available(&service.members[index]):
            return <int32_t>index
    return member


cdef inline int32_t stand_in(const Service *service, const View *view) noexcept nogil:
    """Who serves the clients that hash to a member which cannot; -1 for other schedulers, or if
    nobody can.
    """
    cdef int32_t member
    if not SCHEDULER_DH <= service.scheduler <= SCHEDULER_MH or service.member_count == 0:
        return -1
    member = other_member(
        service, <int32_t>(fold(view.source, view.words) % service.member_count))
    return member if is_available(&service.members[member]) else -1


cdef inline int32_t reconsider_member(
    Engine *engine, Worker *worker, const Service *service, const View *view, int32_t member
) noexcept nogil:
    """Who serves instead of the member that a scheduler picked, or of nobody (-1)."""
    cdef uint32_t avoided = worker.avoided
    cdef uint32_t i
    worker.avoided = 0
    if member < 0 and all_ejected(service):
        # They are better than nobody.
        for i in range(service.member_count):
            readmit(engine, service.members[i].destination)
        member = other_member(
            service, <int32_t>(next_random(&worker.random) % service.member_count))
    elif member < 0:
        member = stand_in(service, view)
    if member >= 0 and service.members[member].destination.id == avoided:
        return other_member(service, member)
    return member


cdef inline void try_out(Conn *conn, const uint8_t *data, const View *view) noexcept nogil:
    """See whether the destination answers the SYN that made the connection, which is locked.
    Replies of other methods than masq do not come this way.
    """
    if (
        view.protocol == PROTOCOL_TCP and not view.quoted
        and view.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN and method_of(conn) == METHOD_MASQ
    ):
        conn.flags |= CONN_TRIED
        conn.extra = load32(data + view.transport + SEQUENCE)
        conn.is_blamed = False


cdef inline void blame_once(
    Engine *engine, Worker *worker, Conn *conn, int64_t now
) noexcept nogil:
    if not conn.is_blamed:
        conn.is_blamed = True
        blame(engine, worker, dest_of(&engine.destinations, conn.destination), now)


cdef inline void end_trial(Conn *conn) noexcept nogil:
    conn.flags &= <uint16_t>~CONN_TRIED
    conn.extra = 0


cdef inline bint is_unreachable(const uint8_t *data, const View *view) noexcept nogil:
    """Whether an ICMP error says that nobody is there (RFC 792; RFC 4443, 3.1)."""
    cdef uint8_t icmp_type = data[view.transport], code = data[view.transport + 1]
    if view.words == 1:
        return icmp_type == 3 and code != 4    # "too big" is no failure
    return icmp_type == 1


cdef inline bint is_retry(
    const Engine *engine, const Conn *conn, int64_t now
) noexcept nogil:
    """Whether the SYN before this one had time to be answered."""
    cdef int64_t last = conn.deadline - engine.timeouts[conn.timeouts][conn.state]
    return now - last >= RETRY_AFTER


cdef inline bint moves_on(
    Engine *engine, Worker *worker, Conn *conn, const uint8_t *data, const View *view,
    uint32_t direction, int64_t now
) noexcept nogil:
    """What a packet says of the destination of a CONN_TRIED connection, which is locked. True:
    nothing, and the client asks again: it is to get another one.
    """
    cdef uint32_t flags = view.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)
    cdef const uint8_t *tcp = data + view.transport
    cdef Dest *target = dest_of(&engine.destinations, conn.destination)
    if view.quoted:
        # parse() made sure of the ports only.
        if (
            direction == FROM_DESTINATION and not view.tunnel
            and view.quoted_transport + SEQUENCE + 4 <= view.end
            and load32(data + view.quoted_transport + SEQUENCE) == conn.extra
            and is_unreachable(data, view)
        ):
            blame_once(engine, worker, conn, now)
        return False
    if direction == FROM_DESTINATION:
        if not flags & TCP_ACK or ntohl(load32(tcp + ACKNOWLEDGMENT)) != ntohl(conn.extra) + 1:
            return False
        if flags & TCP_RST:
            blame_once(engine, worker, conn, now)
        elif flags & TCP_SYN:
            store_u32(&target.failures, 0)
            target.ejections = 0
            readmit(engine, target)
        else:
            return False
        end_trial(conn)
        return False
    if flags != TCP_SYN:
        return False
    if load32(tcp + SEQUENCE) != conn.extra:
        conn.extra = load32(tcp + SEQUENCE)
        conn.is_blamed = False
        return False
    if not is_retry(engine, conn, now):
        return False
    blame_once(engine, worker, conn, now)
    worker.avoided = conn.destination
    worker.retries += 1
    return True
