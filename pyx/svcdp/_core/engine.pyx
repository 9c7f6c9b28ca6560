"""The core as Python sees it, and its border: the only module of the core that lets go of the
GIL (around a batch) and takes it back (to ask a scheduler written in Python).
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strlen

from svcdp._core.answer cimport answer
from svcdp._core.batch cimport PacketBatch
from svcdp._core.conn cimport give_back, reserve, table_free, table_init, table_populate
from svcdp._core.hashing cimport entry_ids
from svcdp._core.helper cimport give_helper, take_shifts
from svcdp._core.load cimport is_ejected
from svcdp._core.memory cimport load32, ntohs
from svcdp._core.passive cimport all_ejected, readmit, readmit_due, stand_in
from svcdp._core.path cimport *
from svcdp._core.sched cimport UNFORESEEN, advance, foresee
from svcdp._core.service cimport service_free, service_new
from svcdp._core.table cimport snapshot_new, snapshot_next, snapshot_services
from svcdp._core.tunnel cimport prepare_tunnel

import cython

from ipaddress import IPv6Address

from svcdp.types import DestinationSpec, Flow, Reason, Verdict

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    const char *PyUnicode_AsUTF8(object text) except NULL
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    void PyErr_SetInterrupt()

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<arpa/inet.h>" nogil:
    int inet_pton(int family, const char *source, void *target)
    const char *inet_ntop(int family, const void *source, char *target, unsigned size)
    int AF_INET, AF_INET6

cdef tuple VERDICTS = tuple(Verdict)
cdef tuple REASONS = tuple(Reason)
cdef dict PROTOCOLS = {PROTOCOL_TCP: "tcp", PROTOCOL_UDP: "udp", PROTOCOL_SCTP: "sctp"}
STATES = (
    "NONE", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT", "TIME_WAIT", "CLOSE",
    "CLOSE_WAIT", "LAST_ACK", "LISTEN", "SYNACK", "UDP", "SCTP_NONE", "SCTP_INIT1", "SCTP_INIT",
    "SCTP_COOKIE_SENT", "SCTP_COOKIE_REPLIED", "SCTP_COOKIE_WAIT", "SCTP_COOKIE",
    "SCTP_COOKIE_ECHOED", "SCTP_ESTABLISHED", "SCTP_SHUTDOWN_SENT", "SCTP_SHUTDOWN_RECEIVED",
    "SCTP_SHUTDOWN_ACK_SENT", "SCTP_REJECTED", "SCTP_CLOSED",
)

cdef tuple METHODS = ("masq", "local", "tunnel", "dr", "bypass")

# What a DestConfig of zeros is made of: see svcdp.records.Config.
PLAIN = (METHOD_MASQ, TUNNEL_IPIP, False, 0, b"", 0, 0)

# Outcomes of import_record().
OUTCOMES = (INSERTED, FULL, KNOWN, CLASH)

# ns; no timeout added to it overflows.
cdef int64_t TIME_MAX = <int64_t>1 << 62

cdef enum:
    # Flags of connections, as other nodes know them: uapi/linux/ip_vs.h.
    STATE_SYNC = 0x20
    STATE_NOOUTPUT = 0x80
    STATE_INACTIVE = 0x100
    STATE_NO_CPORT = 0x800
    STATE_TEMPLATE = 0x1000
    STATE_ONE_PACKET = 0x2000

    HELPERS_MAX = 1 << 16      # control connections of FTP

    # Smaller batches are done before the GIL could be given away and taken back.
    BATCH_NOGIL = 8


cdef str format_address(const uint8_t *address, uint32_t words):
    """As `ipaddress` prints it; the C library has its own form for IPv4 inside IPv6."""
    cdef char text[46]
    if words == 4 and load32(address) == 0 and load32(address + 4) == 0:
        return str(IPv6Address(PyBytes_FromStringAndSize(<const char *>address, 16)))
    inet_ntop(AF_INET if words == 1 else AF_INET6, address, text, sizeof(text))
    return (<bytes>text).decode("ascii")


cdef uint32_t words_of(bytes address) except 0:
    """How many 32-bit words an address has. ValueError unless it is one."""
    if PyBytes_GET_SIZE(address) not in (4, 16):
        raise ValueError(f"an address has 4 or 16 bytes, not {PyBytes_GET_SIZE(address)}")
    return <uint32_t>(PyBytes_GET_SIZE(address) // 4)


cdef uint32_t check_pool(uint32_t pool) except 2:
    """ValueError unless it is a family: 0 (IPv4) or 1 (IPv6)."""
    if pool > 1:
        raise ValueError(f"no family has the number {pool}")
    return pool


cdef tuple key_of(const Service *service):
    """(address or None for a fwmark, port or mark, protocol number)."""
    cdef str address
    if service.protocol == PROTOCOL_FWMARK:
        return None, ntohl(load32(service.address)), service.protocol
    address = format_address(service.address, service.words)
    if service.protocol != PROTOCOL_ANY:
        return address, service.first_port, service.protocol
    if service.first_port < 32 * service.words:
        address = f"{address}/{service.first_port}"
    return address, 0, service.protocol


cdef tuple available(tuple candidates):
    cdef Destination each
    for each in candidates:
        if each.state.unavailable:
            return tuple([
                other for other in candidates if not (other.overloaded or other.ejected)])
    return candidates


cdef int32_t choose_python(Service *service, const View *view, Worker *worker) noexcept with gil:
    """Ask a scheduler written in Python. When it fails, the error is counted and round robin
    serves the connection: a bug in a policy must not take the service down.
    """
    cdef object chooser = <object>service.chooser
    cdef tuple candidates = available(<tuple>service.candidates)
    cdef uint32_t i
    cdef Destination chosen
    if not candidates:
        return -1
    try:
        flow = Flow(
            PROTOCOLS[view.protocol],
            format_address(view.source, view.words), ntohs(view.source_port),
            format_address(view.destination, view.words), ntohs(view.destination_port))
        index = chooser(flow, candidates)
        if index is None:
            return -1
        if not 0 <= index < len(candidates):
            raise IndexError(f"scheduler picked {index!r} of {len(candidates)} destinations")
        chosen = candidates[index]
        for i in range(service.member_count):
            if service.members[i].destination == chosen.state:
                return <int32_t>i
        return -1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            PyErr_SetInterrupt()   # it was meant for the program: raise it there
        worker.scheduler_errors += 1
        return pick_rr(service)


# What a Destination shows that did not come from a Core.
cdef Dest NOBODY


def plain_members(members):
    """DestinationSpecs by (address, port), if nothing is wrong with any of them and all are as
    nearly all of the hundreds of thousands of a cluster: IPv4 by masq, with a port, a weight and
    no more. None: that is not known.
    """
    cdef dict found = {}
    cdef Py_ssize_t count = 0
    for member in members:
        if not is_plain_member(member):
            return None
        found[member.address, member.port] = member
        count += 1
    return found if len(found) == count else None


cdef bint is_plain_member(object member) except -1:
    cdef uint8_t packed[4]
    cdef Py_ssize_t length
    cdef const char *text
    if type(member) is not DestinationSpec:
        return False
    address = member.address
    if type(address) is not str or not address.isascii():
        return False
    text = PyUnicode_AsUTF8AndSize(address, &length)
    return (
        strlen(text) == <size_t>length
        and inet_pton(AF_INET, text, packed) == 1
        and 0 < packed[0] < 224
        and is_number(member.port, 1, 0xffff)
        and is_number(member.weight, 0, 0x7fffffff)
        and member.method == "masq"
        and is_number(member.upper, 0, 0)
        and is_number(member.lower, 0, 0)
        and is_number(member.mtu, 0, 0)
        and is_number(member.mark, 0, 0)
        and member.tunnel is None
    )


cdef void give_way() noexcept:
    """Let another thread have the GIL if it waits for it: Python would ask every 5 ms, but C that
    works on a whole cluster takes longer.
    """
    with nogil:
        pass


cdef bint is_number(object value, long long low, long long high) except -1:
    cdef int overflow = 0
    cdef long long number
    if type(value) is not int:
        return False
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    return not overflow and low <= number <= high


cdef class Destination:
    """One destination of a service, with its live counters while the service has it."""
    cdef Core core
    cdef Dest *state
    cdef readonly str address
    cdef readonly uint32_t weight

    def __cinit__(self):
        self.state = &NOBODY

    @property
    def id(self):
        """Names the destination in results and counters of this dataplane."""
        return self.state.id

    @property
    def port(self):
        return ntohs(self.state.port)

    @property
    def active(self):
        """Active connections, as IPVS counts them."""
        return self.state.active

    @property
    def inactive(self):
        """Other connections that are still known."""
        return self.state.inactive

    @property
    def overloaded(self):
        """Whether schedulers pass it over: see `DestinationSpec.upper`."""
        return bool(self.state.unavailable & OVERLOADED)

    @property
    def ejected(self):
        """Whether they do because it did not answer: see `PassiveHealth`."""
        return is_ejected(self.state)

    def ejected_at(self, int64_t now):
        """The same at a time (ns): that it is over, the next packet finds out."""
        return is_ejected(self.state) and self.state.asked_from > now

    @property
    def failures(self):
        """How many clients it left without an answer."""
        return self.state.failures_total

    @property
    def failed_at(self):
        """When it last did, in ns on the dataplane's clock; 0: never."""
        return self.state.failed_at

    def with_weight(self, uint32_t weight):
        """The same destination with another weight, for a scheduler to see."""
        cdef Destination result = Destination.__new__(Destination)
        result.core = self.core
        result.state = self.state
        result.address = self.address
        result.weight = weight
        return result

    def __repr__(self):
        return (
            f"Destination(address={self.address!r}, port={self.port}, weight={self.weight},"
            f" active={self.active}, inactive={self.inactive})")


