# The helper for FTP's data connections: what the control connection says of them is made true on
# both sides, and they are let through (ip_vs_ftp.c).
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from svcdp._core.ftp cimport *
from svcdp._core.memory cimport htons, ntohs
from svcdp._core.record cimport helper_release, insert_record
from svcdp._core.sequence cimport SeqDelta, move_numbers
from svcdp._core.worker cimport *
from svcdp._core.xmit cimport compute_deltas

cdef enum:
    # Seconds that an expected data connection may keep everybody waiting: IP_VS_TCP_S_LISTEN.
    EXPECTED_SECONDS = 120


cdef inline uint32_t helper_new(HelperPool *pool) noexcept nogil:
    """A helper for a control connection, or 0 when there are too many."""
    cdef uint32_t index = 0
    cdef Helper *helper
    spin_lock(&pool.lock)
    if pool.free:
        index = pool.free
        pool.free = pool.helpers[index].next
    elif pool.fresh < pool.limit:
        pool.fresh += 1
        index = pool.fresh
    spin_unlock(&pool.lock)
    if index:
        helper = &pool.helpers[index]
        memset(helper, 0, sizeof(Helper))
        helper.references = 1
    return index


cdef inline void give_helper(Engine *engine, Conn *conn) noexcept nogil:
    """Make a connection, locked, a control connection, if there is a helper left."""
    conn.extra = helper_new(&engine.helpers)
    if conn.extra:
        conn.flags |= CONN_HELPED


cdef inline void take_shifts(
    Engine *engine, Conn *conn, const SeqDelta *shifts
) noexcept nogil:
    """Go on with what another dataplane has shifted (NULL: nothing) in a connection, locked."""
    if shifts is not NULL and conn.flags & CONN_HELPED:
        memcpy(engine.helpers.helpers[conn.extra].ftp.seq, shifts, 2 * sizeof(SeqDelta))


cdef inline void expect(
    Engine *engine, Worker *worker, const View *view, Conn *control, uint32_t direction,
    uint16_t port
) noexcept nogil:
    """Have a data connection let through, once the control connection is not locked.

    From the server (active mode) it comes from the port below its control port, to `port` of the
    client; from the client (passive) from any port of his to `port` of the virtual address, which
    is the server's too.
    """
    cdef Conn *conn = <Conn *>worker.expected
    cdef uint32_t words = view.words
    memcpy(conn, control, RECORD_V4 if words == 1 else RECORD_V6)
    conn.flags &= <uint16_t>~(CONN_HELPED | CONN_SYNCED)
    conn.state = STATE_LISTEN
    conn.packets = 0
    conn.control = 0
    if direction == FROM_CLIENT:
        conn.client_port = conn.source_port = port
        conn.virtual_port = htons(<uint16_t>(ntohs(control.virtual_port) - 1))
        conn.real_port = htons(<uint16_t>(ntohs(control.real_port) - 1))
    else:
        conn.flags |= CONN_NO_CLIENT_PORT
        conn.client_port = conn.source_port = 0
        conn.virtual_port = conn.real_port = port
    conn.deadline = worker.now + EXPECTED_SECONDS * SECOND
    compute_deltas(conn, words)
    add_u32(&engine.helpers.helpers[conn.extra].references, 1)
    worker.expected_words = words


cdef inline void insert_expected(Engine *engine, Worker *worker) noexcept nogil:
    cdef Conn *conn = <Conn *>worker.expected
    cdef Dest *target = dest_of(&engine.destinations, conn.destination)
    if not insert_record(engine, worker, conn, worker.expected_words, target):
        helper_release(&engine.helpers, conn.extra)
    worker.expected_words = 0


cdef inline uint8_t help(
    Engine *engine, Worker *worker, svcdp_packet *packet, View *view, Conn *conn,
    uint32_t direction
) noexcept nogil:
    """Read and rewrite a packet of a control connection, before it is translated. PARSED, or why
    it cannot be sent.
    """
    cdef Helper *helper = &engine.helpers.helpers[conn.extra]
    cdef FtpControl *control = &helper.ftp
    cdef FtpMessage message
    cdef uint8_t kind = ftp_look(packet, view, direction == FROM_CLIENT, control, &message)
    cdef uint32_t outcome
    if kind == FTP_PASV_REPLY or kind == FTP_EPSV_REPLY:
        outcome = ftp_rewrite(
            packet, view, &control.seq[direction], &message,
            address_of(conn, VIRTUAL, view.words), message.port)
        if outcome == FTP_NO_HEADROOM:
            return SVCDP_REASON_NO_HEADROOM
        if outcome == FTP_WRITTEN:
            expect(engine, worker, view, conn, direction, message.port)
    elif (kind == FTP_PORT or kind == FTP_EPRT) and not conn.flags & CONN_MASQUERADE:
        # The server connects to the client itself, whose address it sees.
        expect(engine, worker, view, conn, direction, message.port)
    move_numbers(
        packet, view, &control.seq[direction], &control.seq[FROM_DESTINATION - direction])
    return PARSED
