# Along a connection: its state, its timer, its counters, and the packet's way on.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.frag cimport FragmentRoute, is_translatable, rewrite_fragment
from svcdp._core.helper cimport help
from svcdp._core.hop cimport fits, lower_ttl
from svcdp._core.mss cimport clamp_mss
from svcdp._core.relay cimport relay_tunnel_error
from svcdp._core.tunnel cimport send_through, tunnel_mss
from svcdp._core.worker cimport *
from svcdp._core.xmit cimport translate, translate_error


cdef inline void count(
    Traffic *traffic, const View *view, uint32_t direction
) noexcept nogil:
    if direction == FROM_CLIENT:
        traffic.packets_in += 1
        traffic.bytes_in += view.end
    else:
        traffic.packets_out += 1
        traffic.bytes_out += view.end


cdef inline void assure(Engine *engine, const Conn *conn, uint32_t words) noexcept nogil:
    """The template that a connection hangs on has served its client: drop_entry spares it."""
    store_u8(&record(&engine.table, pool_of(words), conn.control).state, TEMPLATE_ASSURED)


cdef inline void change_state(
    Engine *engine, Conn *conn, uint32_t direction, const uint8_t *data, const View *view,
    uint32_t words
) noexcept nogil:
    cdef uint32_t machine = machine_of(
        direction, conn.flags & CONN_IN_ONLY, engine.settings.secure_tcp)
    cdef uint8_t state = next_state(conn.protocol, conn.state, machine, event_of(data, view))
    cdef Dest *target
    if conn.control and (is_established(state) or (
        conn.protocol == PROTOCOL_UDP and direction == FROM_DESTINATION
    )):
        assure(engine, conn, words)
    if state != conn.state:
        if is_active(state) != is_active(conn.state):
            target = dest_of(&engine.destinations, conn.destination)
            add_i32(load_of(target, conn.state), -1)
            add_i32(load_of(target, state), 1)
        conn.state = state


cdef inline void refuse(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, uint8_t reason
) noexcept nogil:
    """The verdict on a client's packet that cannot be sent on as it is."""
    if reason == SVCDP_REASON_TIME_EXCEEDED:
        reject(engine, worker, packet, view, reason, SVCDP_ANSWER_TIME_EXCEEDED)
    elif reason == SVCDP_REASON_TOO_BIG and packet.answer_mtu:
        reject(engine, worker, packet, view, reason, SVCDP_ANSWER_TOO_BIG)
    else:
        decide(worker, packet, SVCDP_VERDICT_DROP, reason)


cdef inline uint8_t take_hop(
    Engine *engine, svcdp_packet *packet, const View *view, uint32_t method
) noexcept nogil:
    """A hop less to live where the core is to see to it: PARSED, or why the packet goes no
    further. Between a client and a server on this host it is none of ours.
    """
    if engine.settings.decrement_ttl and method != METHOD_LOCAL:
        return lower_ttl(packet.data, view.words)
    return PARSED


cdef inline uint8_t pass_hop(
    Engine *engine, svcdp_packet *packet, const View *view, uint32_t method, uint32_t mtu
) noexcept nogil:
    """What a router does before it sends a packet on: PARSED, or why it does not."""
    cdef uint8_t reason = take_hop(engine, packet, view, method)
    if reason != PARSED:
        return reason
    return fits(packet, view, 0 if method == METHOD_LOCAL else mtu)


cdef inline uint32_t mss_bound(const DestConfig *config, uint32_t words) noexcept nogil:
    """Bytes of TCP payload that fit the way to a destination; 0: unknown, or none."""
    cdef uint32_t headers = (20 if words == 1 else 40) + 20
    if config.method == METHOD_TUNNEL:
        return tunnel_mss(config, words)
    return config.mtu - headers if config.mtu > headers else 0


cdef inline void clamp(
    svcdp_packet *packet, const View *view, const Conn *conn, const DestConfig *config
) noexcept nogil:
    cdef uint32_t bound
    if conn.flags & CONN_CLAMP and view.tcp_flags & TCP_SYN:
        bound = mss_bound(config, view.words)
        if bound:
            clamp_mss(packet, view, bound)


cdef inline uint8_t send_by(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, const Dest *target,
    uint32_t method
) noexcept nogil:
    """Send a packet of a client by a forwarding method, all but NAT: PARSED, or why not."""
    cdef const DestConfig *config = target.config
    cdef uint8_t problem
    if method == METHOD_TUNNEL and unlikely(config.method != METHOD_TUNNEL):
        # The destination was edited. It still has the virtual address.
        method = METHOD_DR
    if method == METHOD_TUNNEL:
        problem = send_through(
            packet, view, target, config, engine.settings.pmtu_disc, &worker.random)
    else:
        problem = pass_hop(engine, packet, view, method, config.mtu)
    if problem == PARSED:
        packet.mark |= config.mark
        if method == METHOD_DR:
            packet.flags |= SVCDP_PACKET_NEXT_HOP
    return problem


