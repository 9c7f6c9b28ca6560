# The packet path: from a burst of packets to their verdicts.
#
#   parse, hash, prefetch -> prefetch record -> connection?  yes -> state, timer, rewrite -> FORWARD
#                                                 no -> service?  no -> PASS
#                                                   yes -> rule, persistence, scheduler, insert -> ^
#
# Workers run this side by side, each with a Worker of its own and without the GIL.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport *
from svcdp._core.conn cimport *
from svcdp._core.hash cimport hash_flow
from svcdp._core.memory cimport copy_address, htons, load32, same_address, store32
from svcdp._core.packet cimport *
from svcdp._core.proto cimport *
from svcdp._core.sched cimport *
from svcdp._core.service cimport *
from svcdp._core.table cimport *
from svcdp._core.xmit cimport compute_deltas, translate, translate_error

cdef enum:
    BURST = 64                 # packets whose memory is fetched together
    SWEEP_SHARE = 8            # one record is looked at for so many packets
    SWEEP_URGENT = 256         # records looked at for a new connection when the table is full
    PICKS_MAX = 4              # destinations tried when replies would be ambiguous
    PORTS_TRIED_MAX = 128

cdef struct Worker:
    Worker *next               # of the core's workers
    uint64_t epoch             # of the snapshot in use, 0: none
    uint64_t random
    uint64_t verdicts[SVCDP_VERDICT_COUNT][SVCDP_REASON_COUNT]
    uint64_t created
    uint64_t expired
    uint64_t scheduler_errors
    uint8_t busy
    Traffic *traffic[DESTINATION_CHUNKS]
    View views[BURST]
    Service *services[BURST]   # of the views, where they seem unknown

ctypedef int32_t (*Chooser)(Service *, const View *, Worker *) noexcept nogil

cdef struct Engine:
    Table table
    DestinationTable destinations
    Snapshot *snapshot
    uint64_t epoch
    int64_t timeouts[STATE_COUNT]      # ns
    uint32_t port_first                # masquerade ports
    uint32_t port_count
    uint32_t sweep_cursor[2]
    Chooser choose                     # asks a scheduler written in Python


cdef inline void decide(
    Worker *worker, svcdp_packet *packet, uint8_t verdict, uint8_t reason
) noexcept nogil:
    packet.verdict = verdict
    packet.reason = reason
    worker.verdicts[verdict][reason] += 1


cdef inline int32_t *load_of(Dest *target, uint8_t state) noexcept nogil:
    """The counter that a connection in this state is part of."""
    return &target.active if is_active(state) else &target.inactive


cdef inline void expire(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, int64_t before
) noexcept nogil:
    """Remove a connection unless it has been used since. The caller does not hold it locked."""
    cdef Conn was
    cdef Dest *target
    if not remove(&engine.table, conn, words, before, &was):
        return
    if was.protocol != CONN_TEMPLATE:
        target = dest_of(&engine.destinations, was.destination)
        add_i32(load_of(target, was.state), -1)
        add_u32(&target.references, <uint32_t>-1)
        worker.expired += 1


cdef inline bint is_orphan(Engine *engine, const Conn *conn) noexcept nogil:
    """A UDP connection whose destination is gone: there is no close to wait for."""
    return (
        conn.protocol == PROTOCOL_UDP
        and dest_of(&engine.destinations, conn.destination).removed
    )


cdef inline void sweep_record(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, int64_t now
) noexcept nogil:
    cdef bint over
    if load_u8(&conn.protocol) == CONN_FREE:
        return
    if load_i64(&conn.deadline) > now and load_u8(&conn.protocol) != PROTOCOL_UDP:
        return
    spin_lock(&conn.lock)
    if is_orphan(engine, conn):
        conn.deadline = now
    over = conn.protocol != CONN_FREE and conn.deadline <= now
    spin_unlock(&conn.lock)
    if over:
        expire(engine, worker, conn, words, now)


cdef inline void sweep(
    Engine *engine, Worker *worker, int64_t now, uint32_t budget
) noexcept nogil:
    """Look at the next `budget` records of each family for expired ones."""
    cdef uint32_t pool, fresh, index, _
    for pool in range(2):
        fresh = load_acquire_u32(&engine.table.pools[pool].fresh)
        if fresh <= 1:
            continue
        index = (add_u32(&engine.sweep_cursor[pool], budget) - budget) % (fresh - 1)
        for _ in range(min(budget, fresh - 1)):
            # Record 0 is never used.
            index = index + 1 if index + 1 < fresh else 1
            sweep_record(
                engine, worker, record(&engine.table, pool, index), 4 if pool else 1, now)


