# Forgetting: connections whose time is over, and half-open ones when there are too many.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from svcdp._core.affinity cimport let_go
from svcdp._core.passive cimport asked_at, blame_silence, readmit_due
from svcdp._core.random cimport next_random
from svcdp._core.record cimport helper_release
from svcdp._core.worker cimport *

cdef enum:
    SWEEP_URGENT = 256         # records looked at for a new connection when the table is full
    DROP_ENTRY_SHARE = 32      # of the records, each second: ip_vs_random_dropentry
    DROP_ENTRY_MAX = 8192
    NEARLY_FULL_SHARE = 8      # the table is nearly full when less than this part of it is free

    # What a packet finds when it finds a connection.
    USE = 0
    FORGET = 1                 # the connection is over: the packet is one of none
    DROP = 2
    RESET = 3


cdef inline bint expire(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, int64_t before
) noexcept nogil:
    """Remove a connection unless it has been used since; whether it was removed. The caller does
    not hold it locked.
    """
    cdef Conn was
    if not remove(&engine.table, conn, words, before, &was):
        return False
    if was.protocol == CONN_TEMPLATE:
        return True
    count_out(dest_of(&engine.destinations, was.destination), &was)
    let_go(engine, words, was.control)
    if was.extra and not was.flags & CONN_TRIED:
        helper_release(&engine.helpers, was.extra)
    if was.flags & CONN_NO_CLIENT_PORT:
        add_u32(&engine.expected, <uint32_t>-1)
    worker.expired += 1
    return True


cdef inline bint is_orphan(Engine *engine, const Conn *conn) noexcept nogil:
    """A connection that is to be forgotten because its destination is gone. UDP has no end to
    wait for.
    """
    cdef const Dest *target
    if not conn.flags & CONN_WATCHED or conn.protocol == CONN_FREE:
        return False
    target = dest_of(&engine.destinations, conn.destination)
    return target.removed and (
        target.on_removal == REMOVAL_EXPIRE
        or (target.on_removal != REMOVAL_DROP and conn.protocol == PROTOCOL_UDP))


cdef inline bint is_time_up(const Dest *target, int64_t now) noexcept nogil:
    """Whether connections of a removed destination had the time that REMOVAL_RESET leaves them."""
    cdef int64_t due = load_i64(&target.reset_at)
    return target.grace == 0 if due == 0 else due <= now


cdef inline void start_grace(Engine *engine, const Conn *conn, int64_t now) noexcept nogil:
    """That time begins with the first packet: nobody else knows what time it is."""
    cdef Dest *target = dest_of(&engine.destinations, conn.destination)
    if (
        target.removed and target.on_removal == REMOVAL_RESET
        and load_i64(&target.reset_at) == 0
    ):
        store_i64(&target.reset_at, now + target.grace)


cdef inline uint32_t judge_watched(
    Engine *engine, const Conn *conn, uint32_t direction, int64_t now
) noexcept nogil:
    """What a packet finds in a connection of CONN_WATCHED."""
    cdef const Dest *target = dest_of(&engine.destinations, conn.destination)
    if likely(not target.removed):
        return USE
    if target.on_removal == REMOVAL_RESET and conn.protocol != PROTOCOL_UDP:
        if not is_time_up(target, now):
            return USE
        return RESET if conn.protocol == PROTOCOL_TCP else FORGET
    if direction == FROM_DESTINATION:
        return USE
    if target.on_removal == REMOVAL_DROP:
        return DROP
    return FORGET if is_orphan(engine, conn) else USE


cdef inline bint controls(Engine *engine, const Conn *conn) noexcept nogil:
    """Whether other connections hang on this record; it then outlives its time:
    ip_vs_conn_expire. It is locked.
    """
    if conn.protocol == CONN_TEMPLATE:
        return load_u32(&conn.packets) != 0
    return (
        conn.protocol != CONN_FREE and conn.flags & CONN_HELPED
        and load_u32(&engine.helpers.helpers[conn.extra].references) > 1)


