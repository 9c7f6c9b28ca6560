# New connections: is there a service, does it admit the client, who is to serve it.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from svcdp._core.affinity cimport *
from svcdp._core.forward cimport (
    assure, forward, forward_fragment, forward_plain, is_plain, is_simple,
)
from svcdp._core.helper cimport give_helper, insert_expected
from svcdp._core.memory cimport copy_address, htons, load32, ntohl, ntohs, same_address
from svcdp._core.passive cimport is_shunned, reconsider_member, try_out
from svcdp._core.record cimport copy_pattern, discard, helper_release
from svcdp._core.sched cimport *
from svcdp._core.sweep cimport *
from svcdp._core.table cimport *
from svcdp._core.worker cimport *
from svcdp._core.xmit cimport compute_deltas

cdef enum:
    PICKS_MAX = 4              # destinations tried when replies would be ambiguous
    PORTS_TRIED_MAX = 128
    # Seconds until a connection that an ICMP error opened is forgotten: ip_vs_conn_new.
    FIRST_TIMEOUT = 3


cdef inline Conn *new_record(
    Engine *engine, Worker *worker, uint32_t words, int64_t now
) noexcept nogil:
    """A record, locked, after some sweeping when there is none; or NULL."""
    cdef Conn *conn = allocate(&engine.table, words)
    if unlikely(conn is NULL):
        sweep(engine, worker, now, SWEEP_URGENT)
        conn = allocate(&engine.table, words)
        if conn is NULL:
            return NULL
    spin_lock(&conn.lock)
    return conn


cdef inline void set_flags(DestConfig *config) noexcept nogil:
    """What the way to a destination makes of Conn.flags."""
    config.flags = <uint16_t>(config.method << CONN_METHOD_SHIFT)
    if config.method != METHOD_MASQ:
        config.flags |= CONN_IN_ONLY
    if config.mtu or config.mark:
        config.flags |= CONN_ROUTED


cdef inline uint16_t flags_of(
    const Service *service, const Dest *target, const View *view, bint masquerade
) noexcept nogil:
    """Conn.flags of a new connection."""
    cdef uint16_t flags = target.config.flags | service.flags[view.protocol == PROTOCOL_UDP]
    if masquerade:
        return (flags | CONN_MASQUERADE) & <uint16_t>~CONN_ONE_WAY
    return flags


cdef inline bint is_ftp_data(const Service *service, const View *view) noexcept nogil:
    """Whether a service of FTP got a packet for another port than its own."""
    return (
        service.first_port == FTP_PORT and service.last_port == FTP_PORT
        and view.destination_port != service.port and service.protocol == PROTOCOL_TCP)


cdef inline void fill(
    Engine *engine, Conn *conn, const Service *service, const View *view,
    const Dest *target, uint16_t flags, int64_t now
) noexcept nogil:
    """The record of a new connection: all of it but its lock, masquerade port and deltas."""
    cdef uint32_t words = view.words
    conn.flags = flags
    conn.timeouts = service.timeouts
    conn.destination = target.id
    conn.packets = conn.control = conn.extra = 0
    conn.fwmark = ntohl(load32(service.address)) if service.protocol == PROTOCOL_FWMARK else 0
    conn.client_port = conn.source_port = view.source_port
    conn.virtual_port = view.destination_port
    copy_address(address_of(conn, CLIENT, words), view.source, words)
    copy_address(address_of(conn, VIRTUAL, words), view.destination, words)
    if flags & CONN_METHOD:
        # Replies do not come back this way, and if they do, the service is their source.
        conn.real_port = view.destination_port
        copy_address(address_of(conn, REAL, words), view.destination, words)
    else:
        conn.real_port = target.port
        if target.port == 0 or is_ftp_data(service, view):
            conn.real_port = view.destination_port
        copy_address(address_of(conn, REAL, words), target.address, words)
    if flags & CONN_MASQUERADE:
        copy_address(address_of(conn, SOURCE, words), service.masquerade, words)
    else:
        copy_address(address_of(conn, SOURCE, words), view.source, words)
    # What the packet makes of it, forward() sees.
    conn.state = first_state(view.protocol)
    conn.deadline = now + FIRST_TIMEOUT * SECOND
    # Last, for it makes the record one.
    store_u8(&conn.protocol, view.protocol)


