# What packets are processed with: the Engine, which all threads share, and a Worker for each.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport *
from svcdp._core.answer cimport answer_in_time
from svcdp._core.atomic cimport *
from svcdp._core.conn cimport *
from svcdp._core.frag cimport FragmentTable
from svcdp._core.ftp cimport FtpControl
from svcdp._core.locality cimport Expirations
from svcdp._core.packet cimport *
from svcdp._core.proto cimport *
from svcdp._core.service cimport *
from svcdp._core.table cimport Snapshot
from svcdp._core.watch cimport *

cdef extern from *:
    const int64_t SECOND "INT64_C(1000000000)"     # ns

cdef enum:
    BURST = 64                 # packets whose memory is fetched together
    EJECTED_MAX = 1024         # destinations that are ejected at a time
    TIMEOUT_CLASSES = 256

cdef struct Worker:
    Worker *next               # of the core's workers
    uint64_t epoch             # of the snapshot in use, 0: none
    uint64_t random
    uint64_t verdicts[SVCDP_VERDICT_COUNT][SVCDP_REASON_COUNT]
    uint64_t created
    uint64_t expired
    uint64_t scheduler_errors
    uint64_t ejections
    uint64_t retries
    uint8_t busy
    uint32_t avoided           # id of the destination that left the client's SYN unanswered, or 0
    int64_t now                # of the packets being processed, ns
    int64_t answer_due         # see answer_in_time()
    uint32_t expected_words    # of `expected`, 0: none
    uint64_t expected[RECORD_WORDS]  # a connection that a helper waits for, to be inserted
    Traffic *traffic[DESTINATION_CHUNKS]
    View views[BURST]
    Service *services[BURST]   # of the views, where they seem unknown

ctypedef int32_t (*Chooser)(Service *, const View *, Worker *) noexcept nogil

# svcdp.Settings
cdef struct Settings:
    uint8_t conn_reuse_mode
    uint8_t expire_quiescent_template
    uint8_t sloppy_tcp
    uint8_t sloppy_sctp
    uint8_t secure_tcp
    uint8_t schedule_icmp
    uint8_t cache_bypass
    uint8_t drop_entry
    uint8_t drop_packet
    uint8_t pmtu_disc
    uint8_t decrement_ttl
    uint32_t am_droprate
    uint32_t answer_rate
    Expirations expirations

# What is known of a control connection, shared with the data connections that it controls.
cdef struct Helper:
    FtpControl ftp
    uint32_t references        # connections; 0: free
    uint32_t next              # of the free ones

cdef struct HelperPool:
    Helper *helpers            # limit + 1: number 0 is none
    uint32_t limit
    uint32_t fresh             # the last that was ever used
    uint32_t free
    uint8_t lock

# Destinations that are passed over for a while.
cdef struct Ejected:
    uint32_t ids[EJECTED_MAX]
    uint32_t count
    uint8_t lock

cdef struct Engine:
    Table table
    DestinationTable destinations
    Snapshot *snapshot
    uint64_t epoch
    Settings settings
    uint8_t is_attentive               # something is to be done with every packet
    uint32_t port_first                # masquerade ports
    uint32_t port_count
    uint32_t sweep_cursor[2]
    Chooser choose                     # asks a scheduler written in Python
    int64_t second                     # when load is looked at again, ns
    uint32_t drop_rate                 # of packets that open connections, one in so many; 0: none
    uint32_t drop_count
    FragmentTable fragments
    HelperPool helpers
    uint32_t expected                  # data connections that are waited for
    Ejected ejected
    Watch *watch                       # who wants to know of connections, or NULL
    int64_t timeouts[TIMEOUT_CLASSES][STATE_COUNT]     # ns; class 0 is the default


cdef inline void decide(
    Worker *worker, svcdp_packet *packet, uint8_t verdict, uint8_t reason
) noexcept nogil:
    packet.verdict = verdict
    packet.reason = reason
    worker.verdicts[verdict][reason] += 1


cdef inline void reject(
    Engine *engine, Worker *worker, svcdp_packet *packet, const View *view, uint8_t reason,
    uint16_t answer
) noexcept nogil:
    """Have the sender told, unless too many were told lately. Resets are not counted there: each
    spares its receiver some retransmissions.
    """
    packet.answer = answer
    if (
        (view.protocol == PROTOCOL_TCP and answer == SVCDP_ANSWER_DEFAULT)
        or answer_in_time(&worker.answer_due, engine.settings.answer_rate, worker.now)
    ):
        decide(worker, packet, SVCDP_VERDICT_REJECT, reason)
    else:
        decide(worker, packet, SVCDP_VERDICT_DROP, reason)


cdef inline Traffic *traffic_of(Worker *worker, uint32_t id) noexcept nogil:
    return &worker.traffic[id // DESTINATION_CHUNK][id % DESTINATION_CHUNK]


cdef inline int32_t *load_of(Dest *target, uint8_t state) noexcept nogil:
    """The counter that a connection in this state is part of."""
    return &target.active if is_active(state) else &target.inactive


cdef inline bint is_overloaded(const Dest *target) noexcept nogil:
    """Whether it is OVERLOADED: ip_vs_conn.c, ip_vs_bind_dest and _unbind_dest."""
    cdef int64_t upper = load_u32(&target.upper)
    cdef int64_t lower = load_u32(&target.lower)
    cdef int64_t total = (
        <int64_t>load_ordered_i32(&target.active) + load_ordered_i32(&target.inactive))
    if upper and total >= upper:
        return True
    if upper == 0 or (total < lower if lower else total * 4 < upper * 3):
        return False
    return load_ordered_u8(&target.unavailable) & OVERLOADED != 0


cdef inline void reconsider(Dest *target) noexcept nogil:
    """After a change of the destination's load or thresholds: whether it is overloaded now."""
    cdef bint wanted
    if likely(load_u32(&target.upper) == 0 and not load_u8(&target.unavailable) & OVERLOADED):
        return
    wanted = is_overloaded(target)
    while (load_ordered_u8(&target.unavailable) & OVERLOADED != 0) != wanted:
        if wanted:
            or_u8(&target.unavailable, OVERLOADED)
        else:
            and_u8(&target.unavailable, <uint8_t>~OVERLOADED)
        # Others count side by side, and looked before that: see it for them.
        wanted = is_overloaded(target)


cdef inline void count_in(Dest *target, const Conn *conn) noexcept nogil:
    """A connection of the destination came into the table. One-packet ones are not load."""
    if not conn.flags & CONN_ONE_WAY:
        add_i32(load_of(target, conn.state), 1)
    add_u32(&target.references, 1)
    reconsider(target)


cdef inline void count_out(Dest *target, const Conn *conn) noexcept nogil:
    if not conn.flags & CONN_ONE_WAY:
        add_i32(load_of(target, conn.state), -1)
    add_u32(&target.references, <uint32_t>-1)
    reconsider(target)
