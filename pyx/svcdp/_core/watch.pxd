# Connections that another node should know of, by the rules of the IPVS sync protocol
# (ip_vs_sync.c, ip_vs_sync_conn): copied into a ring, for somebody to read in his own time.
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from svcdp._core.atomic cimport *
from svcdp._core.conn cimport *
from svcdp._core.proto cimport *

cdef enum:
    SYNCED_TCP_STATES = (
        1 << STATE_ESTABLISHED | 1 << STATE_FIN_WAIT | 1 << STATE_TIME_WAIT | 1 << STATE_CLOSE
        | 1 << STATE_CLOSE_WAIT)

cdef struct Noted:
    uint32_t words
    uint16_t generation        # of its destination
    uint64_t record[RECORD_WORDS]  # a copy of a Conn

cdef struct Watch:
    uint8_t lock
    uint32_t threshold         # packets after which a connection is told of,
    uint32_t period            # and again each time after so many more; 0: never again
    uint32_t size
    uint32_t head              # entries ever written, modulo 2^32
    uint32_t tail              # entries ever read
    uint64_t lost
    Noted *ring


cdef inline void note(
    Watch *watch, Conn *conn, uint32_t words, uint16_t generation
) noexcept nogil:
    """`conn` is locked."""
    cdef Noted *entry
    spin_lock(&watch.lock)
    if watch.head - watch.tail == watch.size:
        watch.lost += 1
    else:
        entry = &watch.ring[watch.head % watch.size]
        entry.words = words
        entry.generation = generation
        memcpy(entry.record, conn, RECORD_V4 if words == 1 else RECORD_V6)
        watch.head += 1
    spin_unlock(&watch.lock)


cdef inline bint is_due(
    const Watch *watch, const Conn *conn, uint32_t direction, uint8_t before
) noexcept nogil:
    """Whether to tell of a connection after a packet; `before` is the state that it had."""
    if conn.flags & CONN_ONE_WAY:
        return False
    if conn.protocol == PROTOCOL_TCP:
        if not SYNCED_TCP_STATES >> conn.state & 1:
            return False
        if conn.state != before and conn.state != STATE_ESTABLISHED:
            return True
    elif conn.protocol == PROTOCOL_SCTP and conn.state != before and (
        is_active(conn.state) or is_closed(conn.state)
    ):
        return True
    if direction == FROM_DESTINATION:
        return False
    if watch.period == 0:
        return conn.packets == watch.threshold
    return conn.packets % watch.period == watch.threshold % watch.period


cdef inline void watch_packet(
    Table *table, Watch *watch, Conn *conn, uint32_t words, uint16_t generation,
    uint32_t direction, uint8_t before
) noexcept nogil:
    """After a packet of a connection, which is locked: note it if it is due, and its template.
    `generation` is that of its destination.
    """
    cdef Conn *template
    if not is_due(watch, conn, direction, before):
        return
    note(watch, conn, words, generation)
    if conn.control:
        template = record(table, pool_of(words), conn.control)
        spin_lock(&template.lock)
        note(watch, template, words, 0)
        spin_unlock(&template.lock)