cdef inline bint is_usable(
    Engine *engine, const Conn *conn, const View *view, uint32_t direction, int64_t now
) noexcept nogil:
    if unlikely(conn.deadline <= now):
        return False
    if direction == FROM_CLIENT and not view.quoted:
        # The client opens a new connection from a port that it used before (RFC 9293, 3.6.1).
        if unlikely(view.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN):
            return not is_closed(conn.state)
        return not is_orphan(engine, conn)
    return True


cdef inline void change_state(
    Engine *engine, Conn *conn, uint32_t direction, uint8_t tcp_flags
) noexcept nogil:
    cdef uint8_t state = next_state(conn.protocol, conn.state, direction, tcp_flags)
    cdef Dest *target
    if state != conn.state:
        target = dest_of(&engine.destinations, conn.destination)
        add_i32(load_of(target, conn.state), -1)
        add_i32(load_of(target, state), 1)
        conn.state = state


cdef inline void forward(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint32_t direction, uint8_t reason, int64_t now
) noexcept nogil:
    """Send a packet along a connection, which the caller holds locked."""
    cdef Traffic *traffic
    packet.destination = conn.destination
    if unlikely(view.quoted):
        translate_error(packet, view, conn, direction)
        decide(worker, packet, SVCDP_VERDICT_FORWARD, SVCDP_REASON_RELATED)
        return
    # ESTABLISHED stays so until a flag other than ACK (or PSH, URG) says otherwise.
    if unlikely(conn.state != STATE_ESTABLISHED or view.tcp_flags & TCP_STATE != TCP_ACK):
        change_state(engine, conn, direction, view.tcp_flags)
    store_i64(&conn.deadline, now + engine.timeouts[conn.state])
    traffic = &worker.traffic[conn.destination // DESTINATION_CHUNK][
        conn.destination % DESTINATION_CHUNK]
    # Constant arguments: the compiler makes one way of each family and direction.
    if direction == FROM_CLIENT:
        conn.packets += 1
        traffic.packets_in += 1
        traffic.bytes_in += view.end
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_CLIENT)
        else:
            translate(packet, view, conn, 4, FROM_CLIENT)
    else:
        traffic.packets_out += 1
        traffic.bytes_out += view.end
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_DESTINATION)
        else:
            translate(packet, view, conn, 4, FROM_DESTINATION)
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void template_view(
    Engine *engine, const Service *service, const uint8_t *client, uint8_t *group, View *view
) noexcept nogil:
    """The key of a client's affinity: its address and the persistence group, which `group` (16
    bytes) is filled with.
    """
    memset(group, 0, 16)
    store32(group, service.affinity)
    view.words = service.words
    view.protocol = CONN_TEMPLATE
    view.source = client
    view.destination = group
    view.source_port = view.destination_port = 0
    view.hash = hash_flow(
        &engine.table.key, view.words, client, group, 0, 0, CONN_TEMPLATE)


cdef inline int32_t sticky_member(
    Engine *engine, const Service *service, const uint8_t *client, int64_t now
) noexcept nogil:
    """The member that this client was sent to before and that is still there, or -1."""
    cdef uint8_t group[16]
    cdef View view
    cdef Conn *conn
    cdef Dest *target
    cdef uint32_t direction, i
    cdef int32_t result = -1
    template_view(engine, service, client, group, &view)
    conn = find(&engine.table, &view, &direction)
    if conn is NULL:
        return -1
    if conn.deadline > now:
        for i in range(service.member_count):
            target = service.members[i].destination
            if (
                target.port == conn.real_port
                and same_address(target.address, address_of(conn, REAL, view.words), view.words)
            ):
                result = <int32_t>i
                break
    spin_unlock(&conn.lock)
    return result


cdef inline void discard(Engine *engine, Conn *conn, uint32_t words) noexcept nogil:
    """Give back a record, locked, that did not get into the table."""
    store_u8(&conn.protocol, CONN_FREE)
    release(&engine.table, conn, words)
    spin_unlock(&conn.lock)


cdef inline void remember(
    Engine *engine, const Service *service, const uint8_t *client, const Dest *target,
    int64_t now
) noexcept nogil:
    """Bind a client to a destination, or bind it for longer. Templates take no more than half of
    the table, and a client that finds no room stays unbound: connections matter more.
    """
    cdef uint8_t group[16]
    cdef View view
    cdef Conn *conn
    cdef Conn *other
    cdef uint32_t direction
    cdef uint32_t words = service.words
    template_view(engine, service, client, group, &view)
    conn = find(&engine.table, &view, &direction)
    if conn is NULL:
        if load_u32(&engine.table.templates) >= (engine.table.limit + 1) // 2:
            return
        conn = allocate(&engine.table, words)
        if conn is NULL:
            return
        spin_lock(&conn.lock)
        conn.state = conn.flags = 0
        conn.destination = 0
        conn.packets = 0
        conn.client_port = conn.virtual_port = conn.source_port = 0
        copy_address(address_of(conn, CLIENT, words), client, words)
        copy_address(address_of(conn, VIRTUAL, words), group, words)
        memset(address_of(conn, SOURCE, words), 0, 4 * words)
        conn.real_port = target.port
        copy_address(address_of(conn, REAL, words), target.address, words)
        conn.deadline = now + service.persistence
        store_u8(&conn.protocol, CONN_TEMPLATE)
        if insert(&engine.table, conn, words, &other) == INSERTED:
            spin_unlock(&conn.lock)
            return
        discard(engine, conn, words)
        if other is NULL:
            return
        conn = other
    conn.real_port = target.port
    copy_address(address_of(conn, REAL, words), target.address, words)
    store_i64(&conn.deadline, now + service.persistence)
    spin_unlock(&conn.lock)


