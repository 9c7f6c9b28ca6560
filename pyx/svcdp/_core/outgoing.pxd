# Connections that a destination begins: ip_vs_core.c, __ip_vs_rs_conn_out.
#
# A SIP server calls too. Its client is to see the virtual address, and to reach the same server
# with what belongs to that call.
from libc.stdint cimport int64_t, uint64_t

from svcdp._core.connect cimport *

cdef inline uint32_t take_over(
    Engine *engine, Worker *worker, Conn *pattern, const View *view, Dest *target, int64_t now,
    Conn **made
) noexcept nogil:
    """As connect(), but where the client's port is another connection's that one ends: who called
    last has the client's packets.
    """
    cdef Conn *other
    cdef Conn *conn
    cdef uint32_t outcome, _
    for _ in range(2):
        conn = new_record(engine, worker, view.words, now)
        if conn is NULL:
            return FULL
        copy_pattern(conn, pattern, view.words)
        outcome = connect(engine, worker, conn, view.words, target, now, made)
        if outcome != KNOWN or is_flow_of(made[0], FROM_DESTINATION, view):
            return outcome
        other = made[0]
        made[0] = NULL
        other.deadline = now
        spin_unlock(&other.lock)
        expire(engine, worker, other, view.words, now)
    return CLASH


cdef inline bint has_member(const Service *service, const Dest *target) noexcept nogil:
    cdef uint32_t i
    for i in range(service.member_count):
        if service.members[i].destination == target:
            return True
    return False


cdef inline Conn *outgoing_connection(
    Engine *engine, Worker *worker, const Snapshot *snapshot, const svcdp_packet *packet,
    const View *view, int64_t now
) noexcept nogil:
    """The connection, locked, for the first packet of a call of a destination; or NULL, if it is
    none, or there is no room for it.
    """
    cdef uint64_t memory[RECORD_WORDS]
    cdef Conn *pattern = <Conn *>memory
    cdef Conn *conn = NULL
    cdef View client = view[0]
    cdef Affinity affinity
    cdef Dest *target = NULL
    cdef const Rule *rule
    cdef uint32_t control
    cdef const Service *service = server_find(
        &engine.table.key, snapshot, view.source, view.words, view.source_port, view.protocol,
        &target)
    if service is NULL or view.quoted or target.config.method != METHOD_MASQ:
        return NULL
    # What the client would send.
    client.source = view.destination
    client.source_port = view.destination_port
    client.destination = service.address
    client.destination_port = service.port
    rule = rule_for(service, client.source, 0)
    if rule is NULL or (rule.subset is not NULL and not has_member(rule.subset, target)):
        return NULL
    if not affinity_of(engine, service, packet.data, &client, &affinity):
        return NULL
    fill(
        engine, pattern, service, &client, target, flags_of(service, target, &client, False), now)
    control = hang_on(engine, service, &affinity, target, now)
    pattern.control = 0 if pattern.flags & CONN_ONE_WAY else control
    if (
        take_over(engine, worker, pattern, view, target, now, &conn) != INSERTED
        or not pattern.control
    ):
        let_go(engine, view.words, control)
    return conn
