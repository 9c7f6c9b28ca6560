# The connection table, per packet.
#
# A connection is one record: 64 bytes (IPv4) or 128 (IPv6), on cache lines of its own. An index
# of 8-byte slots, open addressing with linear probing and at most half full, leads to it from
# both of its directions, by one probe each.
#
#   slot    hash (32) | record (29) | family (1) | direction (1) | 1
#
# Workers share the table. The index is cut into stripes, each with its own lock; a probe stays
# inside one stripe. Readers take no stripe lock: they find a slot, lock the *record* and compare
# the key. Whoever inserts or removes holds the stripe locks of both directions, the lower stripe
# first, and then the record's; only a record that is not in the table yet is locked before them,
# by its maker. A removal moves slots, so a reader that found nothing asks the
# stripe's sequence number whether it may believe that.
#
# Persistence templates are records too, of CONN_TEMPLATE as protocol, with a slot for the client's
# direction only, and so have connections that a helper expects (CONN_NO_CLIENT_PORT). One-packet
# connections (CONN_ONE_WAY) have one for their replies only.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.atomic cimport *
from svcdp._core.hash cimport HashKey, hash_flow
from svcdp._core.memory cimport copy_address, same_address
from svcdp._core.packet cimport View

cdef enum:
    # Directions: whose packets these are.
    FROM_CLIENT = 0
    FROM_DESTINATION = 1

    # Conn.protocol, when it is not an IP protocol number. 0 marks a free record: no service can
    # have IPv6's hop-by-hop options as protocol. 255 is reserved by IANA.
    CONN_FREE = 0
    CONN_TEMPLATE = 255

    # Conn.flags
    CONN_MASQUERADE = 1
    CONN_METHOD = 14           # METHOD_TUNNEL and so on, << CONN_METHOD_SHIFT
    CONN_METHOD_SHIFT = 1
    CONN_IN_ONLY = 16          # of tunnel and dr, until a reply is seen
    CONN_ONE_WAY = 32          # one-packet scheduling: a slot for replies only
    CONN_NO_CLIENT_PORT = 64   # expected from whatever port of the client (FTP)
    CONN_SYNCED = 128          # made by a message of the sync protocol
    CONN_WATCHED = 256         # each packet looks whether the destination was removed
    CONN_ROUTED = 512          # the destination has a mark or an MTU
    CONN_CLAMP = 1024          # the MSS of SYNs is bounded
    CONN_HELPED = 2048         # the control connection of a helper (FTP)
    CONN_TRIED = 4096          # whether the destination answers is to be seen: passive.pxd

    # Conn.state of a template: a connection of it was established.
    TEMPLATE_ASSURED = 1

    # Addresses of a connection, in record order.
    CLIENT = 0
    VIRTUAL = 1
    REAL = 2
    SOURCE = 3        # what the destination sees as client

    RECORD_V4 = 64
    RECORD_V6 = 128
    RECORD_WORDS = 16          # 64-bit words that hold either

    # insert(), attach()
    INSERTED = 0
    FULL = 1
    KNOWN = 2         # the client's direction is in the table already
    CLASH = 3         # the destination's direction is

cdef struct Conn:
    uint8_t lock
    uint8_t protocol
    uint8_t state
    uint8_t timeouts           # class of timeouts
    uint32_t destination       # id; of a free record the next free one
    int64_t deadline           # ns, on the caller's clock
    uint16_t client_port       # ports in wire order
    uint16_t virtual_port
    uint16_t real_port
    uint16_t source_port
    uint16_t ip_delta          # checksum deltas of the client's direction
    uint16_t transport_delta
    uint32_t packets           # from the client; of a template the connections that hang on it
    uint32_t control           # record of the template, 0: none
    uint16_t flags
    uint16_t is_blamed         # CONN_TRIED: the destination was, for the SYN seen last
    uint32_t fwmark            # of the service, 0: none
    # Record of what a helper knows, 0: none. Of CONN_TRIED: the SYN's sequence number, wire order.
    uint32_t extra
    # The four addresses follow, of 1 or 4 words each.

cdef struct Stripe:
    uint8_t lock
    uint32_t used
    uint32_t sequence          # odd while slots move
    uint8_t padding[52]