cdef inline void begin(
    Engine *engine, Conn *conn, const uint8_t *data, const View *view, int64_t now
) noexcept nogil:
    """Put a connection into the state after its first packet. An ICMP error leaves it as it is."""
    if not view.quoted:
        conn.state = next_state(
            conn.protocol, conn.state,
            machine_of(FROM_CLIENT, conn.flags & CONN_IN_ONLY, engine.settings.secure_tcp),
            event_of(data, view))
        conn.deadline = now + engine.timeouts[conn.timeouts][conn.state]


cdef inline bint is_same(Conn *one, Conn *other, uint32_t words) noexcept nogil:
    """Whether two connections with the same replies, or the same client, are one."""
    return (
        one.client_port == other.client_port
        and one.virtual_port == other.virtual_port
        and same_address(address_of(one, CLIENT, words), address_of(other, CLIENT, words), words)
        and same_address(address_of(one, VIRTUAL, words), address_of(other, VIRTUAL, words), words)
    )


cdef inline uint32_t contend(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, uint32_t outcome, Conn *other,
    int64_t now, Conn **made
) noexcept nogil:
    """As connect(), after a first try with this outcome and (locked) `other` in the way."""
    cdef bint masquerade = conn.flags & CONN_MASQUERADE
    cdef uint32_t tries = 1
    cdef uint32_t port = 0
    cdef uint32_t removals = PORTS_TRIED_MAX
    cdef bint over
    if masquerade:
        tries = min(engine.port_count, <uint32_t>PORTS_TRIED_MAX)
        port = ntohs(conn.source_port) - engine.port_first
    while outcome != INSERTED and outcome != FULL:
        if outcome == KNOWN and other.deadline > now and is_same(conn, other, words):
            made[0] = other
            break
        over = False
        if other is not NULL:
            # A datagram that was scheduled by itself has hardly more to say.
            over = other.deadline <= now or other.flags & CONN_ONE_WAY or (
                masquerade and tries <= PORTS_TRIED_MAX // 2 and is_closed(other.state))
            if over:
                other.deadline = now
            spin_unlock(&other.lock)
        if over and removals:
            # Somebody else may use it at this moment: then it stays.
            removals -= 1
            expire(engine, worker, other, words, now)
        else:
            tries -= 1
            if tries == 0:
                outcome = CLASH
                break
            port = port + 1 if port + 1 < engine.port_count else 0
            conn.source_port = htons(<uint16_t>(engine.port_first + port))
            compute_deltas(conn, words)
        outcome = insert(&engine.table, conn, words, &other)
    if outcome != INSERTED:
        discard(engine, conn, words)
    return outcome


cdef inline uint32_t connect(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, Dest *target, int64_t now,
    Conn **made
) noexcept nogil:
    """Make a connection to its destination of a record, locked, that was filled.

    When no masquerade port is free, that of a connection which both sides have closed is taken.
    INSERTED, or KNOWN when another worker just did it or (one-packet) an earlier datagram, and
    `made` is the connection, locked. FULL, or CLASH: the destination could not tell this
    connection from another one. Unless INSERTED the record was given back.
    """
    cdef uint32_t outcome
    cdef Conn *other = NULL
    if conn.flags & CONN_MASQUERADE:
        conn.source_port = htons(<uint16_t>(
            engine.port_first + next_random(&worker.random) % engine.port_count))
    compute_deltas(conn, words)
    outcome = insert(&engine.table, conn, words, &other)
    if unlikely(outcome != INSERTED):
        outcome = contend(engine, worker, conn, words, outcome, other, now, made)
        if outcome != INSERTED:
            return outcome
    made[0] = conn
    count_in(target, conn)
    traffic_of(worker, target.id).connections += 1
    worker.created += 1
    return INSERTED


cdef inline bint is_from_ftp(const Snapshot *snapshot, const View *view) noexcept nogil:
    """Whether it is an FTP server's own data connection: IPVS never schedules these."""
    return (
        snapshot.ftps and view.protocol == PROTOCOL_TCP
        and view.source_port == htons(FTP_DATA_PORT))


cdef inline bint opens(
    Engine *engine, const Snapshot *snapshot, Worker *worker, const View *view,
    svcdp_packet *packet, const Service *service, const Rule *rule
) noexcept nogil:
    """Whether the packet may open a connection; if not, its verdict is decided: ip_vs_core.c,
    ip_vs_schedule and the protocols' conn_schedule.
    """
    cdef bint silent
    if view.quoted:
        if not engine.settings.schedule_icmp:
            decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
            return False
        return True
    if not begins_connection(
        packet.data, view,
        engine.settings.sloppy_tcp if view.protocol == PROTOCOL_TCP
        else engine.settings.sloppy_sctp
    ):
        # Its connection is gone or was never ours: say so, rather than let the client wait,
        # unless a SYN would get silence too. SCTP knows no answer to that from who lacks its tag.
        silent = view.tcp_flags & TCP_RST or view.protocol == PROTOCOL_SCTP or (
            service.weight_total == 0 and rule.on_empty == SVCDP_VERDICT_DROP)
        if silent:
            decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_CONNECTION)
        else:
            reject(engine, worker, packet, view, SVCDP_REASON_NO_CONNECTION, SVCDP_ANSWER_DEFAULT)
        return False
    if unlikely(is_from_ftp(snapshot, view)):
        decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
        return False
    return True


