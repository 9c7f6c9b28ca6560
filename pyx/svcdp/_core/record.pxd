# Records of connections, from a pattern to their place in the table.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from svcdp._core.worker cimport *


cdef inline void helper_release(HelperPool *pool, uint32_t index) noexcept nogil:
    """One connection less uses a helper; the last one frees it."""
    cdef Helper *helper = &pool.helpers[index]
    if add_u32(&helper.references, <uint32_t>-1) == 0:
        spin_lock(&pool.lock)
        helper.next = pool.free
        pool.free = index
        spin_unlock(&pool.lock)


cdef inline void discard(Engine *engine, Conn *conn, uint32_t words) noexcept nogil:
    """Give back a record, locked, that did not get into the table."""
    store_u8(&conn.protocol, CONN_FREE)
    release(&engine.table, conn, words)
    spin_unlock(&conn.lock)


cdef inline void copy_pattern(Conn *conn, const Conn *pattern, uint32_t words) noexcept nogil:
    """All but the lock, which is held; the protocol last, for it makes the record one."""
    # Constant sizes: moves, and no call.
    if words == 1:
        memcpy(<uint8_t *>conn + 2, <const uint8_t *>pattern + 2, RECORD_V4 - 2)
    else:
        memcpy(<uint8_t *>conn + 2, <const uint8_t *>pattern + 2, RECORD_V6 - 2)
    store_u8(&conn.protocol, pattern.protocol)


cdef inline bint insert_record(
    Engine *engine, Worker *worker, const Conn *pattern, uint32_t words, Dest *target
) noexcept nogil:
    """Put a connection into the table that nobody knows yet. False: there is no room, or another
    one is in the way.
    """
    cdef Conn *other = NULL
    cdef Conn *conn = allocate(&engine.table, words)
    cdef uint32_t outcome
    if conn is NULL:
        return False
    spin_lock(&conn.lock)
    copy_pattern(conn, pattern, words)
    outcome = insert(&engine.table, conn, words, &other)
    if other is not NULL:
        spin_unlock(&other.lock)
    if outcome != INSERTED:
        discard(engine, conn, words)
        return False
    if conn.flags & CONN_NO_CLIENT_PORT:
        add_u32(&engine.expected, 1)
    count_in(target, conn)
    spin_unlock(&conn.lock)
    worker.created += 1
    return True