cdef struct Pool:
    uint8_t *records
    uint32_t fresh             # records from here on were never used; 0 is never used
    uint32_t free              # first of the free list, 0 at its end
    uint8_t lock

cdef struct Table:
    uint64_t *slots
    Stripe *stripes
    uint32_t mask              # slots - 1
    uint32_t stripe_mask       # slots a stripe - 1
    uint32_t stripe_shift
    uint32_t limit             # records that may be in use
    uint32_t count             # records in use, both families, templates included
    uint32_t templates
    Pool pools[2]              # IPv4, IPv6
    HashKey key


cdef inline uint8_t *address_of(Conn *conn, uint32_t which, uint32_t words) noexcept nogil:
    return <uint8_t *>conn + sizeof(Conn) + 4 * words * which


cdef inline uint32_t method_of(const Conn *conn) noexcept nogil:
    return (conn.flags & CONN_METHOD) >> CONN_METHOD_SHIFT


cdef inline bint has_both(const Conn *conn) noexcept nogil:
    """Whether both directions have a slot."""
    return conn.protocol != CONN_TEMPLATE and not conn.flags & (CONN_ONE_WAY | CONN_NO_CLIENT_PORT)


cdef inline uint32_t first_direction(const Conn *conn) noexcept nogil:
    """The direction that always has a slot."""
    return FROM_DESTINATION if conn.flags & CONN_ONE_WAY else FROM_CLIENT


cdef inline uint32_t pool_of(uint32_t words) noexcept nogil:
    return words >> 2


cdef inline Conn *record(Table *table, uint32_t pool, uint32_t index) noexcept nogil:
    # RECORD_V4 or RECORD_V6 bytes each.
    return <Conn *>(table.pools[pool].records + (<uint64_t>index << (6 + pool)))


cdef inline uint32_t index_of(Table *table, Conn *conn, uint32_t words) noexcept nogil:
    return <uint32_t>(
        (<uint8_t *>conn - table.pools[pool_of(words)].records) // (RECORD_V4 << pool_of(words))
    )


cdef inline uint64_t make_slot(
    uint64_t hash, uint32_t index, uint32_t words, uint32_t direction
) noexcept nogil:
    return (
        (hash << 32) | (<uint64_t>index << 3) | (pool_of(words) << 2) | (direction << 1) | 1
    )


cdef inline uint64_t conn_hash(
    Table *table, Conn *conn, uint32_t words, uint32_t direction
) noexcept nogil:
    if direction == FROM_CLIENT:
        return hash_flow(
            &table.key, words, address_of(conn, CLIENT, words), address_of(conn, VIRTUAL, words),
            conn.client_port, conn.virtual_port, conn.protocol)
    return hash_flow(
        &table.key, words, address_of(conn, REAL, words), address_of(conn, SOURCE, words),
        conn.real_port, conn.source_port, conn.protocol)


cdef inline bint is_flow_of(
    Conn *conn, uint32_t direction, const View *view
) noexcept nogil:
    """Whether the view's 5-tuple is this connection's, in this direction."""
    cdef uint32_t words = view.words
    if conn.protocol != view.protocol:
        return False
    if direction == FROM_CLIENT:
        return (
            conn.client_port == view.source_port
            and conn.virtual_port == view.destination_port
            and same_address(address_of(conn, CLIENT, words), view.source, words)
            and same_address(address_of(conn, VIRTUAL, words), view.destination, words)
        )
    return (
        conn.real_port == view.source_port
        and conn.source_port == view.destination_port
        and same_address(address_of(conn, REAL, words), view.source, words)
        and same_address(address_of(conn, SOURCE, words), view.destination, words)
    )


cdef inline Stripe *stripe_of(Table *table, uint64_t hash) noexcept nogil:
    return &table.stripes[(<uint32_t>hash & table.mask) >> table.stripe_shift]


cdef inline uint32_t next_position(Table *table, uint32_t position) noexcept nogil:
    """The position after this one, around the stripe."""
    return (position & ~table.stripe_mask) | ((position + 1) & table.stripe_mask)


cdef inline void prefetch_slot(Table *table, const View *view) noexcept nogil:
    prefetch(&table.slots[<uint32_t>view.hash & table.mask])