cdef inline void serve_nobody(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, const Service *service,
    const Rule *rule
) noexcept nogil:
    """The verdict when no destination can be had: ip_vs_core.c, ip_vs_leave."""
    if view.quoted:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_DESTINATION)
    elif is_ftp_data(service, view):
        decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_DESTINATION)
    elif rule.on_empty == SVCDP_VERDICT_REJECT:
        reject(engine, worker, packet, view, SVCDP_REASON_NO_DESTINATION, rule.answer)
    else:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_DESTINATION)


cdef inline bint may_help(const Service *service, const Conn *conn) noexcept nogil:
    """Whether it is a control connection: the service may have other ports too."""
    return (
        conn.protocol == PROTOCOL_TCP and method_of(conn) == METHOD_MASQ
        and (conn.virtual_port == service.port or conn.virtual_port == htons(FTP_PORT)))


cdef inline Conn *find_awaited(
    Engine *engine, const View *view, int64_t now, uint32_t *found
) noexcept nogil:
    """The record, locked, of what a helper expects from some port of this client; or NULL.
    `found`: USE, or DROP as what else is for its destination.
    """
    cdef Conn *conn
    cdef View any_port = view[0]
    cdef uint32_t direction = 0
    any_port.source_port = 0
    any_port.hash = hash_flow(
        &engine.table.key, view.words, view.source, view.destination, 0, view.destination_port,
        view.protocol)
    found[0] = USE
    conn = find(&engine.table, &any_port, &direction)
    if conn is NULL:
        return NULL
    if conn.flags & CONN_WATCHED:
        found[0] = judge_watched(engine, conn, FROM_CLIENT, now)
        if found[0] == RESET:
            found[0] = DROP
    if found[0] == FORGET or not conn.flags & CONN_NO_CLIENT_PORT or conn.deadline <= now:
        found[0] = USE
        spin_unlock(&conn.lock)
        return NULL
    return conn