cdef inline uint32_t connect(
    Engine *engine, Worker *worker, const Service *service, bint masquerade, const View *view,
    Dest *target, int64_t now, Conn **made
) noexcept nogil:
    """Make the connection of the packet to this destination.

    When no masquerade port is free, that of a connection which both sides have closed is taken.
    INSERTED, or KNOWN when another worker just did it, and `made` is the connection, locked.
    FULL, or CLASH: the destination could not tell this connection from another one.
    """
    cdef uint32_t words = view.words
    cdef uint32_t outcome = CLASH
    cdef uint32_t tries = engine.port_count if masquerade else 1
    cdef uint32_t port = 0
    cdef uint32_t removals = PORTS_TRIED_MAX
    cdef bint over
    cdef Conn *other = NULL
    cdef Conn *conn = allocate(&engine.table, words)
    if conn is NULL:
        sweep(engine, worker, now, SWEEP_URGENT)
        conn = allocate(&engine.table, words)
        if conn is NULL:
            return FULL
    if tries > PORTS_TRIED_MAX:
        tries = PORTS_TRIED_MAX
    spin_lock(&conn.lock)
    conn.state = next_state(view.protocol, STATE_NONE, FROM_CLIENT, view.tcp_flags)
    conn.flags = CONN_MASQUERADE if masquerade else 0
    conn.destination = target.id
    conn.packets = 0
    conn.deadline = now + engine.timeouts[conn.state]
    conn.client_port = conn.source_port = view.source_port
    conn.virtual_port = view.destination_port
    conn.real_port = target.port
    copy_address(address_of(conn, CLIENT, words), view.source, words)
    copy_address(address_of(conn, VIRTUAL, words), view.destination, words)
    copy_address(address_of(conn, REAL, words), target.address, words)
    copy_address(address_of(conn, SOURCE, words), view.source, words)
    if masquerade:
        copy_address(address_of(conn, SOURCE, words), service.masquerade, words)
        port = <uint32_t>(next_random(&worker.random) % engine.port_count)
    while tries:
        if masquerade:
            conn.source_port = htons(<uint16_t>(engine.port_first + port))
        compute_deltas(conn, words)
        store_u8(&conn.protocol, view.protocol)
        outcome = insert(&engine.table, conn, words, &other)
        if outcome == INSERTED or outcome == FULL:
            break
        if outcome == KNOWN and other.deadline > now:
            made[0] = other
            break
        if other is not NULL:
            over = other.deadline <= now or (
                masquerade and tries <= PORTS_TRIED_MAX // 2 and is_closed(other.state))
            if over:
                other.deadline = now
            spin_unlock(&other.lock)
            if over and removals:
                # Somebody else may use it at this moment: then it stays.
                removals -= 1
                expire(engine, worker, other, words, now)
                continue
        outcome = CLASH
        tries -= 1
        port = port + 1 if port + 1 < engine.port_count else 0
    if outcome != INSERTED:
        discard(engine, conn, words)
        return outcome
    made[0] = conn
    add_i32(load_of(target, conn.state), 1)
    add_u32(&target.references, 1)
    worker.traffic[target.id // DESTINATION_CHUNK][target.id % DESTINATION_CHUNK].connections += 1
    worker.created += 1
    return INSERTED


cdef inline Service *service_of(
    const Engine *engine, const Snapshot *snapshot, const View *view
) noexcept nogil:
    """The service that the packet is addressed to, or NULL."""
    cdef uint64_t hash = service_hash(
        &engine.table.key, view.destination, view.words, view.destination_port, view.protocol)
    return shard_find(
        shard_of(snapshot, hash), hash, view.destination, view.words, view.destination_port,
        view.protocol)


cdef inline Conn *new_connection(
    Engine *engine, Worker *worker, Service *service, svcdp_packet *packet, const View *view,
    int64_t now, uint8_t *reason
) noexcept nogil:
    """The connection, locked, for a packet of no known one to a service or (NULL) to none; and
    the packet's reason. NULL when it gets none: then its verdict is decided.
    """
    cdef const Rule *rule
    cdef Conn *conn = NULL
    cdef Dest *target
    cdef bint masquerade, sticky, silent
    cdef int32_t member
    cdef uint32_t outcome = CLASH
    cdef uint32_t _
    if service is NULL or view.quoted:
        decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
        return NULL
    rule = rule_for(service, view.source)
    if rule is NULL:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_SOURCE_RANGE)
        return NULL
    if view.protocol == PROTOCOL_TCP and view.tcp_flags & (TCP_SYN | TCP_RST) != TCP_SYN:
        # Its connection is gone or was never ours: say so, rather than let the client wait,
        # unless a SYN would get silence too.
        silent = view.tcp_flags & TCP_RST or (
            service.weight_total == 0 and rule.on_empty == SVCDP_VERDICT_DROP)
        decide(
            worker, packet, SVCDP_VERDICT_DROP if silent else SVCDP_VERDICT_REJECT,
            SVCDP_REASON_NO_CONNECTION)
        return NULL
    member = sticky_member(engine, service, view.source, now) if service.persistence else -1
    sticky = member >= 0
    for _ in range(PICKS_MAX):
        if not sticky:
            if service.scheduler == SCHEDULER_PYTHON:
                member = engine.choose(service, view, worker)
            else:
                member = pick(service, &worker.random)
        if member < 0:
            decide(worker, packet, rule.on_empty, SVCDP_REASON_NO_DESTINATION)
            return NULL
        target = service.members[member].destination
        masquerade = rule.masquerade or (
            service.has_masquerade and same_address(target.address, view.source, view.words))
        if masquerade and not service.has_masquerade:
            decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_MASQUERADE)
            return NULL
        outcome = connect(engine, worker, service, masquerade, view, target, now, &conn)
        # A scheduler written in Python is asked once for a connection.
        if outcome != CLASH or sticky or service.scheduler == SCHEDULER_PYTHON:
            break
    if outcome == FULL:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_TABLE_FULL)
    elif outcome == CLASH:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_PORT)
    reason[0] = SVCDP_REASON_NEW if outcome == INSERTED else SVCDP_REASON_ESTABLISHED
    return conn