cdef class Result:
    """What became of one packet. Holds a reference to the caller's buffer, not a copy."""
    cdef object buffer
    cdef uint8_t hop[16]
    cdef uint8_t real[16]
    cdef uint8_t real_words
    cdef uint16_t real_port
    cdef uint8_t hop_words
    cdef uint8_t verdict_code
    cdef uint8_t reason_code
    cdef Py_ssize_t start      # of the packet in the buffer
    cdef Py_ssize_t end
    cdef readonly uint32_t mark

    @property
    def verdict(self):
        """What to do with the packet: a Verdict."""
        return VERDICTS[self.verdict_code]

    @property
    def reason(self):
        """Why: a Reason."""
        return REASONS[self.reason_code]

    @property
    def packet(self):
        """What to send: a view of the caller's buffer (PASS, FORWARD), the answer (REJECT), or
        None when there is nothing to send.
        """
        if self.buffer is None:
            return None
        return memoryview(self.buffer).cast("B")[self.start:self.end]

    @property
    def next_hop(self):
        """Where a forwarded packet goes: the destination's (behind a tunnel, its other end's) or
        the client's address, else None.
        """
        if not self.hop_words:
            return None
        return format_address(self.hop, self.hop_words)

    @property
    def destination(self):
        """(address, port) of the destination whose connection this is, or None."""
        if not self.real_words:
            return None
        return (format_address(self.real, self.real_words), ntohs(self.real_port))

    def __repr__(self):
        return (
            f"<Result {self.verdict.name} {self.reason.name} next_hop={self.next_hop!r}"
            f" destination={self.destination!r}>")


cdef DestConfig *config_new() except NULL:
    """That of a destination by NAT that asks for nothing else: PLAIN."""
    cdef DestConfig *config = <DestConfig *>calloc(1, sizeof(DestConfig))
    if config is NULL:
        raise MemoryError("cannot allocate destinations")
    return config