cdef inline void prefetch_record(Table *table, View *view) noexcept nogil:
    """Fetch the record that the first slot with the view's hash names, and expect the flow's
    connection there. Without such a slot the flow is most likely unknown.
    """
    cdef uint32_t position = <uint32_t>view.hash & table.mask
    cdef uint32_t _
    cdef uint64_t slot
    view.expected = NULL
    for _ in range(8):
        slot = load_u64(&table.slots[position])
        if slot == 0:
            return
        if slot >> 32 == <uint32_t>view.hash and ((slot >> 2) & 1) == pool_of(view.words):
            view.expected = record(table, (slot >> 2) & 1, <uint32_t>slot >> 3)
            view.expected_direction = (slot >> 1) & 1
            prefetch(view.expected)
            return
        position = next_position(table, position)


cdef inline bint is_absent(const Table *table, uint64_t hash) noexcept nogil:
    """Whether no flow of this hash is in the table, told by the first slot of its probe. False
    proves nothing. What is in the table has no empty slot before it at any moment, also while
    drop_slot() moves others.
    """
    return load_acquire_u64(&table.slots[<uint32_t>hash & table.mask]) == 0


cdef inline Conn *probe(
    Table *table, const View *view, uint32_t *direction
) noexcept nogil:
    """The connection of the view's flow, locked, or NULL. Takes no stripe lock."""
    cdef uint32_t position = <uint32_t>view.hash & table.mask
    cdef uint64_t slot
    cdef uint32_t _
    cdef Conn *conn
    for _ in range(table.stripe_mask + 1):
        slot = load_acquire_u64(&table.slots[position])
        if slot == 0:
            return NULL
        if slot >> 32 == <uint32_t>view.hash and ((slot >> 2) & 1) == pool_of(view.words):
            conn = record(table, (slot >> 2) & 1, <uint32_t>slot >> 3)
            spin_lock(&conn.lock)
            direction[0] = (slot >> 1) & 1
            if is_flow_of(conn, direction[0], view):
                return conn
            spin_unlock(&conn.lock)
        position = next_position(table, position)
    return NULL


cdef inline Conn *find_expected(const View *view, uint32_t *direction) noexcept nogil:
    """The connection of the view's flow, locked, if it is where prefetch_record() expected it.

    What the record says counts, not the slot, which may have moved. NULL proves nothing: then
    ask find().
    """
    cdef Conn *conn = <Conn *>view.expected
    if conn is NULL:
        return NULL
    spin_lock(&conn.lock)
    direction[0] = view.expected_direction
    if likely(is_flow_of(conn, direction[0], view)):
        return conn
    spin_unlock(&conn.lock)
    return NULL


cdef inline Conn *search(Table *table, const View *view, uint32_t *direction) noexcept nogil:
    """As find(), for a flow that may be there."""
    cdef Stripe *stripe = stripe_of(table, view.hash)
    cdef uint32_t sequence = load_acquire_u32(&stripe.sequence)
    cdef Conn *conn = probe(table, view, direction)
    if conn is not NULL or (
        not sequence & 1 and load_acquire_u32(&stripe.sequence) == sequence
    ):
        return conn
    spin_lock(&stripe.lock)
    conn = probe(table, view, direction)
    spin_unlock(&stripe.lock)
    return conn


cdef inline Conn *find(Table *table, const View *view, uint32_t *direction) noexcept nogil:
    """The connection of the view's flow, locked, or NULL when there is none."""
    if likely(is_absent(table, view.hash)):
        return NULL
    return search(table, view, direction)


cdef inline void lock_stripes(Stripe *one, Stripe *other) noexcept nogil:
    if one > other:
        one, other = other, one
    spin_lock(&one.lock)
    if one != other:
        spin_lock(&other.lock)


cdef inline void unlock_stripes(Stripe *one, Stripe *other) noexcept nogil:
    if one != other:
        spin_unlock(&other.lock)
    spin_unlock(&one.lock)


cdef inline bint has_room(const Table *table, const Stripe *stripe) noexcept nogil:
    """Whether a stripe can take two more slots and keep some empty to end probes."""
    return stripe.used + 2 <= table.stripe_mask - (table.stripe_mask >> 3)


