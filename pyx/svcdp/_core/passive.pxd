# Passive health: a destination that leaves clients without an answer is passed over for a while.
#
# Until its destination has answered, a connection is CONN_TRIED, and packets of it come here: they
# all take the long way, since it is not established. What counts as a failure is a reset or an ICMP
# error instead of the answer to the client's SYN, the client's second try, or no answer at all. But
# silence is one only if the destination answered nobody since the client asked.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from svcdp._core.checksum cimport transport_checksum
from svcdp._core.hashing cimport fold
from svcdp._core.load cimport available_weight, is_available, is_ejected, member_at
from svcdp._core.memory cimport load32, ntohl
from svcdp._core.random cimport next_random
from svcdp._core.sched cimport SCHEDULER_DH, SCHEDULER_MH, SCHEDULER_NONE
from svcdp._core.worker cimport *

cdef extern from *:
    # Sooner a SYN is no retransmission but a flood (RFC 6298: the first one comes after 1 s).
    const int64_t RETRY_AFTER "INT64_C(500000000)"     # ns

ctypedef bint (*Judge)(
    Engine *engine, Worker *worker, const Service *service, Conn *conn,
    const svcdp_packet *packet, const View *view, uint32_t direction, int64_t now
) noexcept nogil

cdef extern from *:
    # The function, but not inline: few packets go there.
    Judge aside "svcdp_aside"(Judge function) noexcept nogil

cdef enum:
    SEQUENCE = 4               # offsets in the TCP header
    ACKNOWLEDGMENT = 8
    DATA_OFFSET = 12

    # A SYN with fewer hops left may not get to the destination, and a longer one not through.
    HOPS_MIN = 8
    LENGTH_MAX = 576           # bytes (RFC 791: what every host takes)
    FAST_OPEN_MAX = 65535      # bytes in a SYN (RFC 7413) that its answer may acknowledge too


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
        store_i64(&target.asked_from, now + ejection_time(target))
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


cdef inline void blame_silence(
    Engine *engine, Worker *worker, Dest *target, int64_t asked, int64_t now
) noexcept nogil:
    """The same of a client that heard nothing since it asked: who answered others is there."""
    if asked >= load_i64(&target.asked_from):
        blame(engine, worker, target, now)


cdef inline void lift(Engine *engine, uint32_t index) noexcept nogil:
    """End an ejection. The lock is held."""
    cdef Ejected *ejected = &engine.ejected
    cdef Dest *target = dest_of(&engine.destinations, ejected.ids[index])
    and_u8(&target.unavailable, <uint8_t>~EJECTED)
    ejected.count -= 1
    ejected.ids[index] = ejected.ids[ejected.count]


cdef inline void readmit(Engine *engine, Dest *target, int64_t now) noexcept nogil:
    """It answers after all, or is to be asked again: an ejection ends."""
    cdef Ejected *ejected = &engine.ejected
    cdef uint32_t i
    if likely(not is_ejected(target)):
        return
    spin_lock(&ejected.lock)
    store_i64(&target.asked_from, now)
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
        if dest_of(&engine.destinations, ejected.ids[i - 1]).asked_from <= now:
            lift(engine, i - 1)
    spin_unlock(&ejected.lock)


cdef inline bint is_only_ejected(const Member *member) noexcept nogil:
    """Whether it would be available if it had answered."""
    return member.weight and load_u8(&member.destination.unavailable) == EJECTED


cdef inline bint all_ejected(const Service *service) noexcept nogil:
    """Whether nobody is left, and only because of ejections."""
    cdef const Member *member
    cdef uint32_t i
    cdef bint some = False
    if service.scheduler == SCHEDULER_NONE:
        return False
    for i in range(service.member_count):
        member = &service.members[i]
        if is_available(member):
            return False
        some = some or is_only_ejected(member)
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
    Engine *engine, Worker *worker, const Service *service, const View *view, int32_t member,
    int64_t now
) noexcept nogil:
    """Who serves instead of the member that a scheduler picked, or of nobody (-1)."""
    cdef uint32_t avoided = worker.avoided
    cdef uint32_t i
    cdef uint64_t weight
    worker.avoided = 0
    if member < 0 and all_ejected(service):
        # They are better than nobody.
        for i in range(service.member_count):
            readmit(engine, service.members[i].destination, now)
        weight = available_weight(service)
        if weight:
            member = member_at(service, 1 + next_random(&worker.random) % weight)
    elif member < 0:
        member = stand_in(service, view)
    if avoided:
        for i in range(service.member_count):
            if service.members[i].destination.id == avoided:
                if member < 0:
                    # A scheduler that has nobody for the client takes nothing from it.
                    return <int32_t>i
                if member == <int32_t>i:
                    member = other_member(service, member)
                break
        worker.retries += member >= 0
    return member


