# The packet path: from a burst of packets to their verdicts.
#
#   parse, hash, prefetch -> prefetch record -> connection?  yes -> state, timer, rewrite -> FORWARD
#                                                 no -> service?  no -> PASS
#                                                   yes -> rule, persistence, scheduler, insert -> ^
#
# Workers run this side by side, each with a Worker of its own and without the GIL.
from libc.stdint cimport int64_t, uint8_t, uint32_t

from svcdp._core.connect cimport *
from svcdp._core.frag cimport *
from svcdp._core.outgoing cimport outgoing_connection
from svcdp._core.passive cimport aside, moves_on
from svcdp._core.xmit cimport destination_offset, source_offset

cdef enum:
    SWEEP_SHARE = 8            # one record is looked at for so many packets


cdef inline uint32_t judge_opening(
    Engine *engine, const Conn *conn
) noexcept nogil:
    """The client opens a new connection from a port that it used before (RFC 9293, 3.6.1), or
    sends again: ip_vs_core.c, is_new_conn_expected.
    """
    cdef const Dest *target
    if conn.control == 0 and engine.settings.conn_reuse_mode and (
        is_closed(conn.state)
        or (
            engine.settings.conn_reuse_mode & 2
            and conn.state == STATE_FIN_WAIT and conn.flags & CONN_IN_ONLY)
    ):
        return FORGET
    if conn.flags & CONN_WATCHED:
        target = dest_of(&engine.destinations, conn.destination)
        if target.on_removal == REMOVAL_EXPIRE and load_u32(&target.weight) == 0:
            return FORGET
    return USE


cdef inline uint32_t judge(
    Engine *engine, const Conn *conn, const uint8_t *data, const View *view, uint32_t direction,
    int64_t now
) noexcept nogil:
    cdef uint32_t verdict
    if unlikely(conn.deadline <= now) and not controls(engine, conn):
        return FORGET
    if direction == FROM_CLIENT and not view.quoted:
        if unlikely(reopens(data, view)):
            verdict = judge_opening(engine, conn)
            if verdict != USE:
                return verdict
    if unlikely(conn.flags & CONN_WATCHED) and not view.quoted:
        verdict = judge_watched(engine, conn, direction, now)
        # Who opens a connection anew need not hear of the end of the old one.
        return FORGET if verdict == RESET and direction == FROM_CLIENT and reopens(
            data, view) else verdict
    return USE


cdef inline void hash_view(const Engine *engine, View *view) noexcept nogil:
    view.hash = hash_flow(
        &engine.table.key, view.words, view.source, view.destination, view.source_port,
        view.destination_port, view.protocol)


cdef inline Service *service_of(
    const Engine *engine, const Snapshot *snapshot, const View *view, uint32_t mark
) noexcept nogil:
    """The service that the packet is addressed to, or NULL."""
    return table_find(
        &engine.table.key, snapshot, view.destination, view.words, view.destination_port,
        view.protocol, mark)