cdef inline void put_slot(
    Table *table, Stripe *stripe, uint64_t hash, uint64_t slot
) noexcept nogil:
    """Into the hash's stripe, which is locked."""
    cdef uint32_t position = <uint32_t>hash & table.mask
    while table.slots[position]:
        position = next_position(table, position)
    store_release_u64(&table.slots[position], slot)
    stripe.used += 1


cdef inline void drop_slot(
    Table *table, Stripe *stripe, uint64_t hash, uint64_t slot
) noexcept nogil:
    """Out of the hash's stripe, which is locked. Slots behind move up, so that no probe meets a
    hole.
    """
    cdef uint32_t hole = <uint32_t>hash & table.mask
    cdef uint32_t position, home
    cdef uint64_t moved
    while table.slots[hole] != slot:
        hole = next_position(table, hole)
    store_release_u32(&stripe.sequence, stripe.sequence + 1)
    position = hole
    while True:
        position = next_position(table, position)
        moved = table.slots[position]
        if moved == 0:
            break
        home = <uint32_t>(moved >> 32) & table.mask
        if ((position - home) & table.stripe_mask) >= ((position - hole) & table.stripe_mask):
            store_release_u64(&table.slots[hole], moved)
            hole = position
    store_release_u64(&table.slots[hole], 0)
    store_release_u32(&stripe.sequence, stripe.sequence + 1)
    stripe.used -= 1


cdef inline Conn *allocate(Table *table, uint32_t words) noexcept nogil:
    """A record that nobody else sees yet, or NULL at the limit."""
    cdef Pool *pool = &table.pools[pool_of(words)]
    cdef Conn *conn
    if add_u32(&table.count, 1) > table.limit:
        add_u32(&table.count, <uint32_t>-1)
        return NULL
    spin_lock(&pool.lock)
    if pool.free:
        conn = record(table, pool_of(words), pool.free)
        pool.free = conn.destination
    else:
        conn = record(table, pool_of(words), pool.fresh)
        store_release_u32(&pool.fresh, pool.fresh + 1)
    spin_unlock(&pool.lock)
    return conn


cdef inline void release(Table *table, Conn *conn, uint32_t words) noexcept nogil:
    """Give back a record that no slot names any more."""
    cdef Pool *pool = &table.pools[pool_of(words)]
    spin_lock(&pool.lock)
    conn.destination = pool.free
    pool.free = index_of(table, conn, words)
    spin_unlock(&pool.lock)
    add_u32(&table.count, <uint32_t>-1)


cdef inline void flow_view(
    Conn *conn, uint32_t direction, uint32_t words, uint64_t hash, View *view
) noexcept nogil:
    """What to look a connection's direction up by; the view points into the record."""
    view.words = <uint8_t>words
    view.protocol = conn.protocol
    view.hash = hash
    if direction == FROM_CLIENT:
        view.source = address_of(conn, CLIENT, words)
        view.destination = address_of(conn, VIRTUAL, words)
        view.source_port = conn.client_port
        view.destination_port = conn.virtual_port
    else:
        view.source = address_of(conn, REAL, words)
        view.destination = address_of(conn, SOURCE, words)
        view.source_port = conn.real_port
        view.destination_port = conn.source_port


cdef inline Conn *in_the_way(
    Table *table, Conn *conn, uint32_t direction, uint32_t words, uint64_t hash, uint32_t *found
) noexcept nogil:
    """Whose flow a connection's direction is already: the connection, locked, and its direction;
    or NULL. The hash's stripe is locked.
    """
    cdef View view
    if likely(is_absent(table, hash)):
        return NULL
    flow_view(conn, direction, words, hash, &view)
    return probe(table, &view, found)