cdef inline void handle(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packet,
    View *view, Service *service, int64_t now
) noexcept nogil:
    cdef Conn *conn
    cdef uint32_t direction = FROM_CLIENT
    cdef uint8_t reason = SVCDP_REASON_ESTABLISHED
    cdef uint8_t client[16]
    cdef bint bind = False
    packet.destination = 0
    if unlikely(view.reason != PARSED):
        decide(worker, packet, SVCDP_VERDICT_PASS, view.reason)
        return
    conn = find_expected(view, &direction)
    if conn is NULL:
        conn = find(&engine.table, view, &direction)
    if conn is not NULL and unlikely(not is_usable(engine, conn, view, direction, now)):
        conn.deadline = now
        spin_unlock(&conn.lock)
        expire(engine, worker, conn, view.words, now)
        conn = NULL
    if unlikely(conn is NULL):
        if service is NULL:
            service = service_of(engine, snapshot, view)
        conn = new_connection(engine, worker, service, packet, view, now, &reason)
        if conn is NULL:
            return
        direction = FROM_CLIENT
        bind = service.persistence != 0
        if bind:
            # The view points into the packet, which is about to be rewritten.
            copy_address(client, view.source, view.words)
    elif direction == FROM_DESTINATION:
        reason = SVCDP_REASON_REPLY
    forward(engine, worker, packet, view, conn, direction, reason, now)
    spin_unlock(&conn.lock)
    if unlikely(bind):
        remember(
            engine, service, client, dest_of(&engine.destinations, packet.destination), now)


cdef inline void burst(
    Engine *engine, Worker *worker, const Snapshot *snapshot, svcdp_packet *packets,
    uint32_t count, int64_t now
) noexcept nogil:
    """At most BURST packets: each step for all of them before the next, so that the memory of
    one is on its way while another is worked on.
    """
    cdef uint32_t i
    cdef View *view
    for i in range(count):
        view = &worker.views[i]
        view.reason = parse(packets[i].data, packets[i].len, view)
        if likely(view.reason == PARSED):
            view.hash = hash_flow(
                &engine.table.key, view.words, view.source, view.destination,
                view.source_port, view.destination_port, view.protocol)
            prefetch_slot(&engine.table, view)
    for i in range(count):
        worker.services[i] = NULL
        view = &worker.views[i]
        if likely(view.reason == PARSED):
            prefetch_record(&engine.table, view)
            if view.expected is NULL:
                worker.services[i] = service_of(engine, snapshot, view)
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
    while done < count:
        size = min(count - done, <uint32_t>BURST)
        burst(engine, worker, snapshot, packets + done, size, now)
        done += size
    sweep(engine, worker, now, 1 + count // SWEEP_SHARE)
    store_release_u64(&worker.epoch, 0)