cdef inline Conn *expected_connection(
    Engine *engine, Worker *worker, const uint8_t *data, const View *view, int64_t now,
    uint32_t *found, uint8_t *reason
) noexcept nogil:
    """The connection, locked, of the first packet of one that a helper expected, and the packet's
    reason; or NULL. `found` as find_awaited() says; on DROP there is none.
    """
    cdef uint32_t outcome = FULL
    cdef uint64_t memory[RECORD_WORDS]
    cdef Conn *pattern = <Conn *>memory
    cdef Dest *target
    cdef Conn *made = NULL
    cdef Conn *conn = find_awaited(engine, view, now, found)
    if conn is NULL:
        return NULL
    if found[0] == DROP:
        spin_unlock(&conn.lock)
        return NULL
    memcpy(pattern, conn, RECORD_V4 if view.words == 1 else RECORD_V6)
    conn.deadline = now
    target = dest_of(&engine.destinations, pattern.destination)
    # Neither the helper nor a destination that drains is given up in between.
    add_u32(&engine.helpers.helpers[conn.extra].references, 1)
    add_u32(&target.references, 1)
    spin_unlock(&conn.lock)
    expire(engine, worker, conn, view.words, now)
    pattern.flags &= <uint16_t>~CONN_NO_CLIENT_PORT
    pattern.client_port = pattern.source_port = view.source_port
    begin(engine, pattern, data, view, now)
    conn = new_record(engine, worker, view.words, now)
    if conn is not NULL:
        copy_pattern(conn, pattern, view.words)
        outcome = connect(engine, worker, conn, view.words, target, now, &made)
    # Another worker may have been first.
    reason[0] = SVCDP_REASON_NEW if outcome == INSERTED else SVCDP_REASON_ESTABLISHED
    if outcome != INSERTED:
        helper_release(&engine.helpers, pattern.extra)
    add_u32(&target.references, <uint32_t>-1)
    return made


cdef inline bint is_unicast(const uint8_t *address, uint32_t words) noexcept nogil:
    if words == 1:
        return 0 < address[0] < 224
    return address[0] != 0xff


cdef inline void forward_once(
    Engine *engine, Worker *worker, svcdp_packet *packet, const Service *service,
    const View *view, Dest *target, int64_t now
) noexcept nogil:
    """One-packet scheduling where no reply is to be rewritten: a connection for this packet
    only, in no table.
    """
    cdef uint64_t memory[RECORD_WORDS]
    cdef Conn *conn = <Conn *>memory
    fill(
        engine, conn, service, view, target,
        flags_of(service, target, view, False), now)
    begin(engine, conn, packet.data, view, now)
    traffic_of(worker, target.id).connections += 1
    worker.created += 1
    worker.expired += 1
    forward(engine, worker, packet, view, conn, FROM_CLIENT, SVCDP_REASON_NEW, now)


cdef inline Conn *bypass(
    Engine *engine, Worker *worker, svcdp_packet *packet, const Service *service,
    const View *view, int64_t now
) noexcept nogil:
    """A connection to where the client meant: ip_vs_core.c, ip_vs_leave. NULL as
    new_connection() says.
    """
    cdef Conn *conn = new_record(engine, worker, view.words, now)
    cdef Conn *made = NULL
    cdef Dest *nobody = dest_of(&engine.destinations, 0)
    cdef uint32_t outcome = FULL
    if conn is not NULL:
        fill(engine, conn, service, view, nobody, flags_of(service, nobody, view, False), now)
        begin(engine, conn, packet.data, view, now)
        outcome = connect(engine, worker, conn, view.words, nobody, now, &made)
    if made is NULL:
        decide(
            worker, packet, SVCDP_VERDICT_DROP,
            SVCDP_REASON_TABLE_FULL if outcome == FULL else SVCDP_REASON_NO_PORT)
    return made


