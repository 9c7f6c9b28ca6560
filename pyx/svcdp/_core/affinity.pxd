# Persistence: which destination a client, or a call, is bound to.
#
# A template is a record whose client is the one bound and whose virtual address is the persistence
# group. Connections made through it hang on it, and it outlives them.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from svcdp._core.hash cimport mix
from svcdp._core.memory cimport copy_address, load32, load64, same_address, store32
from svcdp._core.persist cimport persistence_key
from svcdp._core.worker cimport *

# A template's key, and a view of it to look it up by.
cdef struct Affinity:
    uint8_t client[16]
    uint8_t group[16]
    View view


cdef inline void call_affinity(
    Engine *engine, const uint8_t *key, uint32_t size, uint32_t words, Affinity *affinity
) noexcept nogil:
    """A call instead of a client: what there is room for of its hash, secret as the flows' is."""
    cdef uint64_t low = engine.table.key.word[0], high = engine.table.key.word[1]
    cdef uint32_t at = 0
    cdef uint8_t tail[16]
    while at + 16 <= size:
        low = mix(low ^ load64(key + at), engine.table.key.word[2] ^ load64(key + at + 8))
        high = mix(high ^ low, engine.table.key.word[3])
        at += 16
    memset(tail, 0, sizeof(tail))
    memcpy(tail, key + at, size - at)
    low = mix(low ^ load64(tail), engine.table.key.word[2] ^ load64(tail + 8) ^ size)
    high = mix(high ^ low, engine.table.key.word[3])
    memcpy(affinity.client, &low, 4 if words == 1 else 8)
    if words == 4:
        memcpy(affinity.client + 8, &high, 8)
    affinity.view.source_port = <uint16_t>(high >> 32)
    affinity.view.destination_port = <uint16_t>(low >> 32) | 1     # no client has ports here


cdef inline bint affinity_of(
    Engine *engine, const Service *service, const uint8_t *data, const View *packet,
    Affinity *affinity
) noexcept nogil:
    """The key of the client (its network), or of the call that the packet at `data` is of, in the
    service's persistence group. False: it names no call.
    """
    cdef uint32_t i, size
    cdef const uint8_t *key = NULL
    cdef View *view = &affinity.view
    for i in range(0, 4 * service.words, 4):
        store32(
            affinity.client + i, load32(packet.source + i) & load32(service.netmask + i))
    memset(affinity.group, 0, 16)
    store32(affinity.group, service.affinity)
    view.words = service.words
    view.protocol = CONN_TEMPLATE
    view.source = affinity.client
    view.destination = affinity.group
    view.source_port = view.destination_port = 0
    if service.engine != ENGINE_NONE:
        size = persistence_key(service.engine, data, packet, &key) if data is not NULL else 0
        if size == 0:
            return False
        call_affinity(engine, key, size, service.words, affinity)
    view.hash = hash_flow(
        &engine.table.key, view.words, view.source, view.destination, view.source_port,
        view.destination_port, CONN_TEMPLATE)
    return True


cdef inline bint is_bound(const Conn *template, int64_t now) noexcept nogil:
    """Whether a template still counts: in its time, or with connections that hang on it."""
    return template.deadline > now or load_u32(&template.packets) != 0


cdef inline void name_of(const Dest *target, uint32_t words, uint8_t *name) noexcept nogil:
    """What names a destination in a template of a family: its address, or when that is of the
    other family (tunnels), what fits of it.
    """
    cdef uint32_t i
    if target.words == words:
        copy_address(name, target.address, words)
        return
    for i in range(0, 4 * words, 4):
        store32(name + i, load32(target.address + i % (4 * target.words)))
    if words == 1:
        store32(
            name, load32(name) ^ load32(target.address + 4) ^ load32(target.address + 8)
            ^ load32(target.address + 12))


