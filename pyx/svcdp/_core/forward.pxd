# Along a connection: its state, its timer, its counters, and the packet's way on.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.worker cimport *
from svcdp._core.xmit cimport translate, translate_error


cdef inline void change_state(
    Engine *engine, Conn *conn, uint32_t direction, const uint8_t *data, const View *view,
    uint32_t words
) noexcept nogil:
    cdef uint32_t machine = machine_of(
        direction, conn.flags & CONN_IN_ONLY, engine.settings.secure_tcp)
    cdef uint8_t state = next_state(conn.protocol, conn.state, machine, event_of(data, view))
    cdef Dest *target
    if conn.control and (state == STATE_ESTABLISHED or (
        conn.protocol == PROTOCOL_UDP and direction == FROM_DESTINATION
    )):
        store_u8(
            &record(&engine.table, pool_of(words), conn.control).state, TEMPLATE_ASSURED)
    if state != conn.state:
        if is_active(state) != is_active(conn.state):
            target = dest_of(&engine.destinations, conn.destination)
            add_i32(load_of(target, conn.state), -1)
            add_i32(load_of(target, state), 1)
        conn.state = state


cdef inline void send_to(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint8_t reason
) noexcept nogil:
    """Send a packet of the client by its connection's forwarding method."""
    cdef const Dest *target = dest_of(&engine.destinations, conn.destination)
    cdef const DestConfig *config = target.config
    if method_of(conn) == METHOD_MASQ:
        translate(packet, view, conn, view.words, FROM_CLIENT)
    elif method_of(conn) == METHOD_DR:
        packet.flags |= SVCDP_PACKET_NEXT_HOP
    packet.mark |= config.mark
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void send_back(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint8_t reason
) noexcept nogil:
    """Send a reply on to the client. Those of other methods than masq are as they should be."""
    if method_of(conn) == METHOD_MASQ:
        translate(packet, view, conn, view.words, FROM_DESTINATION)
    else:
        conn.flags &= <uint16_t>~CONN_IN_ONLY
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void forward_error(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint32_t direction
) noexcept nogil:
    """An ICMP error about a packet of the connection: ip_vs_core.c, ip_vs_in_icmp."""
    if method_of(conn) == METHOD_MASQ:
        translate_error(packet, view, conn, direction)
    elif direction == FROM_CLIENT:
        send_to(engine, worker, packet, view, conn, SVCDP_REASON_RELATED)
        return
    decide(worker, packet, SVCDP_VERDICT_FORWARD, SVCDP_REASON_RELATED)


cdef inline void forward(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint32_t direction, uint8_t reason, int64_t now
) noexcept nogil:
    """Send a packet along a connection, which the caller holds locked."""
    cdef Traffic *traffic
    cdef uint8_t before = conn.state
    packet.destination = conn.destination
    if unlikely(view.quoted):
        forward_error(engine, worker, packet, view, conn, direction)
        return
    # ESTABLISHED stays so until a flag other than ACK (or PSH, URG) says otherwise.
    if unlikely(conn.state != STATE_ESTABLISHED or view.tcp_flags & TCP_STATE != TCP_ACK):
        change_state(engine, conn, direction, packet.data, view, view.words)
    store_i64(&conn.deadline, now + engine.timeouts[conn.timeouts][conn.state])
    traffic = traffic_of(worker, conn.destination)
    # Constant arguments: the compiler makes one way of each family and direction.
    if direction == FROM_CLIENT:
        conn.packets += 1
        traffic.packets_in += 1
        traffic.bytes_in += view.end
        if unlikely(engine.watch is not NULL):
            watch_packet(&engine.table, engine.watch, conn, view.words, before)
        if unlikely(conn.flags & CONN_UNUSUAL or engine.settings.decrement_ttl):
            send_to(engine, worker, packet, view, conn, reason)
            return
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_CLIENT)
        else:
            translate(packet, view, conn, 4, FROM_CLIENT)
    else:
        traffic.packets_out += 1
        traffic.bytes_out += view.end
        if unlikely(conn.flags & CONN_UNUSUAL or engine.settings.decrement_ttl):
            send_back(engine, worker, packet, view, conn, reason)
            return
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_DESTINATION)
        else:
            translate(packet, view, conn, 4, FROM_DESTINATION)
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)