cdef inline void sweep_record(
    Engine *engine, Worker *worker, Conn *conn, uint32_t words, int64_t now
) noexcept nogil:
    cdef bint over, is_unanswered
    cdef uint32_t id
    cdef int64_t asked = 0
    if load_u8(&conn.protocol) == CONN_FREE:
        return
    if load_i64(&conn.deadline) > now and not load_u16(&conn.flags) & CONN_WATCHED:
        return
    spin_lock(&conn.lock)
    if unlikely(conn.flags & CONN_TRIED):
        asked = asked_at(engine, conn)
    if is_orphan(engine, conn):
        conn.deadline = now
    elif conn.deadline <= now and controls(engine, conn):
        conn.deadline = now + 60 * SECOND
    if conn.flags & CONN_WATCHED and conn.protocol != CONN_FREE:
        start_grace(engine, conn, now)
    over = conn.protocol != CONN_FREE and conn.deadline <= now
    is_unanswered = (
        conn.flags & CONN_TRIED and not conn.is_blamed and is_half_open(conn.state))
    id = conn.destination
    spin_unlock(&conn.lock)
    if over and expire(engine, worker, conn, words, now) and unlikely(is_unanswered):
        blame_silence(engine, worker, dest_of(&engine.destinations, id), asked, now)


cdef inline uint32_t next_record(uint32_t index, uint32_t fresh) noexcept nogil:
    """Record 0 is never used."""
    return index + 1 if index + 1 < fresh else 1


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
            index = next_record(index, fresh)
            sweep_record(
                engine, worker, record(&engine.table, pool, index), 4 if pool else 1, now)


cdef inline bint is_dispensable(
    Engine *engine, Worker *worker, Conn *conn, int64_t now
) noexcept nogil:
    """Whether an overloaded table drops the connection: ip_vs_conn.c, ip_vs_random_dropentry.
    `conn` is locked.
    """
    cdef int64_t idle
    if conn.protocol == CONN_FREE or conn.flags & CONN_ONE_WAY or controls(engine, conn):
        return False
    if conn.protocol == CONN_TEMPLATE:
        return conn.state != TEMPLATE_ASSURED
    if is_half_open(conn.state):
        return True
    if not is_established(conn.state) and conn.protocol != PROTOCOL_UDP:
        return False
    idle = engine.timeouts[conn.timeouts][conn.state] - (conn.deadline - now)
    if idle < 60 * SECOND or conn.packets > 8 or conn.packets == 0:
        return False
    return next_random(&worker.random) % conn.packets == 0


cdef inline void drop_entries(Engine *engine, Worker *worker, int64_t now) noexcept nogil:
    """Make room at the cost of connections that are least worth it."""
    cdef uint32_t pool, fresh, index, _
    cdef Conn *conn
    cdef bint over
    for pool in range(2):
        fresh = load_acquire_u32(&engine.table.pools[pool].fresh)
        if fresh <= 1:
            continue
        index = <uint32_t>(next_random(&worker.random) % (fresh - 1))
        for _ in range(min((fresh - 1) // DROP_ENTRY_SHARE + 1, <uint32_t>DROP_ENTRY_MAX)):
            index = next_record(index, fresh)
            conn = record(&engine.table, pool, index)
            spin_lock(&conn.lock)
            over = is_dispensable(engine, worker, conn, now)
            if over:
                conn.deadline = now
            spin_unlock(&conn.lock)
            if over:
                expire(engine, worker, conn, 4 if pool else 1, now)


cdef inline bint acts(uint8_t mode, bint nearly_full) noexcept nogil:
    return mode == 3 or (mode != 0 and nearly_full)


cdef inline void look_at_load(Engine *engine, Worker *worker, int64_t now) noexcept nogil:
    """Once a second: see whether to defend the table (svcdp.Settings, drop_entry and so on)."""
    cdef uint32_t limit = engine.table.limit
    cdef bint nearly_full
    store_i64(&engine.second, now + SECOND)
    nearly_full = load_u32(&engine.table.count) > limit - limit // NEARLY_FULL_SHARE
    if acts(engine.settings.drop_packet, nearly_full):
        if engine.drop_rate == 0:
            store_u32(&engine.drop_count, 0)
        store_u32(&engine.drop_rate, engine.settings.am_droprate)
    else:
        store_u32(&engine.drop_rate, 0)
    if acts(engine.settings.drop_entry, nearly_full):
        drop_entries(engine, worker, now)
    readmit_due(engine, now)


cdef inline bint drops_new(Engine *engine) noexcept nogil:
    """Whether the overload policy drops this packet, which would open a connection: one in
    `drop_rate`, the first included (ip_vs_todrop).
    """
    cdef uint32_t rate = load_u32(&engine.drop_rate)
    return rate != 0 and (add_u32(&engine.drop_count, 1) - 1) % rate == 0