cdef inline int32_t sticky_member(
    Engine *engine, const Service *service, const Affinity *affinity, int64_t now
) noexcept nogil:
    """The member that the key is bound to and that may still be used, or -1."""
    cdef uint8_t name[16]
    cdef Conn *template
    cdef const Dest *target
    cdef uint32_t direction, i
    cdef int32_t result = -1
    template = find(&engine.table, &affinity.view, &direction)
    if template is NULL:
        return -1
    if is_bound(template, now):
        for i in range(service.member_count):
            target = service.members[i].destination
            if target.port != template.real_port:
                continue
            name_of(target, service.words, name)
            if same_address(name, address_of(template, REAL, service.words), service.words):
                if service.members[i].weight or not engine.settings.expire_quiescent_template:
                    result = <int32_t>i
                break
    spin_unlock(&template.lock)
    return result


cdef inline void bind_template(
    Conn *template, const Service *service, const Dest *target, int64_t now
) noexcept nogil:
    cdef uint8_t name[16]
    name_of(target, service.words, name)
    template.flags = 0
    template.real_port = target.port
    copy_address(address_of(template, REAL, service.words), name, service.words)
    store_i64(&template.deadline, now + service.persistence)


cdef inline uint32_t hang_on(
    Engine *engine, const Service *service, const Affinity *affinity, const Dest *target,
    int64_t now
) noexcept nogil:
    """Bind a key to a destination, or bind it for longer, for a connection that will hang on
    it: the template's record. Let go of it by `let_go`. 0 where none does: an affinity of
    `Service.is_timed` has only its time.

    Templates take no more than half of the table, and a client that finds no room stays unbound
    (0): connections matter more.
    """
    cdef Conn *template
    cdef Conn *other
    cdef uint32_t direction
    cdef uint32_t words = service.words
    cdef uint32_t result = 0
    template = find(&engine.table, &affinity.view, &direction)
    if template is NULL:
        if load_u32(&engine.table.templates) >= (engine.table.limit + 1) // 2:
            return 0
        template = allocate(&engine.table, words)
        if template is NULL:
            return 0
        spin_lock(&template.lock)
        template.state = template.timeouts = 0
        template.destination = template.packets = 0
        template.control = template.extra = template.fwmark = 0
        template.client_port = affinity.view.source_port
        template.virtual_port = affinity.view.destination_port
        template.source_port = 0
        copy_address(address_of(template, CLIENT, words), affinity.client, words)
        copy_address(address_of(template, VIRTUAL, words), affinity.group, words)
        memset(address_of(template, SOURCE, words), 0, 4 * words)
        bind_template(template, service, target, now)
        store_u8(&template.protocol, CONN_TEMPLATE)
        if insert(&engine.table, template, words, &other) != INSERTED:
            store_u8(&template.protocol, CONN_FREE)
            release(&engine.table, template, words)
            spin_unlock(&template.lock)
            if other is NULL:
                return 0
            template = other
    bind_template(template, service, target, now)
    if not service.is_timed:
        add_u32(&template.packets, 1)
        result = index_of(&engine.table, template, words)
    spin_unlock(&template.lock)
    return result


cdef inline uint32_t hang_on_known(
    Engine *engine, const Service *service, const View *packet, const Dest *target
) noexcept nogil:
    """As hang_on(), if the client is bound to this destination already; its time stays."""
    cdef uint8_t name[16]
    cdef Affinity affinity
    cdef Conn *template
    cdef uint32_t direction
    cdef uint32_t result = 0
    if service.is_timed or not affinity_of(engine, service, NULL, packet, &affinity):
        return 0
    template = find(&engine.table, &affinity.view, &direction)
    if template is NULL:
        return 0
    name_of(target, service.words, name)
    if target.port == template.real_port and same_address(
        name, address_of(template, REAL, service.words), service.words
    ):
        add_u32(&template.packets, 1)
        result = index_of(&engine.table, template, service.words)
    spin_unlock(&template.lock)
    return result


cdef inline void let_go(Engine *engine, uint32_t words, uint32_t control) noexcept nogil:
    """A connection does not hang on its template any more."""
    if control:
        add_u32(&record(&engine.table, pool_of(words), control).packets, <uint32_t>-1)