cdef inline void send_to(
    Engine *engine, Worker *worker, svcdp_packet *packet, View *view, Conn *conn, uint8_t reason
) noexcept nogil:
    """Send a packet of the client by its connection's forwarding method."""
    cdef const Dest *target = dest_of(&engine.destinations, conn.destination)
    cdef uint32_t method = method_of(conn)
    cdef uint8_t problem = PARSED
    clamp(packet, view, conn, target.config)
    if conn.flags & CONN_HELPED and not view.quoted:
        problem = help(engine, worker, packet, view, conn, FROM_CLIENT)
    if problem == PARSED:
        problem = send_by(engine, worker, packet, view, target, method)
    if problem != PARSED:
        refuse(engine, worker, packet, view, problem)
        return
    if method == METHOD_MASQ:
        translate(packet, view, conn, view.words, FROM_CLIENT)
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void send_back(
    Engine *engine, Worker *worker, svcdp_packet *packet, View *view, Conn *conn, uint8_t reason
) noexcept nogil:
    """Send a reply on to the client. Those of other methods than masq are as they should be."""
    cdef uint8_t problem = take_hop(engine, packet, view, method_of(conn))
    clamp(packet, view, conn, dest_of(&engine.destinations, conn.destination).config)
    if conn.flags & CONN_HELPED and problem == PARSED:
        problem = help(engine, worker, packet, view, conn, FROM_DESTINATION)
    if problem != PARSED:
        # Who could be told is the destination, by a router that has an address of its own.
        decide(worker, packet, SVCDP_VERDICT_DROP, problem)
        return
    if method_of(conn) == METHOD_MASQ:
        translate(packet, view, conn, view.words, FROM_DESTINATION)
    else:
        conn.flags &= <uint16_t>~CONN_IN_ONLY
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void forward_tunnel_error(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint32_t direction
) noexcept nogil:
    """An ICMP error about a packet that we sent through a tunnel."""
    cdef const Dest *target = dest_of(&engine.destinations, conn.destination)
    cdef uint8_t problem
    if direction != FROM_DESTINATION or method_of(conn) != METHOD_TUNNEL:
        decide(worker, packet, SVCDP_VERDICT_PASS, SVCDP_REASON_NO_SERVICE)
        return
    problem = relay_tunnel_error(packet, view, target, target.config)
    if problem == PARSED:
        decide(worker, packet, SVCDP_VERDICT_FORWARD, SVCDP_REASON_RELATED)
    elif problem == SVCDP_REASON_CHECKSUM:
        decide(worker, packet, SVCDP_VERDICT_DROP, problem)
    else:
        # For the local stack, which learns the path's MTU.
        decide(worker, packet, SVCDP_VERDICT_PASS, problem)


cdef inline void forward_error(
    Engine *engine, Worker *worker, svcdp_packet *packet, View *view, Conn *conn,
    uint32_t direction
) noexcept nogil:
    """An ICMP error about a packet of the connection: ip_vs_core.c, ip_vs_in_icmp and
    handle_response_icmp. It is counted, and leaves the connection as it is.
    """
    cdef uint32_t method = method_of(conn)
    cdef uint8_t problem = PARSED
    if view.tunnel:
        forward_tunnel_error(engine, worker, packet, view, conn, direction)
        return
    if method != METHOD_MASQ and direction == FROM_CLIENT:
        count(traffic_of(worker, conn.destination), view, direction)
        send_to(engine, worker, packet, view, conn, SVCDP_REASON_RELATED)
        return
    if method == METHOD_MASQ:
        problem = translate_error(packet, view, conn, direction)
    if problem == PARSED:
        count(traffic_of(worker, conn.destination), view, direction)
        problem = take_hop(engine, packet, view, method)
    if problem != PARSED:
        # No error about an error (RFC 1122, 3.2.2).
        decide(worker, packet, SVCDP_VERDICT_DROP, problem)
        return
    if direction == FROM_CLIENT:
        packet.mark |= dest_of(&engine.destinations, conn.destination).config.mark
    decide(worker, packet, SVCDP_VERDICT_FORWARD, SVCDP_REASON_RELATED)


cdef inline void forward_fragment(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view,
    const FragmentRoute *route
) noexcept nogil:
    """A fragment without ports, after the first one of its packet."""
    cdef const Dest *target = dest_of(&engine.destinations, route.destination)
    cdef uint8_t problem
    packet.destination = route.destination
    count(traffic_of(worker, route.destination), view, route.direction)
    if route.direction == FROM_CLIENT:
        problem = send_by(engine, worker, packet, view, target, route.method)
    else:
        problem = take_hop(engine, packet, view, route.method)
    if problem != PARSED:
        decide(worker, packet, SVCDP_VERDICT_DROP, problem)
        return
    if route.method == METHOD_MASQ:
        rewrite_fragment(packet, view, route)
    decide(
        worker, packet, SVCDP_VERDICT_FORWARD,
        SVCDP_REASON_ESTABLISHED if route.direction == FROM_CLIENT else SVCDP_REASON_REPLY)


