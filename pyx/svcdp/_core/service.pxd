# Virtual services and their destinations, as packets see them.
#
# A Service never changes once it is published: an edit builds the next one and swaps it in (see
# table.pxd). What does change all the time stands apart: Dest and SchedState.
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.atomic cimport *
from svcdp._core.memory cimport load32, same_address

cdef enum:
    # Destinations live in chunks that are never moved or freed while the core lives, so that
    # an id can be turned into a pointer without a lock. Id 0 is nobody.
    DESTINATION_CHUNK = 1024
    DESTINATION_CHUNKS = 4096
    CACHE_LINE = 64            # bytes; a Dest is two, and most packets see the first only

    # Forwarding methods, as the kernel numbers them (uapi/linux/ip_vs.h).
    METHOD_MASQ = 0
    METHOD_LOCAL = 1
    METHOD_TUNNEL = 2
    METHOD_DR = 3
    METHOD_BYPASS = 4          # of a connection only: to where the client meant

    TUNNEL_IPIP = 0
    TUNNEL_GUE = 1
    TUNNEL_GRE = 2

    # Service.scheduler_flags: IP_VS_SVC_F_SCHED_SH_FALLBACK and so on, from bit 0
    SCHEDULER_FALLBACK = 1
    SCHEDULER_PORT = 2

    # Service.on_removal
    REMOVAL_DRAIN = 0
    REMOVAL_EXPIRE = 1
    REMOVAL_DROP = 2
    REMOVAL_UNSET = 3          # of a destination that no service has had yet
    REMOVAL_RESET = 4

    # Dest.unavailable: why schedulers pass it over
    OVERLOADED = 1
    EJECTED = 2

    ENGINE_NONE = 0
    ENGINE_SIP = 1

cdef struct Dest
cdef struct DestConfig
cdef struct Service

# How packets get to a destination. Never changes: an edit makes another one and swaps it in.
cdef struct DestConfig:
    uint8_t method
    uint8_t tunnel_type
    uint8_t tunnel_checksum
    uint8_t source_words       # 32-bit words of the outer source address
    uint16_t tunnel_port       # wire order
    uint16_t flags             # Conn.flags of connections to the destination: see set_flags()
    uint8_t is_plain_tunnel    # IPv4 in IPv4
    uint32_t mtu               # of the path, bytes; 0: unchecked
    uint32_t mark
    uint8_t tunnel_source[16]
    # What every packet of the tunnel has in common: see tunnel.pxd.
    uint8_t outer[40]          # its outer IP header; 0 where packets differ
    uint32_t outer_sum         # of the addresses of an IPv4 header, 16-bit words in host order
    uint32_t overhead          # bytes that the tunnel adds, the outer header included

cdef struct Dest:
    uint8_t address[16]        # the first 4 bytes for IPv4
    uint32_t id
    uint16_t port              # wire order; 0: the packet's
    uint8_t words              # 32-bit words of the address
    uint8_t removed            # no longer in its service; connections may still use it
    int32_t active             # connections, as schedulers count them
    int32_t inactive
    uint32_t references        # connections in the table
    uint32_t held              # by caches of schedulers
    uint32_t upper             # connections at which it is overloaded, 0: never
    uint32_t lower             # and below which it is not any more; 0: 3/4 of upper
    uint8_t unavailable        # bits: OVERLOADED, EJECTED
    uint8_t on_removal         # its service's
    uint16_t generation        # how often the id was given up
    uint32_t weight            # in its service
    DestConfig *config         # of the destination; freed when no packet can see it
    int64_t grace              # ns that REMOVAL_RESET leaves to connections
    int64_t reset_at           # when it is over; 0: nobody looked since the removal
    # See passive.pxd.
    int64_t ejection           # ns of the first one in a row; 0: never ejected
    int64_t ejection_max
    int64_t asked_from         # end of its ejection, or its last answer: who asked before is past
    int64_t failed_at          # when a connection was last left without an answer
    uint32_t failures_max      # in a row, until it is ejected
    uint32_t failures          # in a row
    uint32_t failures_total
    uint32_t ejections         # in a row

# One per destination and worker, so that counting shares no cache line with other workers.
cdef struct Traffic:
    uint64_t connections       # ever made
    uint64_t packets_in        # from clients
    uint64_t bytes_in          # IP length
    uint64_t packets_out
    uint64_t bytes_out

cdef struct Member:
    Dest *destination
    uint32_t weight
    uint32_t weight_below      # sum of the weights of the members before this one
    uint32_t last_weight       # the newest that was not 0

cdef struct Network:
    uint8_t address[16]
    uint8_t mask[16]

