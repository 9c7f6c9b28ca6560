from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from svcdp._core.abi cimport svcdp_packet
from svcdp._core.batch cimport PacketBatch
from svcdp._core.conn cimport Conn
from svcdp._core.sequence cimport SeqDelta
from svcdp._core.service cimport Dest, DestConfig, Service
from svcdp._core.worker cimport Engine, Worker


cdef enum Retiree:
    RETIRED_MEMORY
    RETIRED_SERVICE
    RETIRED_DESTINATION

cdef struct Retired:
    Retired *next
    uint64_t epoch                 # packets from here on cannot see it
    Retiree kind
    void *pointer                  # or the id of a destination


cdef class Core:
    cdef Engine *engine
    # Not Python objects: the garbage collector would empty those before __dealloc__ sees them.
    cdef Worker *workers
    cdef Retired *retired          # freed when no packet can see them
    cdef dict choosers             # address of Service -> (chooser, candidates)
    cdef list free_ids             # of destinations
    cdef list unnamed              # ids of new destinations that no service names yet
    cdef dict configs              # id of destination -> what its DestConfig was made of
    cdef DestConfig *plain         # of all destinations by NAT that ask for nothing else
    cdef set draining              # ids of removed destinations that connections still use
    cdef uint32_t next_id
    cdef bint unwatched            # see watch_removals(), of the commit under way
    cdef uint64_t unwatched_epoch  # packets from here on are fine; 0: all are
    cdef uint32_t worker_count
    cdef uint64_t seed
    cdef readonly object clock     # -> ns
    cdef readonly uint32_t max_connections

    # For queue loops in other modules.
    #
    # A worker is the scratch memory and the counters of one thread; acquire it with the GIL,
    # use it from one thread at a time, and release it when the thread is done.
    cdef Worker *worker_acquire(self) except NULL
    cdef void worker_release(self, Worker *worker) noexcept nogil
    # Give each packet its verdict and rewrite it in place. `now` in ns, monotonic.
    cdef void process_packets(
        self, Worker *worker, svcdp_packet *packets, uint32_t count, int64_t now
    ) noexcept nogil
    # The answer to a packet whose verdict is REJECT; its length, 0 for "say nothing". `out`
    # has room for SVCDP_ANSWER_MAX bytes.
    cdef uint32_t build_answer(
        self, const svcdp_packet *packet, uint8_t *out, uint32_t capacity
    ) noexcept nogil

    cdef Worker *worker_new(self) except NULL
    cdef Dest *destination_of(self, uint32_t id) except NULL
    cpdef object new_destination(self, str address, uint16_t port)
    cdef int reserve_destination(self, uint32_t id) except -1
    cdef void retire(self, void *pointer, Retiree kind, uint64_t epoch) noexcept
    cdef void free_retired(self, Retired *item) noexcept
    cdef void reclaim(self) noexcept
    cdef void drop_service(self, Service *service) noexcept
    cdef int64_t time_of(self, object now) except -1
    cdef bytes process_contiguous(self, PacketBatch batch, int64_t now)
    cdef bytes process_buffers(self, object buffers, int64_t now)
    cdef void process_one(self, svcdp_packet *packet, int64_t now) noexcept
    cdef Service *find_service(self, object record) except? NULL
    cdef void attend(self) noexcept
    cdef list new_configs(self, list services)
    cdef void free_config(self, void *config) noexcept
    cdef void change_removal(self, Dest *target, const Service *service) noexcept
    cdef void watch_removals(self) noexcept
    cdef void publish_destination(self, Service *service, object record) noexcept
    cdef void copy_record(self, uint32_t pool, uint32_t index, uint8_t *copy) noexcept
    cdef tuple state_row(self, Conn *conn, uint32_t words)
    cdef tuple sequences_of(self, Conn *conn, uint32_t words)
    cdef uint32_t import_locked(
        self, Worker *worker, Service *service, uint8_t protocol, const uint8_t *client,
        uint16_t client_port, const uint8_t *virtual, uint16_t virtual_port,
        const uint8_t *source, uint16_t source_port, Dest *target, uint8_t state,
        int64_t deadline, uint32_t packets, uint32_t flags, const SeqDelta *shifts, int64_t now,
    ) noexcept
    cdef tuple describe(self, Conn *conn, uint32_t words)
    cdef tuple connection_row(self, uint32_t pool, uint32_t index)