cdef inline bint is_plain_syn(const View *view) noexcept nogil:
    return view.tcp_flags & TCP_STATE == TCP_SYN


cdef inline bint is_sound(const svcdp_packet *packet, const View *view) noexcept nogil:
    """Whether a SYN is one that the kernel forwards and a server answers. Otherwise silence says
    nothing of the server: anybody can send what is dropped on its way or on arrival.
    """
    cdef const uint8_t *tcp = packet.data + view.transport
    cdef uint32_t length = view.end - view.transport
    cdef uint32_t header = tcp[DATA_OFFSET] >> 2 & 60
    # No options, no extension headers, and not the first of some fragments.
    if view.transport != (20 if view.words == 1 else 40) or view.fragment:
        return False
    if packet.data[8 if view.words == 1 else 7] < HOPS_MIN:
        return False
    if view.end > LENGTH_MAX or not 20 <= header <= length:
        return False
    return packet.flags & SVCDP_PACKET_CSUM_PARTIAL or transport_checksum(
        view.source, view.destination, view.words, PROTOCOL_TCP, tcp, length) == 0


cdef inline void try_out(
    Conn *conn, const svcdp_packet *packet, const View *view
) noexcept nogil:
    """See whether the destination answers the SYN that made the connection, which is locked.
    Replies of other methods than masq do not come this way.
    """
    if (
        view.protocol == PROTOCOL_TCP and not view.quoted and is_plain_syn(view)
        and method_of(conn) == METHOD_MASQ and is_sound(packet, view)
    ):
        conn.flags |= CONN_TRIED
        conn.extra = load32(packet.data + view.transport + SEQUENCE)
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


cdef inline int64_t asked_at(const Engine *engine, const Conn *conn) noexcept nogil:
    """When the SYN of a CONN_TRIED connection came, the newest."""
    return conn.deadline - engine.timeouts[conn.timeouts][conn.state]


cdef inline bint is_replaceable(
    const Service *service, const View *view, uint32_t mark, const Dest *target
) noexcept nogil:
    """Whether somebody else would serve the client of a connection to this destination: by the
    service that its SYN is for now (NULL: none), with this mark.
    """
    cdef const Rule *rule
    cdef const Member *member
    cdef uint32_t i
    cdef bint all_count
    if service is NULL or not service.is_passive or service.scheduler == SCHEDULER_NONE:
        return False
    rule = rule_for(service, view.source, mark)
    if rule is NULL:
        return False
    if rule.subset is not NULL:
        service = rule.subset
    # Then they are all asked again: see reconsider_member().
    all_count = all_ejected(service)
    for i in range(service.member_count):
        member = &service.members[i]
        if member.destination != target and (
            is_available(member) or (all_count and is_only_ejected(member))
        ):
            return True
    return False


cdef inline bint moves_on(
    Engine *engine, Worker *worker, const Service *service, Conn *conn,
    const svcdp_packet *packet, const View *view, uint32_t direction, int64_t now
) noexcept nogil:
    """What a packet for a service (NULL: for none) says of the destination of a CONN_TRIED
    connection, which is locked. True: nothing, and the client asks again: another one is to
    serve it.
    """
    cdef const uint8_t *data = packet.data
    cdef uint32_t flags = view.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)
    cdef const uint8_t *tcp = data + view.transport
    cdef int64_t asked
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
        if not flags & TCP_ACK or <uint32_t>(
            ntohl(load32(tcp + ACKNOWLEDGMENT)) - ntohl(conn.extra) - 1
        ) > FAST_OPEN_MAX:
            return False
        if flags & TCP_RST:
            blame_once(engine, worker, conn, now)
        elif flags & TCP_SYN:
            store_u32(&target.failures, 0)
            target.ejections = 0
            if is_ejected(target):
                readmit(engine, target, now)
            else:
                store_i64(&target.asked_from, now)
        else:
            return False
        end_trial(conn)
        return False
    if not is_plain_syn(view):
        return False
    if load32(tcp + SEQUENCE) != conn.extra:
        if is_sound(packet, view):
            conn.extra = load32(tcp + SEQUENCE)
            conn.is_blamed = False
        return False
    asked = asked_at(engine, conn)
    if now - asked < RETRY_AFTER:
        return False
    if not conn.is_blamed:
        conn.is_blamed = True
        blame_silence(engine, worker, target, asked, now)
    if not is_replaceable(service, view, packet.mark, target):
        return False
    worker.avoided = conn.destination
    return True