cdef inline Conn *route(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packet,
    View *view, Service *service, int64_t now, FragmentRoute *taken
) noexcept nogil:
    """Give a packet that was parsed its verdict: NULL. Unless it is the first of a connection,
    and a simple one: then this, locked, and the caller forwards it.

    `taken`, of a fragment, says how it went if it went along a connection.
    """
    cdef Conn *conn
    cdef uint32_t direction = FROM_CLIENT
    cdef uint32_t found = FORGET
    cdef uint8_t reason = SVCDP_REASON_ESTABLISHED
    conn = find(&engine.table, view, &direction)
    if conn is NULL and unlikely(view.quoted) and look_into_gue(packet.data, view) == PARSED:
        hash_view(engine, view)
        conn = find(&engine.table, view, &direction)
    if conn is not NULL:
        found = judge(engine, conn, packet.data, view, direction, now)
    if service is NULL and (found == FORGET or unlikely(conn.flags & CONN_TRIED)):
        service = service_of(engine, snapshot, view, packet.mark)
    if conn is not NULL:
        if found == USE and unlikely(conn.flags & (CONN_WATCHED | CONN_TRIED)):
            if conn.flags & CONN_WATCHED:
                start_grace(engine, conn, now)
            if conn.flags & CONN_TRIED and aside(&moves_on)(
                engine, worker, service, conn, packet, view, direction, now
            ):
                found = FORGET
        if unlikely(found == DROP):
            spin_unlock(&conn.lock)
            decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_DESTINATION_GONE)
            return NULL
        if unlikely(found == RESET):
            spin_unlock(&conn.lock)
            reject(
                engine, worker, packet, view, SVCDP_REASON_DESTINATION_GONE, SVCDP_ANSWER_DEFAULT)
            return NULL
        if unlikely(found == FORGET):
            conn.deadline = now
            spin_unlock(&conn.lock)
            expire(engine, worker, conn, view.words, now)
            conn = NULL
    if unlikely(conn is NULL):
        if unlikely(view.quoted and view.tunnel):
            decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
            return NULL
        if unlikely(load_u32(&engine.expected)) and not view.quoted:
            conn = expected_connection(engine, worker, packet.data, view, now, &found, &reason)
            if unlikely(found == DROP):
                decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_DESTINATION_GONE)
                return NULL
        if conn is NULL:
            if service is NULL and unlikely(snapshot.servers):
                conn = outgoing_connection(engine, worker, snapshot, packet, view, now)
            if conn is not NULL:
                reason = SVCDP_REASON_REPLY
            else:
                conn = new_connection(
                    engine, worker, snapshot, service, packet, view, now, &reason)
        worker.avoided = 0
        if conn is NULL:
            return NULL
        if likely(reason == SVCDP_REASON_NEW and is_simple(engine, conn, view)):
            return conn
        direction = FROM_DESTINATION if reason == SVCDP_REASON_REPLY else FROM_CLIENT
    elif direction == FROM_DESTINATION:
        reason = SVCDP_REASON_REPLY
    forward(engine, worker, packet, view, conn, direction, reason, now)
    if unlikely(taken is not NULL):
        taken.destination = conn.destination
        taken.direction = <uint8_t>direction
        taken.method = <uint8_t>method_of(conn)
    spin_unlock(&conn.lock)
    if unlikely(worker.expected_words):
        insert_expected(engine, worker)
    return NULL


cdef inline void route_fragment(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packet,
    View *view, int64_t now
) noexcept nogil:
    """A fragment: the first of its packet has ports and shows the others the way."""
    cdef Fragment fragment
    cdef FragmentRoute taken
    cdef uint8_t reason = parse_fragment(packet.data, packet.len, view, &fragment)
    if reason != PARSED:
        decide(worker, packet, SVCDP_VERDICT_PASS, reason)
        return
    hash_view(engine, view)
    if fragment.offset:
        if (
            fragment_find(&engine.fragments, &engine.table.key, &fragment, now, &taken)
            and load_u16(&dest_of(&engine.destinations, taken.destination).generation)
            == taken.generation
        ):
            forward_fragment(engine, worker, packet, view, &taken)
        else:
            decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_FRAGMENT)
        return
    taken.destination = 0
    route(engine, worker, snapshot, packet, view, NULL, now, &taken)
    if packet.verdict != SVCDP_VERDICT_FORWARD:
        return
    if taken.destination != packet.destination:
        # Scheduled by itself, it went along no connection.
        taken.destination = packet.destination
        taken.direction = FROM_CLIENT
        taken.method = dest_of(&engine.destinations, packet.destination).config.method
    if taken.method == METHOD_MASQ:
        copy_address(taken.source, packet.data + source_offset(view.words), view.words)
        copy_address(taken.target, packet.data + destination_offset(view.words), view.words)
    taken.generation = dest_of(&engine.destinations, taken.destination).generation
    fragment_remember(&engine.fragments, &engine.table.key, &fragment, &taken, now)