cdef struct Rule:
    Network *networks          # NULL: any source
    uint32_t network_count
    uint32_t mark              # bits that the packet's mark must have
    Service *subset            # those of the destinations that serve it; NULL: all
    uint8_t masquerade
    uint8_t on_empty           # verdict when there is nobody to serve
    uint8_t answer             # and svcdp_answer of a rejected packet

# What a scheduler remembers between picks. Belongs to one Service and to its lock; what it points
# to is shared with the Services before and after it.
cdef struct SchedState:
    uint8_t lock
    int32_t position           # rr, wrr: the last member picked, -1 before the first
    int64_t weight             # wrr: the level that is being served
    int64_t weight_max         # wrr: where a round starts
    int64_t weight_step        # wrr: greatest common divisor of the weights
    void *table                # sh, mh: a HashTable; NULL when nobody has a share
    void *locality             # lblc, lblcr: a Locality

cdef struct Service:
    uint8_t address[16]        # of a fwmark service, the mark in network order
    uint16_t port              # wire order; the first of a range
    uint16_t flags[2]          # Conn.flags of its connections, and of those over UDP
    uint8_t words
    uint8_t protocol
    uint16_t first_port        # the same in host order
    uint16_t last_port
    uint8_t scheduler
    uint8_t scheduler_flags
    uint32_t table_size        # mh
    uint8_t has_masquerade
    uint8_t one_packet
    uint8_t engine             # persistence engine
    uint8_t is_ftp             # has the helper for its data connections
    uint8_t timeouts           # class of timeouts
    uint8_t on_removal
    uint8_t is_timed           # affinity ends with its time, whatever hangs on it
    uint8_t is_passive         # destinations that do not answer are passed over
    uint8_t is_attended        # is_ftp or is_passive: more is to be done for a new connection
    uint8_t netmask[16]        # of clients, for persistence
    uint8_t masquerade[16]     # source address of masqueraded connections
    uint32_t affinity          # id of the persistence group
    int64_t persistence        # ns, 0: off
    int64_t grace              # ns, of REMOVAL_RESET
    int64_t ejection           # ns; see Dest
    int64_t ejection_max
    uint32_t failures_max
    uint32_t member_count
    uint32_t rule_count
    uint64_t weight_total
    Member *members            # head of the list first: the newest
    Rule *rules
    PyObject *chooser          # a scheduler written in Python, or NULL; owned by the Core
    PyObject *candidates       # the tuple it chooses from; owned by the Core
    SchedState state

cdef struct DestinationTable:
    Dest *chunks[DESTINATION_CHUNKS]


cdef inline Dest *dest_of(DestinationTable *table, uint32_t id) noexcept nogil:
    return &table.chunks[id // DESTINATION_CHUNK][id % DESTINATION_CHUNK]


# What a new connection will look at, fetched in the order in which one leads to the next. Who is to
# serve is a guess that is right for round robins.

cdef inline void prefetch_service(const Service *service) noexcept nogil:
    prefetch(&service.persistence)
    prefetch(&service.state)


cdef inline const Member *next_member(const Service *service) noexcept nogil:
    cdef uint32_t next_one = <uint32_t>(service.state.position + 1)
    return &service.members[next_one if next_one < service.member_count else 0]


cdef inline void prefetch_members(const Service *service) noexcept nogil:
    prefetch(service.rules)
    if service.member_count:
        prefetch(next_member(service))


cdef inline void prefetch_destination(const Service *service) noexcept nogil:
    cdef const Dest *target
    if service.member_count:
        target = next_member(service).destination
        prefetch(target)
        prefetch(&target.config)


cdef inline bint in_network(
    const uint8_t *address, const Network *network, uint32_t words
) noexcept nogil:
    cdef uint32_t i
    for i in range(words):
        if (
            load32(address + 4 * i) & load32(network.mask + 4 * i)
            != load32(network.address + 4 * i)
        ):
            return False
    return True


cdef inline const Rule *rule_for(
    const Service *service, const uint8_t *source, uint32_t mark
) noexcept nogil:
    """The first rule that admits packets from the source with this mark, or NULL."""
    cdef uint32_t i, j
    cdef const Rule *rule
    for i in range(service.rule_count):
        rule = &service.rules[i]
        if rule.mark & ~mark:
            continue
        if rule.networks is NULL:
            return rule
        for j in range(rule.network_count):
            if in_network(source, &rule.networks[j], service.words):
                return rule
    return NULL


cdef Service *service_new(object record, DestinationTable *destinations) except NULL
cdef void service_free(Service *service) noexcept