@cython.no_gc_clear
cdef class Core:
    """The packet core. Use it through `svcdp.Dataplane`, which checks what it is given.

    Thread safe. Times are in ns on the clock that the caller brings.
    """

    def __cinit__(
        self, uint32_t max_connections, uint64_t seed, object clock,
        uint32_t port_first, uint32_t port_last, list timeouts,
    ):
        cdef uint64_t random = seed
        cdef int i
        self.choosers = {}
        self.free_ids = []
        self.configs = {}
        self.draining = set()
        self.unnamed = []
        self.next_id = 1
        self.seed = seed
        self.clock = clock
        self.max_connections = max_connections
        self.engine = <Engine *>calloc(1, sizeof(Engine))
        if self.engine is NULL:
            raise MemoryError("cannot allocate the core")
        table_init(&self.engine.table, max_connections)
        for i in range(6):
            # Odd, so that none is 0: a factor of 0 would hash everything alike.
            self.engine.table.key.word[i] = next_random(&random) | 1
        self.engine.snapshot = snapshot_new(0)
        self.engine.epoch = 1
        self.engine.port_first = port_first
        self.engine.port_count = port_last - port_first + 1
        self.engine.choose = &choose_python
        self.set_timeouts(0, timeouts)
        fragment_table_init(&self.engine.fragments)
        self.engine.helpers.limit = min(max_connections, <uint32_t>HELPERS_MAX)
        self.engine.helpers.helpers = <Helper *>reserve(
            (<size_t>self.engine.helpers.limit + 1) * sizeof(Helper))
        # Of connections that have no destination.
        self.reserve_destination(0)
        dest_of(&self.engine.destinations, 0).config = config_new()
        dest_of(&self.engine.destinations, 0).config.method = METHOD_BYPASS
        set_flags(dest_of(&self.engine.destinations, 0).config)
        self.plain = config_new()

    def __dealloc__(self):
        cdef uint32_t i, j
        cdef Worker *worker
        cdef Retired *item
        if self.engine is NULL:
            return
        if self.engine.watch is not NULL:
            free(self.engine.watch.ring)
            free(self.engine.watch)
        while self.retired is not NULL:
            item = self.retired
            self.retired = item.next
            if item.kind == RETIRED_SERVICE:
                service_free(<Service *>item.pointer)
            elif item.kind == RETIRED_MEMORY:
                free(item.pointer)
            free(item)
        if self.engine.snapshot is not NULL:
            for pointer in snapshot_services(self.engine.snapshot):
                service_free(<Service *><uintptr_t>pointer)
            for i in range(self.engine.snapshot.mask + 1):
                free(self.engine.snapshot.shards[i])
            free(self.engine.snapshot)
        while self.workers is not NULL:
            worker = self.workers
            self.workers = worker.next
            for i in range(DESTINATION_CHUNKS):
                free(worker.traffic[i])
            free(worker)
        for i in range(DESTINATION_CHUNKS):
            if self.engine.destinations.chunks[i] is NULL:
                break
            for j in range(DESTINATION_CHUNK):
                self.free_config(self.engine.destinations.chunks[i][j].config)
            free(self.engine.destinations.chunks[i])
        free(self.plain)
        table_free(&self.engine.table)
        fragment_table_free(&self.engine.fragments)
        give_back(
            self.engine.helpers.helpers,
            (<size_t>self.engine.helpers.limit + 1) * sizeof(Helper))
        free(self.engine)

    # -- workers ---------------------------------------------------------------------------------

    cdef Worker *worker_new(self) except NULL:
        cdef Worker *worker = <Worker *>calloc(1, sizeof(Worker))
        cdef uint32_t i
        if worker is NULL:
            raise MemoryError("cannot allocate a worker")
        worker.next = self.workers
        self.workers = worker
        worker.busy = True
        self.worker_count += 1
        worker.random = self.seed + self.worker_count
        for i in range(DESTINATION_CHUNKS):
            if self.engine.destinations.chunks[i] is NULL:
                break
            worker.traffic[i] = <Traffic *>calloc(DESTINATION_CHUNK, sizeof(Traffic))
            if worker.traffic[i] is NULL:
                # Never handed out again: `busy` stays set.
                raise MemoryError("cannot allocate the counters of a worker")
        return worker

    cdef Worker *worker_acquire(self) except NULL:
        cdef Worker *worker = self.workers
        while worker is not NULL:
            if not exchange_u8(&worker.busy, True):
                return worker
            worker = worker.next
        return self.worker_new()

    cdef void worker_release(self, Worker *worker) noexcept nogil:
        exchange_u8(&worker.busy, False)

    # -- packets ---------------------------------------------------------------------------------

    cdef void process_packets(
        self, Worker *worker, svcdp_packet *packets, uint32_t count, int64_t now
    ) noexcept nogil:
        run(self.engine, worker, packets, count, now)

    cdef uint32_t build_answer(
        self, const svcdp_packet *packet, uint8_t *out, uint32_t capacity
    ) noexcept nogil:
        return answer(packet, out, capacity)

    cdef int64_t time_of(self, object now) except -1:
        cdef int64_t time
        if now is None:
            now = self.clock()
        if not isinstance(now, int):
            raise TypeError(f"now must be an int (ns), not {now!r}")
        time = now
        if not 0 <= time <= TIME_MAX:
            raise ValueError(f"now must be ns from 0 to 2^62, not {time}")
        return time

    cdef void process_one(self, svcdp_packet *packet, int64_t now) noexcept:
        cdef Worker *worker = self.worker_acquire()
        run(self.engine, worker, packet, 1, now)
        self.worker_release(worker)

    def process(self, buffer, now=None, *, uint16_t headroom=0, uint32_t mark=0):
        """Route one IP packet, rewriting it in place.

        `buffer`: a writable buffer that holds `headroom` free bytes (for a tunnel's headers) and
        then one IP packet; bytes behind the IP packet are ignored. `now`: ns on the dataplane's
        clock; read from it when None. `mark`: the packet's firewall mark.
        Returns a Result. Never raises because of what the packet contains; BufferError or
        TypeError when the buffer is not writable and contiguous.
        """
        cdef Py_buffer view
        cdef svcdp_packet packet
        cdef uint8_t out[SVCDP_ANSWER_MAX]
        cdef uint32_t length
        cdef Result result
        cdef Dest *state
        cdef int64_t time = self.time_of(now)
        memset(&packet, 0, sizeof(packet))
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if view.len < headroom:
                raise ValueError(f"a buffer of {view.len} bytes has no headroom of {headroom}")
            packet.data = <uint8_t *>view.buf + headroom
            packet.len = <uint32_t>min(view.len - headroom, <Py_ssize_t>0xffffffff)
            packet.headroom = headroom
            packet.mark = mark
            self.process_one(&packet, time)
            result = Result.__new__(Result)
            result.verdict_code = packet.verdict
            result.reason_code = packet.reason
            result.mark = packet.mark
            if packet.destination:
                # Copied: the id may name another destination by the time that somebody asks.
                state = dest_of(&self.engine.destinations, packet.destination)
                result.real_words = state.words
                result.real_port = state.port
                memcpy(result.real, state.address, 4 * state.words)
            if packet.verdict == SVCDP_VERDICT_PASS or packet.verdict == SVCDP_VERDICT_FORWARD:
                result.buffer = buffer
                result.start = packet.data - <uint8_t *>view.buf
                result.end = result.start + packet.len
            if packet.verdict == SVCDP_VERDICT_FORWARD:
                if packet.flags & SVCDP_PACKET_NEXT_HOP:
                    result.hop_words = result.real_words
                    memcpy(result.hop, result.real, 16)
                else:
                    result.hop_words = 1 if packet.data[0] >> 4 == 4 else 4
                    memcpy(
                        result.hop, packet.data + (16 if result.hop_words == 1 else 24),
                        4 * result.hop_words)
            elif packet.verdict == SVCDP_VERDICT_REJECT:
                length = answer(&packet, out, sizeof(out))
                if length:
                    result.buffer = PyBytes_FromStringAndSize(<char *>out, length)
                    result.end = length
        finally:
            PyBuffer_Release(&view)
        return result

    def process_batch(self, batch, now=None):
        """Route many packets; each is rewritten in place.

        `batch`: a PacketBatch, or a sequence of writable buffers of one packet each.
        Returns the verdicts, one byte a packet. A PacketBatch also keeps the reasons.
        The GIL is free meanwhile, and several threads may each process a batch of their own.
        """
        cdef int64_t time = self.time_of(now)
        if isinstance(batch, PacketBatch):
            return self.process_contiguous(<PacketBatch>batch, time)
        return self.process_buffers(batch, time)

    cdef bytes process_contiguous(self, PacketBatch batch, int64_t now):
        """`process_batch` of a PacketBatch."""
        cdef Worker *worker
        if batch.busy:
            raise RuntimeError("the batch is being processed by another thread")
        worker = self.worker_acquire()
        batch.busy = True
        if batch.count < BATCH_NOGIL:
            run(self.engine, worker, batch.packets, batch.count, now)
        else:
            with nogil:
                run(self.engine, worker, batch.packets, batch.count, now)
        batch.busy = False
        self.worker_release(worker)
        return batch.verdict_bytes()

    cdef bytes process_buffers(self, object buffers, int64_t now):
        """`process_batch` of a sequence of buffers. All of them are checked before the first
        packet is touched.
        """
        cdef list items = list(buffers)
        cdef Py_ssize_t count = len(items), held = 0, i
        cdef bytes verdicts = PyBytes_FromStringAndSize(NULL, count)
        cdef char *out = verdicts
        cdef svcdp_packet *packets = <svcdp_packet *>calloc(count + 1, sizeof(svcdp_packet))
        cdef Py_buffer *views = <Py_buffer *>malloc((count + 1) * sizeof(Py_buffer))
        cdef Worker *worker
        try:
            if packets is NULL or views is NULL or count > 0xffffffff:
                raise MemoryError(f"cannot process {count} packets at once")
            for i in range(count):
                PyObject_GetBuffer(items[i], &views[i], PyBUF_SIMPLE | PyBUF_WRITABLE)
                held += 1
                packets[i].data = <uint8_t *>views[i].buf
                packets[i].len = <uint32_t>min(views[i].len, <Py_ssize_t>0xffffffff)
            worker = self.worker_acquire()
            if count < BATCH_NOGIL:
                run(self.engine, worker, packets, <uint32_t>count, now)
            else:
                with nogil:
                    run(self.engine, worker, packets, <uint32_t>count, now)
            self.worker_release(worker)
            for i in range(count):
                out[i] = packets[i].verdict
        finally:
            for i in range(held):
                PyBuffer_Release(&views[i])
            free(views)
            free(packets)
        return verdicts

    def answer(self, packet, int kind=SVCDP_ANSWER_DEFAULT, uint32_t mtu=0):
        """The reply (bytes) to a rejected packet, or None when it must not be answered.

        `kind`: what to tell (enum svcdp_answer of abi.h), `mtu` of a packet that is too big.
        """
        cdef Py_buffer view
        cdef svcdp_packet rejected
        cdef uint8_t out[SVCDP_ANSWER_MAX]
        cdef uint32_t length
        if not 0 <= kind <= SVCDP_ANSWER_TOO_BIG:
            raise ValueError(f"no kind of answer: {kind}")
        memset(&rejected, 0, sizeof(rejected))
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            rejected.data = <uint8_t *>view.buf
            rejected.len = <uint32_t>min(view.len, <Py_ssize_t>0xffffffff)
            rejected.answer = <uint16_t>kind
            rejected.answer_mtu = mtu
            length = answer(&rejected, out, sizeof(out))
        finally:
            PyBuffer_Release(&view)
        return PyBytes_FromStringAndSize(<char *>out, length) if length else None

    def next_hop(self, PacketBatch batch, Py_ssize_t index):
        """Where a forwarded packet of a batch goes, as `Result.next_hop` says; None for others.
        To be asked before destinations are changed.
        """
        cdef svcdp_packet *packet = batch.packet(index)
        cdef const Dest *target
        cdef uint32_t words
        if packet.verdict != SVCDP_VERDICT_FORWARD:
            return None
        if packet.flags & SVCDP_PACKET_NEXT_HOP:
            target = dest_of(&self.engine.destinations, packet.destination)
            return format_address(target.address, target.words)
        words = 1 if packet.data[0] >> 4 == 4 else 4
        return format_address(packet.data + (16 if words == 1 else 24), words)

    def populate(self):
        """Take the memory of the connection table now, rather than when packets need it."""
        with nogil:
            table_populate(&self.engine.table)

    def records(self):
        """How many records of a family were ever in use at once: what a full sweep looks at."""
        return max(
            load_acquire_u32(&self.engine.table.pools[0].fresh),
            load_acquire_u32(&self.engine.table.pools[1].fresh)) - 1

    def sweep_records(self, now, uint32_t limit):
        """Look at `limit` records of each family, the next in turn, and drop expired ones."""
        cdef int64_t time = self.time_of(now)
        cdef Worker *worker = self.worker_acquire()
        with nogil:
            exchange_u64(&worker.epoch, load_acquire_u64(&self.engine.epoch))
            sweep(self.engine, worker, time, limit)
            store_release_u64(&worker.epoch, 0)
        self.worker_release(worker)
        self.reclaim()

    # -- changes ---------------------------------------------------------------------------------

    cdef int reserve_destination(self, uint32_t id) except -1:
        """Memory for a destination's state and, with every worker, for its counters."""
        cdef uint32_t chunk = id // DESTINATION_CHUNK
        cdef Worker *worker = self.workers
        cdef Dest *destinations
        if chunk >= DESTINATION_CHUNKS:
            raise OverflowError(
                f"no more than {DESTINATION_CHUNKS * DESTINATION_CHUNK - 1} destinations")
        while worker is not NULL:
            if worker.traffic[chunk] is NULL:
                worker.traffic[chunk] = <Traffic *>calloc(DESTINATION_CHUNK, sizeof(Traffic))
                if worker.traffic[chunk] is NULL:
                    raise MemoryError("cannot allocate the counters of destinations")
            worker = worker.next
        if self.engine.destinations.chunks[chunk] is NULL:
            destinations = <Dest *>aligned_alloc(CACHE_LINE, DESTINATION_CHUNK * sizeof(Dest))
            if destinations is NULL:
                raise MemoryError("cannot allocate destinations")
            memset(destinations, 0, DESTINATION_CHUNK * sizeof(Dest))
            self.engine.destinations.chunks[chunk] = destinations
        return 0

    cdef Dest *destination_of(self, uint32_t id) except NULL:
        """What is known of a destination. IndexError when there never was one of this id."""
        if not 0 < id < self.next_id:
            raise IndexError(f"no destination {id}")
        return dest_of(&self.engine.destinations, id)

    def new_destinations(self, endpoints):
        """{endpoint: `new_destination`} of each (address, port)."""
        return {endpoint: self.new_destination(endpoint[0], endpoint[1]) for endpoint in endpoints}

    cpdef object new_destination(self, str address, uint16_t port):
        """A Destination of weight 0 that no service names yet. `forget` takes it back unless a
        commit comes first. `address` is normalised.
        """
        cdef Destination result = Destination.__new__(Destination)
        cdef uint8_t packed[16]
        cdef uint32_t words = 4 if ":" in address else 1
        cdef uint32_t id = self.free_ids.pop() if self.free_ids else self.next_id
        cdef Dest *state
        cdef Dest fresh
        cdef Worker *worker = self.workers
        if inet_pton(
            AF_INET if words == 1 else AF_INET6, PyUnicode_AsUTF8(address), packed
        ) != 1:
            raise ValueError(f"{address!r} is no IP address")
        self.reserve_destination(id)
        if id == self.next_id:
            self.next_id += 1
        self.unnamed.append(id)
        state = dest_of(&self.engine.destinations, id)
        memset(&fresh, 0, sizeof(Dest))
        memcpy(fresh.address, packed, 4 * words)
        fresh.id = id
        fresh.words = <uint8_t>words
        fresh.port = htons(port)
        fresh.on_removal = REMOVAL_UNSET
        # What the id had before is freed when it gets another one.
        fresh.config = self.plain if state.config is NULL else state.config
        fresh.generation = state.generation  # packets may look at it at any time
        state[0] = fresh
        self.configs.pop(id, None)
        while worker is not NULL:
            memset(&worker.traffic[id // DESTINATION_CHUNK][id % DESTINATION_CHUNK], 0,
                   sizeof(Traffic))
            worker = worker.next
        result.core = self
        result.state = state
        result.address = address
        return result

    def forget(self):
        """Take back new destinations that no service came to name."""
        self.free_ids += self.unnamed
        self.unnamed.clear()

    def set_timeouts(self, uint8_t number, list timeouts):
        """Timeouts of a class, in ns by state. Connections take them up with their next packet."""
        cdef uint32_t i
        if len(timeouts) != STATE_COUNT:
            raise ValueError(f"{STATE_COUNT} states need a timeout, not {len(timeouts)}")
        for i in range(STATE_COUNT):
            store_i64(&self.engine.timeouts[number][i], timeouts[i])

    def timeouts_in_use(self):
        """The classes of timeouts that services and connections have."""
        cdef uint8_t used[TIMEOUT_CLASSES]
        cdef uint32_t pool, index, _
        cdef Conn *conn
        cdef Retired *item
        memset(used, 0, sizeof(used))
        self.reclaim()
        item = self.retired
        while item is not NULL:
            if item.kind == RETIRED_SERVICE:
                used[(<Service *>item.pointer).timeouts] = True
            item = item.next
        for pointer in snapshot_services(self.engine.snapshot):
            used[(<Service *><uintptr_t>pointer).timeouts] = True
        # Twice: a connection that was expected may have found a place that was looked at.
        for _ in range(2):
            for pool in range(2):
                for index in range(1, load_acquire_u32(&self.engine.table.pools[pool].fresh)):
                    conn = record(&self.engine.table, pool, index)
                    if load_u8(&conn.protocol) != CONN_FREE:
                        used[conn.timeouts] = True
        return {index for index in range(TIMEOUT_CLASSES) if used[index]}

    def set_settings(self, settings):
        """Take what svcdp.Settings says, checked by the caller."""
        cdef Settings *target = &self.engine.settings
        target.conn_reuse_mode = settings.conn_reuse_mode
        target.expire_quiescent_template = settings.expire_quiescent_template
        target.sloppy_tcp = settings.sloppy_tcp
        target.sloppy_sctp = settings.sloppy_sctp
        target.secure_tcp = settings.secure_tcp
        target.schedule_icmp = settings.schedule_icmp
        target.cache_bypass = settings.cache_bypass
        target.drop_entry = settings.drop_entry
        target.drop_packet = settings.drop_packet
        target.pmtu_disc = settings.pmtu_disc
        target.decrement_ttl = settings.decrement_ttl
        target.am_droprate = settings.am_droprate
        target.answer_rate = settings.answer_rate
        target.expirations.lblc = settings.lblc_expiration * 10**9
        target.expirations.lblcr = settings.lblcr_expiration * 10**9
        self.attend()
        # Load is looked at with the next packet.
        store_i64(&self.engine.second, 0)

    cdef void attend(self) noexcept:
        """See whether every packet has to take the long way."""
        store_u8(
            &self.engine.is_attentive,
            self.engine.settings.decrement_ttl or self.engine.watch is not NULL)

    cdef list new_configs(self, list services):
        """[(id, address of a new DestConfig, what it was made of)] for destinations that are new
        or that change.
        """
        cdef DestConfig *config
        cdef list made = []
        try:
            for record, *_ in services:
                give_way()
                for id, _, _, _, wanted in record.members:
                    if wanted == PLAIN:
                        if dest_of(&self.engine.destinations, id).config != self.plain:
                            made.append((id, <uintptr_t>self.plain, wanted))
                        continue
                    if self.configs.get(id) == wanted:
                        continue
                    config = config_new()
                    made.append((id, <uintptr_t>config, wanted))
                    method, tunnel_type, checksum, port, source, mtu, mark = wanted
                    config.method = method
                    config.tunnel_type = tunnel_type
                    config.tunnel_checksum = checksum
                    config.tunnel_port = htons(port)
                    config.source_words = <uint8_t>(len(source) // 4)
                    memcpy(config.tunnel_source, PyBytes_AS_STRING(source), min(len(source), 16))
                    config.mtu = mtu
                    config.mark = mark
                    set_flags(config)
                    if method == METHOD_TUNNEL:
                        prepare_tunnel(config, dest_of(&self.engine.destinations, id))
        except BaseException:
            for _, pointer, _ in made:
                self.free_config(<void *><uintptr_t>pointer)
            raise
        return made

    cdef void free_config(self, void *config) noexcept:
        if config != self.plain:
            free(config)

    cdef void publish_destination(self, Service *service, object record) noexcept:
        """What changes at once, for all connections of a service's destinations."""
        cdef uint32_t i
        cdef Dest *target
        cdef Service *before = self.find_service(record)
        if before is not NULL and (
            before.on_removal != service.on_removal or before.grace != service.grace
        ):
            # Also of those that are being removed.
            for i in range(before.member_count):
                self.change_removal(before.members[i].destination, service)
        for i in range(service.member_count):
            target = service.members[i].destination
            _, weight, upper, lower, _ = record.members[i]
            store_u32(&target.weight, weight)
            store_u32(&target.upper, upper)
            store_u32(&target.lower, lower)
            self.change_removal(target, service)
            reconsider(target)
            store_i64(&target.ejection_max, service.ejection_max)
            store_u32(&target.failures_max, service.failures_max)
            store_i64(&target.ejection, service.ejection)
            if not service.is_passive:
                readmit(self.engine, target, 0)

    cdef void change_removal(self, Dest *target, const Service *service) noexcept:
        if target.on_removal == REMOVAL_DRAIN and service.on_removal != REMOVAL_DRAIN:
            self.unwatched = True
        store_i64(&target.grace, service.grace)
        store_u8(&target.on_removal, service.on_removal)

    cdef void watch_removals(self) noexcept:
        """Have packets of all connections look whether their destination was removed, unless it
        makes no difference.
        """
        cdef uint32_t pool, index
        cdef Conn *conn
        with nogil:
            for pool in range(2):
                for index in range(1, load_acquire_u32(&self.engine.table.pools[pool].fresh)):
                    conn = record(&self.engine.table, pool, index)
                    spin_lock(&conn.lock)
                    if (
                        conn.protocol != CONN_FREE and conn.protocol != CONN_TEMPLATE
                        and dest_of(&self.engine.destinations, conn.destination).on_removal
                        != REMOVAL_DRAIN
                    ):
                        conn.flags |= CONN_WATCHED
                    spin_unlock(&conn.lock)

    def commit(
        self, list services, list removed, list left_ids, list removed_ids, list restored_ids,
        list books,
    ):
        """Publish a change; packets see all of its services or none.

        `services`: (record, edits, edits of the subset of each rule) of services to add or
        replace; `removed`: records of services to drop; the ids of destinations that no service
        names any more, of those whose connections are treated so from now on, and of those that one
        names again. `books`: (dict, keys that leave it, what
        enters it) of the caller's, which follow before a signal handler can raise. MemoryError or
        OverflowError, and then nothing has changed.
        """
        cdef list added = []
        cdef list outgoing = []
        cdef list replaced = []
        cdef list configs = []
        cdef dict book
        cdef void *config
        cdef Service *service
        cdef Service *before
        cdef Snapshot *snapshot
        cdef uint64_t epoch
        cdef Snapshot *old = self.engine.snapshot
        try:
            configs = self.new_configs(services)
            for record, edits, subset_edits in services:
                give_way()
                service = service_new(record, &self.engine.destinations)
                added.append(<uintptr_t>service)
                if record.chooser is not None:
                    self.choosers[<uintptr_t>service] = record
                before = self.find_service(record)
                if before is not NULL:
                    outgoing.append(<uintptr_t>before)
                advance(service, edits, before)
                advance_subsets(service, subset_edits, before)
            for record in removed:
                before = self.find_service(record)
                if before is not NULL:
                    outgoing.append(<uintptr_t>before)
            snapshot = snapshot_next(&self.engine.table.key, old, added, outgoing, replaced)
        except BaseException:
            for pointer in added:
                self.drop_service(<Service *><uintptr_t>pointer)
            for _, pointer, _ in configs:
                self.free_config(<void *><uintptr_t>pointer)
            raise
        for id, pointer, wanted in configs:
            config = exchange_ptr(
                <void **>&dest_of(&self.engine.destinations, id).config,
                <void *><uintptr_t>pointer)
            if config != self.plain:
                replaced.append(<uintptr_t>config)
            self.configs[id] = wanted
        for pointer, (record, *_) in zip(added, services):
            give_way()
            self.publish_destination(<Service *><uintptr_t>pointer, record)
        for id in removed_ids:
            store_i64(&dest_of(&self.engine.destinations, id).reset_at, 0)
            dest_of(&self.engine.destinations, id).removed = True
            readmit(self.engine, dest_of(&self.engine.destinations, id), 0)
        for id in restored_ids:
            dest_of(&self.engine.destinations, id).removed = False
        exchange_ptr(<void **>&self.engine.snapshot, snapshot)
        self.unnamed.clear()
        for book, leaving, entering in books:
            for key in leaving:
                book.pop(key, None)
            book.update(entering)
        self.draining.difference_update(restored_ids)
        self.draining.update(left_ids)
        epoch = add_ordered_u64(&self.engine.epoch, 1)
        if self.unwatched:
            self.unwatched = False
            self.unwatched_epoch = epoch
        for pointer in replaced:
            self.retire(<void *><uintptr_t>pointer, RETIRED_MEMORY, epoch)
        for pointer in outgoing:
            self.retire(<void *><uintptr_t>pointer, RETIRED_SERVICE, epoch)
        self.retire(old, RETIRED_MEMORY, epoch)
        self.reclaim()

    cdef Service *find_service(self, object record) except? NULL:
        """The service of a record's key as it is now, or NULL."""
        cdef uint8_t address[16]
        cdef Service *service
        memset(address, 0, sizeof(address))
        memcpy(address, PyBytes_AS_STRING(record.address), min(len(record.address), 16))
        service = block_find(
            &self.engine.table.key, self.engine.snapshot, address, record.words,
            htons(record.port), PORT_BITS, record.protocol)
        if service is NULL:
            service = wide_find(
                &self.engine.table.key, self.engine.snapshot, address, record.words,
                htons(record.port), record.protocol)
        if service is not NULL and service.first_port != record.port:
            return NULL
        return service

    cdef void retire(self, void *pointer, Retiree kind, uint64_t epoch) noexcept:
        """Have something freed once no packet can see it. Without memory for that it leaks."""
        cdef Retired *item
        if pointer is not NULL:
            item = <Retired *>malloc(sizeof(Retired))
            if item is not NULL:
                item.next = self.retired
                item.epoch = epoch
                item.kind = kind
                item.pointer = pointer
                self.retired = item

    cdef void reclaim(self) noexcept:
        """Free what no packet on its way can still see."""
        cdef uint64_t oldest = <uint64_t>-1
        cdef uint64_t epoch
        cdef Worker *worker = self.workers
        cdef Retired *items = self.retired
        cdef Retired *unseen = NULL
        cdef Retired *item
        while worker is not NULL:
            epoch = load_ordered_u64(&worker.epoch)
            if epoch and epoch < oldest:
                oldest = epoch
            worker = worker.next
        self.retired = NULL
        while items is not NULL:
            item = items
            items = item.next
            if item.epoch > oldest:
                item.next = self.retired
                self.retired = item
            else:
                item.next = unseen
                unseen = item
        # Last: freeing a scheduler may run Python, and that may come back here.
        while unseen is not NULL:
            item = unseen
            unseen = item.next
            self.free_retired(item)
        if self.unwatched_epoch and self.unwatched_epoch <= oldest:
            # Connections that are made from here on know.
            self.unwatched_epoch = 0
            self.watch_removals()

    cdef void free_retired(self, Retired *item) noexcept:
        if item.kind == RETIRED_SERVICE:
            self.drop_service(<Service *>item.pointer)
        elif item.kind == RETIRED_DESTINATION:
            self.free_ids.append(<uintptr_t>item.pointer)
        else:
            free(item.pointer)
        free(item)

    cdef void drop_service(self, Service *service) noexcept:
        service_free(service)
        self.choosers.pop(<uintptr_t>service, None)

    # -- connections that outlive the process ------------------------------------------------------

    def state_rows(self, uint32_t pool, uint32_t start, uint32_t limit):
        """As connection_rows(), but rows of state_row(), of templates too."""
        cdef uint32_t fresh = load_acquire_u32(&self.engine.table.pools[check_pool(pool)].fresh)
        cdef uint32_t end = min(fresh, max(start, 1) + limit)
        cdef uint32_t index
        cdef uint8_t copy[RECORD_V6]
        cdef list rows = []
        for index in range(max(start, 1), end):
            self.copy_record(pool, index, copy)
            if (<Conn *>copy).protocol != CONN_FREE:
                rows.append(self.state_row(<Conn *>copy, 4 if pool else 1))
        return (end if end < fresh else 0), rows

    cdef tuple state_row(self, Conn *conn, uint32_t words):
        """(protocol number, client, port, virtual or the number of the persistence group, port,
        real or None, port, source, port, state number, timeout ns, deadline ns, flags as in
        uapi/linux/ip_vs.h, fwmark, packets, sequences_of()), from a copy of a record.
        """
        cdef const Dest *target = dest_of(&self.engine.destinations, conn.destination)
        cdef bint is_template = conn.protocol == CONN_TEMPLATE
        cdef uint32_t method = method_of(conn)
        cdef uint32_t flags = method
        cdef uint16_t port = conn.real_port
        if conn.flags & CONN_SYNCED:
            flags |= STATE_SYNC
        if conn.flags & CONN_IN_ONLY:
            flags |= STATE_NOOUTPUT
        if is_template:
            flags |= STATE_TEMPLATE
        elif not is_active(conn.state):
            flags |= STATE_INACTIVE
        if conn.flags & CONN_NO_CLIENT_PORT:
            flags |= STATE_NO_CPORT
        if conn.flags & CONN_ONE_WAY:
            flags |= STATE_ONE_PACKET
        if is_template or method == METHOD_MASQ:
            real = format_address(address_of(conn, REAL, words), words)
        elif method == METHOD_BYPASS:
            real = None
        else:
            real = format_address(target.address, target.words)
            port = target.port if target.port else conn.virtual_port
        return (
            conn.protocol,
            format_address(address_of(conn, CLIENT, words), words), ntohs(conn.client_port),
            load32(address_of(conn, VIRTUAL, words)) if is_template
            else format_address(address_of(conn, VIRTUAL, words), words),
            ntohs(conn.virtual_port), real, ntohs(port),
            format_address(address_of(conn, SOURCE, words), words), ntohs(conn.source_port),
            conn.state, self.engine.timeouts[conn.timeouts][0 if is_template else conn.state],
            conn.deadline, flags, conn.fwmark, 0 if is_template else conn.packets,
            self.sequences_of(conn, words) if conn.flags & CONN_HELPED else None,
        )

    cdef tuple sequences_of(self, Conn *conn, uint32_t words):
        """How far a helper has shifted the sequence numbers of a connection, from a copy of its
        record: ((position, delta, delta before), the same of the destination), or None.
        """
        cdef SeqDelta shifts[2]
        cdef Conn *live
        cdef View view
        cdef uint32_t direction
        memset(&view, 0, sizeof(view))
        memset(shifts, 0, sizeof(shifts))
        flow_view(
            conn, FROM_CLIENT, words,
            conn_hash(&self.engine.table, conn, words, FROM_CLIENT), &view)
        # The helper is that of the live one, which may have gone since.
        live = find(&self.engine.table, &view, &direction)
        if live is NULL:
            return None
        if live.flags & CONN_HELPED:
            memcpy(
                shifts, self.engine.helpers.helpers[live.extra].ftp.seq, sizeof(shifts))
        spin_unlock(&live.lock)
        if not (
            shifts[0].delta or shifts[0].previous_delta
            or shifts[1].delta or shifts[1].previous_delta
        ):
            return None
        return (
            (shifts[0].position, shifts[0].delta, shifts[0].previous_delta),
            (shifts[1].position, shifts[1].delta, shifts[1].previous_delta))

    def service_key(
        self, bytes address, uint16_t port, uint8_t protocol, uint32_t mark
    ):
        """The key of the service that gets such packets (see inspect()), or None."""
        cdef Service *service = table_find(
            &self.engine.table.key, self.engine.snapshot,
            <const uint8_t *>PyBytes_AS_STRING(address), words_of(address), htons(port),
            protocol, mark)
        return None if service is NULL else key_of(service)

    def import_template(
        self, record, bytes client, uint32_t id, int64_t deadline, bint assured, bint synced,
        int64_t now,
    ):
        """Bind a client to a destination of the service of a record. False: no room."""
        cdef Service *service = self.find_service(record)
        cdef Conn *template
        cdef Affinity affinity
        cdef View view
        cdef uint32_t control, direction
        view.source = <const uint8_t *>PyBytes_AS_STRING(client)
        if service is NULL or service.persistence == 0:
            return False
        if words_of(client) != service.words:
            raise ValueError("client and service are of different families")
        if not affinity_of(self.engine, service, NULL, &view, &affinity):
            return False
        control = hang_on(
            self.engine, service, &affinity, self.destination_of(id), now)
        template = find(&self.engine.table, &affinity.view, &direction)
        if template is NULL:
            return False
        template.deadline = deadline
        if assured:
            template.state = TEMPLATE_ASSURED
        if synced:
            template.flags |= CONN_SYNCED
        spin_unlock(&template.lock)
        let_go(self.engine, service.words, control)
        return True

    def import_record(
        self, record, uint8_t protocol, bytes client, uint16_t client_port, bytes virtual,
        uint16_t virtual_port, bytes source, uint16_t source_port, uint32_t id, uint8_t state,
        int64_t deadline, uint32_t packets, uint32_t flags, sequences, int64_t now,
    ):
        """Make or change a connection of the service of a record to one of its destinations.
        `sequences` as from sequences_of(). One of INSERTED, KNOWN, CLASH and FULL.
        """
        cdef Service *service = self.find_service(record)
        cdef SeqDelta shifts[2]
        cdef Worker *worker
        cdef uint32_t outcome, i
        cdef Dest *target = self.destination_of(id)
        if service is NULL:
            return CLASH
        if words_of(client) != service.words or words_of(virtual) != service.words \
                or words_of(source) != service.words:
            raise ValueError("addresses are of different families")
        if state >= STATE_COUNT:
            raise ValueError(f"no state has the number {state}")
        if sequences is not None:
            for i in range(2):
                shifts[i].position, shifts[i].delta, shifts[i].previous_delta = sequences[i]
        worker = self.worker_acquire()
        exchange_u64(&worker.epoch, load_acquire_u64(&self.engine.epoch))
        outcome = self.import_locked(
            worker, service, protocol, <const uint8_t *>PyBytes_AS_STRING(client), client_port,
            <const uint8_t *>PyBytes_AS_STRING(virtual), virtual_port,
            <const uint8_t *>PyBytes_AS_STRING(source), source_port, target, state, deadline,
            packets, flags, NULL if sequences is None else shifts, now)
        store_release_u64(&worker.epoch, 0)
        self.worker_release(worker)
        return outcome

    cdef uint32_t import_locked(
        self, Worker *worker, Service *service, uint8_t protocol, const uint8_t *client,
        uint16_t client_port, const uint8_t *virtual, uint16_t virtual_port,
        const uint8_t *source, uint16_t source_port, Dest *target, uint8_t state,
        int64_t deadline, uint32_t packets, uint32_t flags, const SeqDelta *shifts, int64_t now,
    ) noexcept:
        """`import_record` with the worker's epoch set: nothing that it sees is freed."""
        cdef uint64_t memory[RECORD_WORDS]
        cdef Conn *pattern = <Conn *>memory
        cdef Conn *conn = NULL
        cdef Conn *other = NULL
        cdef View view
        cdef uint32_t words = service.words
        cdef uint32_t control, outcome, _
        cdef bint masquerade, is_helped
        memset(&view, 0, sizeof(view))
        view.words = <uint8_t>words
        view.protocol = protocol
        view.source = client
        view.source_port = htons(client_port)
        view.destination = virtual
        view.destination_port = htons(virtual_port)
        masquerade = target.config.method == METHOD_MASQ and (
            source_port != client_port or not same_address(client, source, words))
        fill(
            self.engine, pattern, service, &view, target,
            flags_of(service, target, &view, masquerade) & <uint16_t>~CONN_ONE_WAY, now)
        if flags & STATE_SYNC:
            pattern.flags |= CONN_SYNCED
        if not flags & STATE_NOOUTPUT:
            pattern.flags &= <uint16_t>~CONN_IN_ONLY
        pattern.state = state
        pattern.deadline = deadline
        pattern.packets = packets
        copy_address(address_of(pattern, SOURCE, words), source, words)
        pattern.source_port = htons(source_port)
        compute_deltas(pattern, words)
        is_helped = service.is_ftp and may_help(service, pattern)
        if shifts is not NULL and not is_helped:
            return CLASH
        for _ in range(2):
            conn = new_record(self.engine, worker, words, now)
            if conn is NULL:
                return FULL
            control = 0
            if service.persistence:
                control = hang_on_known(self.engine, service, &view, target)
            copy_pattern(conn, pattern, words)
            conn.control = control
            outcome = insert(&self.engine.table, conn, words, &other)
            if outcome == INSERTED:
                count_in(target, conn)
                worker.created += 1
                if is_helped:
                    give_helper(self.engine, conn)
                    take_shifts(self.engine, conn, shifts)
                spin_unlock(&conn.lock)
                return INSERTED
            discard(self.engine, conn, words)
            let_go(self.engine, words, control)
            if other is NULL:
                return outcome
            if outcome == KNOWN and other.destination == target.id:
                if other.state != state:
                    add_i32(load_of(target, other.state), -1)
                    add_i32(load_of(target, state), 1)
                    other.state = state
                other.deadline = deadline
                other.packets = packets
                take_shifts(self.engine, other, shifts)
                spin_unlock(&other.lock)
                return KNOWN
            # It went elsewhere, or is over: ip_vs_sync.c, ip_vs_proc_conn, starts it anew.
            if outcome == KNOWN or other.deadline <= now:
                other.deadline = now
                spin_unlock(&other.lock)
                expire(self.engine, worker, other, words, now)
            else:
                spin_unlock(&other.lock)
                return CLASH
        return CLASH

    def watch_open(self, uint32_t limit, uint32_t threshold, uint32_t period):
        """Note connections from now on, `limit` of them until they are read."""
        cdef Watch *watch
        if self.engine.watch is not NULL:
            raise RuntimeError("connections are being watched already")
        watch = <Watch *>calloc(1, sizeof(Watch))
        if watch is NULL:
            raise MemoryError("cannot watch connections")
        watch.ring = <Noted *>calloc(limit, sizeof(Noted))
        if watch.ring is NULL:
            free(watch)
            raise MemoryError(f"cannot watch {limit} connections")
        watch.size = limit
        watch.threshold = threshold
        watch.period = period
        exchange_ptr(<void **>&self.engine.watch, watch)
        self.attend()

    def watch_close(self):
        """Watch no more. What was not read is lost."""
        cdef Watch *watch = self.engine.watch
        cdef uint64_t epoch
        if watch is not NULL:
            exchange_ptr(<void **>&self.engine.watch, NULL)
            self.attend()
            epoch = add_ordered_u64(&self.engine.epoch, 1)
            self.retire(watch.ring, RETIRED_MEMORY, epoch)
            self.retire(watch, RETIRED_MEMORY, epoch)

    def watch_rows(self, uint32_t limit):
        """(rows of state_row() of connections noted so far, at most `limit`; how many were lost
        because nobody read in time)."""
        cdef Watch *watch = self.engine.watch
        cdef Noted entry
        cdef Conn *conn
        cdef bint some
        cdef list rows = []
        if watch is NULL:
            return rows, 0
        while len(rows) < limit:
            spin_lock(&watch.lock)
            some = watch.head != watch.tail
            if some:
                entry = watch.ring[watch.tail % watch.size]
                watch.tail += 1
            spin_unlock(&watch.lock)
            if not some:
                break
            conn = <Conn *>entry.record
            if dest_of(&self.engine.destinations, conn.destination).generation == entry.generation:
                rows.append(self.state_row(conn, entry.words))
        return rows, watch.lost

    # -- observation -----------------------------------------------------------------------------

    def draining_ids(self):
        """Ids of removed destinations that connections still use.

        The others of them may be given to new destinations from now on, so the caller sees to
        it that nobody has plans for one.
        """
        cdef Dest *target
        cdef list unused
        cdef uint64_t epoch
        self.reclaim()
        # A packet on its way may still make a connection from a retired snapshot.
        if self.retired is NULL:
            unused = []
            for id in self.draining:
                target = dest_of(&self.engine.destinations, id)
                if load_u32(&target.references) == 0 and load_u32(&target.held) == 0:
                    # Now what was remembered of it is void; a packet may be about to use it.
                    store_u16(&target.generation, target.generation + 1)
                    unused.append(id)
            if unused:
                epoch = add_ordered_u64(&self.engine.epoch, 1)
                for id in unused:
                    self.retire(<void *><uintptr_t>id, RETIRED_DESTINATION, epoch)
                self.draining.difference_update(unused)
                self.reclaim()
        return frozenset(self.draining)

    def traffic(self, uint32_t id):
        """(connections, packets_in, bytes_in, packets_out, bytes_out) of a destination so far."""
        cdef Traffic *traffic
        cdef Worker *worker = self.workers
        cdef uint64_t connections = 0, packets_in = 0, bytes_in = 0, packets_out = 0, bytes_out = 0
        self.destination_of(id)
        while worker is not NULL:
            traffic = &worker.traffic[id // DESTINATION_CHUNK][id % DESTINATION_CHUNK]
            connections += traffic.connections
            packets_in += traffic.packets_in
            bytes_in += traffic.bytes_in
            packets_out += traffic.packets_out
            bytes_out += traffic.bytes_out
            worker = worker.next
        return connections, packets_in, bytes_in, packets_out, bytes_out

    def counters(self):
        """Sums over all workers: ({(Verdict, Reason): packets}, created, expired,
        scheduler_errors, ejections, retries), and what the table holds: (connections, templates).
        """
        cdef dict packets = {}
        cdef uint64_t totals[SVCDP_VERDICT_COUNT][SVCDP_REASON_COUNT]
        cdef uint64_t created = 0, expired = 0, errors = 0, ejections = 0, retries = 0
        cdef uint32_t templates = load_u32(&self.engine.table.templates)
        cdef Worker *worker = self.workers
        cdef uint32_t verdict, reason
        memset(totals, 0, sizeof(totals))
        while worker is not NULL:
            for verdict in range(SVCDP_VERDICT_COUNT):
                for reason in range(SVCDP_REASON_COUNT):
                    totals[verdict][reason] += worker.verdicts[verdict][reason]
            created += worker.created
            expired += worker.expired
            errors += worker.scheduler_errors
            ejections += worker.ejections
            retries += worker.retries
            worker = worker.next
        for verdict in range(SVCDP_VERDICT_COUNT):
            for reason in range(SVCDP_REASON_COUNT):
                if totals[verdict][reason]:
                    packets[VERDICTS[verdict], REASONS[reason]] = totals[verdict][reason]
        return (
            packets, created, expired, errors, ejections, retries,
            load_u32(&self.engine.table.count) - templates, templates)

    def table_ids(self, record):
        """Which destination, by id, each entry of a service's table names: sh and mh, else []."""
        cdef Service *service = self.find_service(record)
        return [] if service is NULL else entry_ids(service)

    def connection_rows(self, uint32_t pool, uint32_t start, uint32_t limit):
        """Rows of connections of a family (0: IPv4, 1: IPv6) whose records are `start` and up.

        (next start or 0, [(protocol, client, port, virtual, port, real, port, source, port,
        state, method, fwmark, deadline, packets, destination id)]). Looks at `limit` records at
        most.
        """
        cdef uint32_t fresh = load_acquire_u32(&self.engine.table.pools[check_pool(pool)].fresh)
        cdef uint32_t end = min(fresh, max(start, 1) + limit)
        cdef uint32_t index
        cdef list rows = []
        for index in range(max(start, 1), end):
            row = self.connection_row(pool, index)
            if row is not None:
                rows.append(row)
        return (end if end < fresh else 0), rows

    cdef void copy_record(self, uint32_t pool, uint32_t index, uint8_t *copy) noexcept:
        cdef Conn *conn = record(&self.engine.table, pool, index)
        spin_lock(&conn.lock)
        memcpy(copy, conn, RECORD_V6 if pool else RECORD_V4)
        spin_unlock(&conn.lock)

    cdef tuple connection_row(self, uint32_t pool, uint32_t index):
        cdef uint8_t copy[RECORD_V6]
        cdef Conn *conn = <Conn *>copy
        self.copy_record(pool, index, copy)
        if conn.protocol == CONN_FREE or conn.protocol == CONN_TEMPLATE:
            return None
        return self.describe(conn, 4 if pool else 1)

    def inspect(
        self, uint8_t protocol, bytes source, uint16_t source_port, bytes destination,
        uint16_t destination_port, uint32_t mark, int64_t now,
    ):
        """What the tables say of the first packet of a flow (a SYN, an INIT); nothing changes.

        (row of its connection or None, whether the flow is the reply of that connection,
        the verdict on it because the connection's destination is gone, or None,
        key of the service (address or None for a fwmark, port or mark, protocol) or None,
        index of the service's rule that admits the source or -1, index in the rule's subset of the
        member it is persistent to or -1, of the member that the scheduler picks, -1 for nobody,
        or UNFORESEEN), the last three -1 without a service.
        """
        cdef View view
        cdef Conn *conn
        cdef Service *service
        cdef Service *subset
        cdef const Rule *rule
        cdef Affinity affinity
        cdef uint32_t direction = FROM_CLIENT
        cdef int32_t member = -1
        cdef int32_t choice = UNFORESEEN
        cdef uint32_t found = USE
        cdef uint32_t awaited
        cdef uint8_t copy[RECORD_V6]
        cdef uint8_t init[SCTP_HEADER + 4]
        cdef Conn *known
        cdef object row = None
        cdef object gone = None
        # As the flow's packet would, or any other: what is over is over.
        readmit_due(self.engine, now)
        memset(&view, 0, sizeof(view))
        view.words = <uint8_t>words_of(source)
        if words_of(destination) != view.words:
            raise ValueError("source and destination are of different families")
        view.protocol = protocol
        if protocol == PROTOCOL_TCP:
            view.tcp_flags = TCP_SYN
        elif protocol == PROTOCOL_SCTP:
            memset(init, 0, sizeof(init))
            init[SCTP_HEADER] = CHUNK_INIT
            view.end = sizeof(init)
        view.source = <const uint8_t *>PyBytes_AS_STRING(source)
        view.destination = <const uint8_t *>PyBytes_AS_STRING(destination)
        view.source_port = htons(source_port)
        view.destination_port = htons(destination_port)
        view.hash = hash_flow(
            &self.engine.table.key, view.words, view.source, view.destination, view.source_port,
            view.destination_port, protocol)
        conn = find(&self.engine.table, &view, &direction)
        if conn is not NULL:
            found = judge(self.engine, conn, init, &view, direction, now)
            if found == FORGET:
                spin_unlock(&conn.lock)
                conn = NULL
        if conn is NULL:
            direction = FROM_CLIENT
            conn = find_awaited(self.engine, &view, now, &awaited)
            if conn is not NULL:
                found = awaited
        if conn is not NULL:
            memcpy(copy, conn, RECORD_V4 if view.words == 1 else RECORD_V6)
            spin_unlock(&conn.lock)
            known = <Conn *>copy
            if known.flags & CONN_NO_CLIENT_PORT:
                known.client_port = known.source_port = view.source_port
            row = self.describe(known, view.words)
        if found == DROP or found == RESET:
            gone = Verdict.DROP if found == DROP else Verdict.REJECT
        service = service_of(self.engine, self.engine.snapshot, &view, mark)
        if service is NULL or is_from_ftp(self.engine.snapshot, &view):
            return row, direction == FROM_DESTINATION, gone, None, -1, -1, -1
        rule = rule_for(service, view.source, mark)
        subset = rule.subset if rule is not NULL and rule.subset is not NULL else service
        if service.persistence and affinity_of(self.engine, service, NULL, &view, &affinity):
            member = sticky_member(self.engine, subset, &affinity, now)
            if member >= 0 and is_ejected(subset.members[member].destination):
                member = -1
        if found != FORGET:
            # What is about to be forgotten still counts as load.
            choice = foresee(subset, &view, now, &self.engine.settings.expirations)
        if choice == -1 and subset.is_passive:
            choice = UNFORESEEN if all_ejected(subset) else stand_in(subset, &view)
        return (
            row, direction == FROM_DESTINATION, gone, key_of(service),
            -1 if rule is NULL else <int>(rule - service.rules), member, choice)

    cdef tuple describe(self, Conn *conn, uint32_t words):
        """A connection as connection_rows() gives it, from a copy of its record."""
        cdef const Dest *target = dest_of(&self.engine.destinations, conn.destination)
        cdef uint32_t method = method_of(conn)
        if method == METHOD_MASQ:
            real = format_address(address_of(conn, REAL, words), words)
        elif method == METHOD_BYPASS:
            real = format_address(address_of(conn, VIRTUAL, words), words)
        else:
            real = format_address(target.address, target.words)
        return (
            PROTOCOLS.get(conn.protocol, str(conn.protocol)),
            format_address(address_of(conn, CLIENT, words), words), ntohs(conn.client_port),
            format_address(address_of(conn, VIRTUAL, words), words), ntohs(conn.virtual_port),
            real, ntohs(conn.real_port),
            format_address(address_of(conn, SOURCE, words), words), ntohs(conn.source_port),
            STATES[conn.state], METHODS[method], conn.fwmark,
            conn.deadline, conn.packets, conn.destination,
        )