cdef inline uint32_t insert_family(
    Table *table, Conn *conn, uint32_t words, Conn **other
) noexcept nogil:
    """`insert` of one family."""
    cdef bint both = has_both(conn)
    cdef uint32_t first = first_direction(conn)
    # From the record, as remove() will compute it: the packet may have been changed since it was
    # hashed, by whoever else has its buffer.
    cdef uint64_t there = conn_hash(table, conn, words, first)
    cdef uint64_t back = conn_hash(table, conn, words, FROM_DESTINATION) if both else there
    cdef Stripe *one = stripe_of(table, there)
    cdef Stripe *another = stripe_of(table, back)
    cdef uint32_t index = index_of(table, conn, words)
    cdef uint32_t outcome
    cdef uint32_t direction = 0
    if both and there == back:
        # Hairpin to the very address and port it came from: its own reply.
        other[0] = NULL
        return CLASH
    prefetch(&table.slots[<uint32_t>back & table.mask])
    lock_stripes(one, another)
    other[0] = in_the_way(table, conn, first, words, there, &direction)
    if unlikely(other[0] is not NULL):
        # A flow from the client that is some connection's reply is the destination's own.
        outcome = KNOWN if direction == first else CLASH
    else:
        if both:
            other[0] = in_the_way(table, conn, FROM_DESTINATION, words, back, &direction)
        outcome = INSERTED if other[0] is NULL else CLASH
    if likely(outcome == INSERTED):
        if has_room(table, one) and has_room(table, another):
            put_slot(table, one, there, make_slot(there, index, words, first))
            if both:
                put_slot(table, another, back, make_slot(back, index, words, FROM_DESTINATION))
            elif conn.protocol == CONN_TEMPLATE:
                add_u32(&table.templates, 1)
        else:
            outcome = FULL
    unlock_stripes(one, another)
    return outcome


cdef inline uint32_t insert(
    Table *table, Conn *conn, uint32_t words, Conn **other
) noexcept nogil:
    """Make a filled record visible by its slots: both directions, or neither.

    On KNOWN and CLASH, `other` is the connection in the way, locked; NULL on a clash with
    itself. The caller holds `conn` locked, which no slot names: nobody who waits for it holds a
    stripe.
    """
    # Constant arguments: the compiler makes one way of each family.
    if words == 1:
        return insert_family(table, conn, 1, other)
    return insert_family(table, conn, 4, other)


cdef inline bint remove(
    Table *table, Conn *conn, uint32_t words, int64_t before, Conn *was
) noexcept nogil:
    """Take a connection out of the table, if its deadline is not after `before`. The caller does
    not hold it locked. True when this call removed it; `was` is then what its record said.
    """
    cdef uint64_t there, back
    cdef Stripe *one
    cdef Stripe *another
    cdef uint32_t index = index_of(table, conn, words)
    cdef uint32_t first
    cdef bint both, mine = False
    spin_lock(&conn.lock)
    if conn.protocol == CONN_FREE or conn.deadline > before:
        spin_unlock(&conn.lock)
        return False
    both = has_both(conn)
    first = first_direction(conn)
    there = conn_hash(table, conn, words, first)
    back = conn_hash(table, conn, words, FROM_DESTINATION) if both else there
    spin_unlock(&conn.lock)
    # Stripes come before records, so look again once they are held. Who holds the record now
    # may have made a new connection of it and wait for these stripes: leave it to them.
    one = stripe_of(table, there)
    another = stripe_of(table, back)
    lock_stripes(one, another)
    if not spin_trylock(&conn.lock):
        unlock_stripes(one, another)
        return False
    if (
        conn.protocol != CONN_FREE and conn.deadline <= before
        # A template that somebody just came to hang on stays.
        and (conn.protocol != CONN_TEMPLATE or load_u32(&conn.packets) == 0)
        and both == has_both(conn) and first == first_direction(conn)
        and conn_hash(table, conn, words, first) == there
        and (not both or conn_hash(table, conn, words, FROM_DESTINATION) == back)
    ):
        mine = True
        was[0] = conn[0]
        drop_slot(table, one, there, make_slot(there, index, words, first))
        if both:
            drop_slot(table, another, back, make_slot(back, index, words, FROM_DESTINATION))
        store_u8(&conn.protocol, CONN_FREE)
    spin_unlock(&conn.lock)
    unlock_stripes(one, another)
    if mine:
        if was.protocol == CONN_TEMPLATE:
            add_u32(&table.templates, <uint32_t>-1)
        release(table, conn, words)
    return mine


cdef void *reserve(size_t size) except NULL
cdef void give_back(void *memory, size_t size) noexcept
cdef int table_init(Table *table, uint32_t limit) except -1
cdef void table_free(Table *table) noexcept
cdef void table_populate(Table *table) noexcept nogil