cdef inline Conn *new_connection(
    Engine *engine, Worker *worker, const Snapshot *snapshot, Service *service,
    svcdp_packet *packet, const View *view, int64_t now, uint8_t *reason
) noexcept nogil:
    """The connection, locked, for a packet of no known one to a service or (NULL) to none; and
    the packet's reason. NULL when it gets none: then its verdict is decided.
    """
    cdef const Rule *rule
    cdef Affinity affinity
    cdef Conn *conn
    cdef Conn *made = NULL
    cdef Dest *target
    cdef bint masquerade, sticky
    cdef int32_t member = -1
    cdef uint32_t outcome = CLASH
    cdef uint32_t control
    cdef uint32_t _
    if service is NULL:
        decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
        return NULL
    rule = rule_for(service, view.source, packet.mark)
    if rule is NULL:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_SOURCE_RANGE)
        return NULL
    if rule.subset is not NULL:
        service = rule.subset
    if not opens(engine, snapshot, worker, view, packet, service, rule):
        return NULL
    # A retry was let in before.
    if unlikely(drops_new(engine)) and not worker.avoided:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_OVERLOAD)
        return NULL
    if service.persistence:
        if not affinity_of(engine, service, packet.data, view, &affinity):
            decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_CALL_ID)
            return NULL
        member = sticky_member(engine, service, &affinity, now)
        if unlikely(service.is_passive) and member >= 0 and is_shunned(
            worker, service.members[member].destination
        ):
            member = -1
    sticky = member >= 0
    for _ in range(PICKS_MAX):
        if not sticky:
            if service.scheduler == SCHEDULER_PYTHON:
                member = engine.choose(service, view, worker)
            else:
                member = pick(
                    service, view, now, &engine.settings.expirations, &worker.random)
        if unlikely(service.is_passive):
            member = reconsider_member(engine, worker, service, view, member, now)
        if member < 0:
            if (
                engine.settings.cache_bypass and service.protocol == PROTOCOL_FWMARK
                and not view.quoted and is_unicast(view.destination, view.words)
            ):
                reason[0] = SVCDP_REASON_BYPASS
                return bypass(engine, worker, packet, service, view, now)
            serve_nobody(engine, worker, packet, view, service, rule)
            return NULL
        target = service.members[member].destination
        masquerade = target.config.method == METHOD_MASQ and (
            rule.masquerade
            or (service.has_masquerade and same_address(target.address, view.source, view.words)))
        if masquerade and not service.has_masquerade:
            decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_MASQUERADE)
            return NULL
        control = 0
        if service.persistence:
            control = hang_on(engine, service, &affinity, target, now)
        if service.one_packet and target.config.method != METHOD_MASQ \
                and view.protocol == PROTOCOL_UDP and not view.quoted:
            let_go(engine, view.words, control)
            forward_once(engine, worker, packet, service, view, target, now)
            return NULL
        conn = new_record(engine, worker, view.words, now)
        if unlikely(conn is NULL):
            outcome = FULL
        else:
            fill(
                engine, conn, service, view, target,
                flags_of(service, target, view, masquerade), now)
            begin(engine, conn, packet.data, view, now)
            if control and not conn.flags & CONN_ONE_WAY:
                conn.control = control
            outcome = connect(engine, worker, conn, view.words, target, now, &made)
        if unlikely(control):
            if outcome != INSERTED or not made.control:
                let_go(engine, view.words, control)
            elif is_established(made.state):
                assure(engine, made, view.words)
        if outcome == INSERTED and unlikely(service.is_attended):
            if service.is_passive:
                try_out(made, packet, view)
            elif may_help(service, made):
                give_helper(engine, made)
        # A scheduler written in Python is asked once for a connection.
        if outcome != CLASH or sticky or service.scheduler == SCHEDULER_PYTHON:
            break
    if outcome == FULL:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_TABLE_FULL)
    elif outcome == CLASH:
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_NO_PORT)
    elif outcome == KNOWN and made.flags & CONN_ONE_WAY:
        # Each datagram is a connection of its own.
        traffic_of(worker, made.destination).connections += 1
        reason[0] = SVCDP_REASON_NEW
    else:
        reason[0] = SVCDP_REASON_NEW if outcome == INSERTED else SVCDP_REASON_ESTABLISHED
    return made