cdef inline bint may_split(
    const svcdp_packet *packet, const View *view, const Conn *conn
) noexcept nogil:
    """Whether the first fragment of a packet can be sent along the connection, and the others
    after it.
    """
    return method_of(conn) != METHOD_MASQ or is_translatable(
        packet, view,
        conn.real_port != conn.virtual_port or conn.source_port != conn.client_port)


cdef inline void use(
    Engine *engine, Worker *worker, const View *view, Conn *conn, uint32_t direction, int64_t now
) noexcept nogil:
    """Restart the connection's timer, and count the packet."""
    store_i64(&conn.deadline, now + engine.timeouts[conn.timeouts][conn.state])
    if direction == FROM_CLIENT:
        conn.packets += 1
    count(traffic_of(worker, conn.destination), view, direction)


cdef inline bint is_steady(const Conn *conn, const View *view) noexcept nogil:
    """Whether the packet leaves its connection's state as it is. ICMP errors have no flags."""
    if likely(conn.state == STATE_ESTABLISHED):
        return view.tcp_flags & TCP_STATE == TCP_ACK
    # A reply may have something to say to a template.
    return conn.state == STATE_UDP and conn.control == 0 and not view.quoted


cdef inline bint is_plain(
    Engine *engine, const Conn *conn, const View *view, uint32_t direction, int64_t now
) noexcept nogil:
    """Whether a packet changes nothing of its connection but timer and counters, and needs no
    more than its forwarding method does: most packets.
    """
    return (
        is_steady(conn, view)
        and not conn.flags & CONN_HELPED
        and not (
            conn.flags & CONN_WATCHED
            and dest_of(&engine.destinations, conn.destination).removed)
        and not (direction == FROM_DESTINATION and conn.flags & CONN_METHOD)
        and conn.deadline > now
        and not engine.is_attentive)


cdef inline bint is_simple(
    Engine *engine, const Conn *conn, const View *view
) noexcept nogil:
    """The same of the first packet of a connection of the client."""
    return not (
        view.quoted or view.fragment or conn.flags & (CONN_HELPED | CONN_CLAMP)
        or engine.is_attentive)


cdef inline void forward_plain(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, Conn *conn,
    uint32_t direction, uint8_t reason, int64_t now
) noexcept nogil:
    """Send such a packet along its connection."""
    cdef uint8_t problem
    packet.destination = conn.destination
    use(engine, worker, view, conn, direction, now)
    if direction == FROM_DESTINATION:
        # Constant arguments: the compiler makes one way of each family and direction.
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_DESTINATION)
        else:
            translate(packet, view, conn, 4, FROM_DESTINATION)
        decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)
        return
    if unlikely(conn.flags & (CONN_METHOD | CONN_ROUTED)):
        problem = send_by(
            engine, worker, packet, view, dest_of(&engine.destinations, conn.destination),
            method_of(conn))
        if unlikely(problem != PARSED):
            refuse(engine, worker, packet, view, problem)
            return
    if likely(not conn.flags & CONN_METHOD):
        if likely(view.words == 1):
            translate(packet, view, conn, 1, FROM_CLIENT)
        else:
            translate(packet, view, conn, 4, FROM_CLIENT)
    decide(worker, packet, SVCDP_VERDICT_FORWARD, reason)


cdef inline void forward(
    Engine *engine, Worker *worker, svcdp_packet *packet, View *view, Conn *conn,
    uint32_t direction, uint8_t reason, int64_t now
) noexcept nogil:
    """Send any packet along a connection, which the caller holds locked. The state of a new one
    is that after its first packet already.
    """
    cdef uint8_t before = conn.state
    cdef Watch *watch
    packet.destination = conn.destination
    if unlikely(view.quoted):
        forward_error(engine, worker, packet, view, conn, direction)
        return
    if unlikely(view.fragment and not may_split(packet, view, conn)):
        decide(worker, packet, SVCDP_VERDICT_DROP, SVCDP_REASON_FRAGMENT)
        return
    if reason != SVCDP_REASON_NEW and reason != SVCDP_REASON_BYPASS:
        change_state(engine, conn, direction, packet.data, view, view.words)
    use(engine, worker, view, conn, direction, now)
    watch = <Watch *>load_ordered_ptr(<void **>&engine.watch)
    if unlikely(watch is not NULL):
        watch_packet(
            &engine.table, watch, conn, view.words,
            dest_of(&engine.destinations, conn.destination).generation, direction, before)
    if direction == FROM_CLIENT:
        send_to(engine, worker, packet, view, conn, reason)
    else:
        send_back(engine, worker, packet, view, conn, reason)