cdef inline bint turn_away(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packet
) noexcept nogil:
    """Decide what becomes of a ping, or of a packet of another protocol than those of services, in
    a network where nobody is but services (protocol any). False: it is not there.
    """
    cdef View view
    cdef const Service *service
    cdef const Rule *rule
    if parse_ip(packet.data, 0, packet.len, False, &view) != PARSED:
        return False
    view.quoted = 0
    if (
        view.protocol == PROTOCOL_ICMP or view.protocol == PROTOCOL_ICMP6
    ) and not is_ping(packet.data, &view):
        return False
    service = network_find(&engine.table.key, snapshot, view.destination, view.words)
    if service is NULL:
        return False
    rule = rule_for(service, view.source, packet.mark)
    if rule is NULL:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_SOURCE_RANGE)
    elif rule.on_empty == SVCDP_VERDICT_REJECT:
        reject(engine, worker, packet, &view, SVCDP_REASON_NO_DESTINATION, rule.answer)
    else:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_DESTINATION)
    return True


cdef inline void handle(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packet,
    View *view, Service *service, int64_t now
) noexcept nogil:
    cdef Conn *conn
    cdef uint32_t direction = FROM_CLIENT
    cdef uint8_t reason = SVCDP_REASON_ESTABLISHED
    packet.destination = 0
    if likely(view.reason == PARSED):
        conn = find_expected(view, &direction)
        if direction == FROM_DESTINATION:
            reason = SVCDP_REASON_REPLY
        if conn is not NULL and unlikely(not is_plain(engine, conn, view, direction, now)):
            spin_unlock(&conn.lock)
            conn = NULL
        if unlikely(conn is NULL):
            conn = route(engine, worker, snapshot, packet, view, service, now, NULL)
            if conn is NULL:
                return
            direction = FROM_CLIENT
            reason = SVCDP_REASON_NEW
        forward_plain(engine, worker, packet, view, conn, direction, reason, now)
        spin_unlock(&conn.lock)
    elif view.reason == SVCDP_REASON_FRAGMENT:
        route_fragment(engine, worker, snapshot, packet, view, now)
    elif view.reason != SVCDP_REASON_PROTOCOL or not turn_away(engine, worker, snapshot, packet):
        decide(worker, packet, SVCDP_VERDICT_PASS, view.reason)


cdef inline void burst(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packets,
    uint32_t count, int64_t now
) noexcept nogil:
    """At most BURST packets: each step for all of them before the next, so that the memory of
    one is on its way while another is worked on.
    """
    cdef uint32_t i, fresh = 0
    cdef View *view
    cdef Service *service
    for i in range(count):
        view = &worker.views[i]
        view.reason = parse(packets[i].data, packets[i].len, view)
        if likely(view.reason == PARSED):
            hash_view(engine, view)
            prefetch_slot(&engine.table, view)
    for i in range(count):
        worker.services[i] = NULL
        view = &worker.views[i]
        if likely(view.reason == PARSED):
            prefetch_record(&engine.table, view)
            if view.expected is NULL:
                service = service_of(engine, snapshot, view, packets[i].mark)
                worker.services[i] = service
                if service is not NULL:
                    prefetch_service(service)
                    fresh += 1
    if fresh:
        for i in range(count):
            if worker.services[i] is not NULL:
                prefetch_members(worker.services[i])
        for i in range(count):
            if worker.services[i] is not NULL:
                prefetch_destination(worker.services[i])
    for i in range(count):
        handle(engine, worker, snapshot, &packets[i], &worker.views[i], worker.services[i], now)


cdef inline void run(
    Engine *engine, Worker *worker, svcdp_packet *packets, uint32_t count, int64_t now
) noexcept nogil:
    """Any number of packets. The worker is the caller's alone meanwhile."""
    cdef uint32_t done = 0, size
    cdef const Snapshot *snapshot
    # From here until the epoch is 0 again nothing that this snapshot names is freed.
    exchange_u64(&worker.epoch, load_acquire_u64(&engine.epoch))
    snapshot = <const Snapshot *>load_ordered_ptr(<void **>&engine.snapshot)
    worker.now = now
    if unlikely(now >= load_i64(&engine.second)):
        look_at_load(engine, worker, now)
    while done < count:
        size = min(count - done, <uint32_t>BURST)
        burst(engine, worker, snapshot, packets + done, size, now)
        done += size
    sweep(engine, worker, now, 1 + count // SWEEP_SHARE)
    store_release_u64(&worker.epoch, 0)
