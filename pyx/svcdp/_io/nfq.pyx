"""A netfilter queue: packets from the kernel, through the core, and their verdicts back.

One `recvmmsg` brings up to GROUP packets, one `sendmsg` carries their verdicts; payloads go back
straight from the receive buffer, and only those that were rewritten. Every packet that was
received gets exactly one verdict: what cannot be parsed or was cut short passes as it is.
A packet that grows, in a tunnel, grows over the message that it came in.
"""

import errno
import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno as c_errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from svcdp._core.abi cimport *
from svcdp._core.engine cimport Core
from svcdp._core.memory cimport htonl, htons, load32, ntohl
from svcdp._core.worker cimport Worker
from svcdp._io.netlink cimport *

TABLE = "/proc/thread-self/net/netfilter/nfnetlink_queue"

cdef enum:
    GROUP = 64                 # packets a system call
    # The kernel copies at most this much of a packet (0xffff less the attribute's header).
    PAYLOAD_MAX = 0xfffb
    MESSAGE_MAX = 0x11000      # a payload and its attributes
    HEADROOM = 128             # bytes before a message: for what a tunnel puts before a packet
    ALIGN = 3                  # netlink pads to 4 bytes
    # A send that is larger than this gains nothing more and has to find more memory at once.
    SEND_BYTES = 1 << 18
    IOVECS = 3 * GROUP         # header, payload, padding

    # Outcomes of Queue.serve().
    IDLE = 0                   # nothing more to read now
    STOPPED = 1
    INTERRUPTED = 2
    LIMIT = 3                  # as many packets as were asked for
    FAILED = 4                 # see Queue.failure

cdef packed struct Verdict:
    # nlmsghdr, nfgenmsg, NFQA_VERDICT_HDR, NFQA_MARK, and the header of NFQA_PAYLOAD
    nlmsghdr header
    nfgenmsg generic
    nlattr verdict_attribute
    uint32_t verdict           # big endian
    uint32_t id                # big endian
    nlattr mark_attribute
    uint32_t mark              # big endian
    nlattr payload_attribute

cdef struct Arrival:
    uint32_t id                # big endian, as the kernel gave it
    uint32_t mark
    uint8_t *payload           # NULL: none came
    uint32_t length
    uint32_t whole             # length of the packet in the kernel
    uint32_t info              # NFQA_SKB_INFO

cdef struct Counters:
    uint64_t received
    uint64_t verdicts
    uint64_t truncated
    uint64_t outgrown
    uint64_t overruns
    uint64_t errors
    uint64_t answers

cdef uint8_t PADDING[4]        # zeros


cdef inline uint32_t align(uint32_t length) noexcept nogil:
    return (length + ALIGN) & ~<uint32_t>ALIGN


cdef bint parse_message(uint8_t *message, uint32_t length, Arrival *arrival) noexcept nogil:
    """Read a packet message. False when it is none, or has no packet id to answer to."""
    cdef nlmsghdr *header = <nlmsghdr *>message
    cdef nlattr *attribute
    cdef uint32_t offset = sizeof(nlmsghdr) + sizeof(nfgenmsg)
    cdef uint32_t size, kind
    cdef uint8_t *value
    cdef bint found = False
    memset(arrival, 0, sizeof(Arrival))
    if length < offset or header.nlmsg_len < offset or header.nlmsg_len > length:
        return False
    if header.nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET):
        return False
    length = header.nlmsg_len
    while offset + sizeof(nlattr) <= length:
        attribute = <nlattr *>(message + offset)
        size = attribute.nla_len
        if size < sizeof(nlattr) or offset + size > length:
            break
        value = message + offset + sizeof(nlattr)
        kind = attribute.nla_type & NLA_TYPE_MASK
        offset += align(size)
        size -= sizeof(nlattr)
        if kind == NFQA_PACKET_HDR and size >= 7:
            arrival.id = load32(value)
            found = True
        elif kind == NFQA_MARK and size >= 4:
            arrival.mark = ntohl(load32(value))
        elif kind == NFQA_CAP_LEN and size >= 4:
            arrival.whole = ntohl(load32(value))
        elif kind == NFQA_SKB_INFO and size >= 4:
            arrival.info = ntohl(load32(value))
        elif kind == NFQA_PAYLOAD:
            arrival.payload = value
            arrival.length = size
    if arrival.whole == 0:
        arrival.whole = arrival.length
    return found


cdef class Queue:
    """The socket and the loop of one queue. Use it through `svcdp.io.nfqueue.NFQueue`.

    One thread at a time runs it; any thread may call `stop()`. It is opened in the network
    namespace of the thread that makes it, and stays there.
    """
    cdef Core core
    cdef readonly uint32_t number
    cdef int socket
    cdef int wake
    cdef int raw4
    cdef int raw6
    cdef int table             # the kernel's table of the queues of this namespace, in /proc
    cdef uint32_t forward_mark
    cdef uint32_t pass_mark
    cdef bint repeat
    cdef bint opened           # the descriptors below hold -1 or what is ours to close
    cdef bint running
    cdef uint32_t send_max     # bytes that one sendmsg may carry
    cdef int failure           # errno
    cdef Counters counters
    cdef uint8_t *buffers
    cdef mmsghdr *messages
    cdef iovec *vectors        # of messages
    cdef Arrival *arrivals
    cdef svcdp_packet *packets
    cdef Verdict *replies
    cdef iovec *pieces         # of replies
    cdef uint8_t *answer_buffer

    def __cinit__(
        self, Core core, uint16_t number, *, bint fail_open, bint gso, uint32_t max_packets,
        int receive_buffer, uint32_t forward_mark, uint32_t pass_mark, bint repeat,
    ):
        cdef int i
        self.socket = self.wake = self.raw4 = self.raw6 = self.table = -1
        self.opened = True
        self.core = core
        self.number = number
        self.forward_mark = forward_mark
        self.pass_mark = pass_mark
        self.repeat = repeat
        self.buffers = <uint8_t *>malloc(GROUP * (HEADROOM + MESSAGE_MAX))
        self.messages = <mmsghdr *>calloc(GROUP, sizeof(mmsghdr))
        self.vectors = <iovec *>calloc(GROUP, sizeof(iovec))
        self.arrivals = <Arrival *>calloc(GROUP, sizeof(Arrival))
        self.packets = <svcdp_packet *>calloc(GROUP, sizeof(svcdp_packet))
        self.replies = <Verdict *>calloc(GROUP, sizeof(Verdict))
        self.pieces = <iovec *>calloc(IOVECS, sizeof(iovec))
        self.answer_buffer = <uint8_t *>malloc(SVCDP_ANSWER_MAX)
        if not (
            self.buffers and self.messages and self.vectors and self.arrivals and self.packets
            and self.replies and self.pieces and self.answer_buffer
        ):
            raise MemoryError("cannot allocate the buffers of a queue")
        for i in range(GROUP):
            self.vectors[i].iov_base = self.buffers + i * (HEADROOM + MESSAGE_MAX) + HEADROOM
            self.vectors[i].iov_len = MESSAGE_MAX
            self.messages[i].msg_hdr.msg_iov = &self.vectors[i]
            self.messages[i].msg_hdr.msg_iovlen = 1
        self.open(receive_buffer)
        self.configure(fail_open, gso, max_packets)

    def __dealloc__(self):
        self.close_all()
        free(self.buffers)
        free(self.messages)
        free(self.vectors)
        free(self.arrivals)
        free(self.packets)
        free(self.replies)
        free(self.pieces)
        free(self.answer_buffer)

    # -- opening ---------------------------------------------------------------------------------

    cdef int check(self, int result, str what) except -1:
        if result < 0:
            raise OSError(c_errno, f"queue {self.number}: {what}: {os.strerror(c_errno)}")
        return result

    cdef int open(self, int receive_buffer) except -1:
        cdef sockaddr_nl address
        cdef int one = 1
        cdef int size
        cdef socklen_t length = sizeof(size)
        self.wake = self.check(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd")
        self.socket = self.check(
            socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER), "netlink socket")
        memset(&address, 0, sizeof(address))
        address.nl_family = AF_NETLINK
        self.check(bind(self.socket, <sockaddr *>&address, sizeof(address)), "bind")
        self.set_buffer(SO_RCVBUFFORCE, SO_RCVBUF, receive_buffer)
        self.set_buffer(SO_SNDBUFFORCE, SO_SNDBUF, SEND_BYTES)
        self.check(
            getsockopt(self.socket, SOL_SOCKET, SO_SNDBUF, &size, &length), "send buffer")
        # af_netlink.c refuses what is longer than the buffer less its own overhead.
        self.send_max = min(<uint32_t>max(size - 1024, 0), <uint32_t>SEND_BYTES)
        # When packets overrun the buffer the kernel counts them, and we go on.
        setsockopt(self.socket, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof(one))
        self.raw4 = self.open_raw(AF_INET)
        self.raw6 = self.open_raw(AF_INET6)
        self.table = os.open(TABLE, os.O_RDONLY | os.O_CLOEXEC)
        return 0

    cdef void set_buffer(self, int forced, int capped, int size) noexcept:
        """Forcing a size needs CAP_NET_ADMIN in the first user namespace."""
        if setsockopt(self.socket, SOL_SOCKET, forced, &size, sizeof(int)) < 0:
            setsockopt(self.socket, SOL_SOCKET, capped, &size, sizeof(int))

    cdef int open_raw(self, int family) except -2:
        """A socket for answers, which carry our mark past our own rules. -1 without IPv6."""
        cdef int fd = socket(family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW)
        if fd < 0 and family == AF_INET6 and c_errno != errno.EPERM:
            return -1
        self.check(fd, "raw socket")
        if setsockopt(fd, SOL_SOCKET, SO_MARK, &self.forward_mark, sizeof(uint32_t)) < 0:
            close(fd)
            self.check(-1, "SO_MARK")
        return fd

    cdef int configure(self, bint fail_open, bint gso, uint32_t max_packets) except -1:
        """Bind, then set flags, and ask for packets last: the first of them finds all in place."""
        cdef bytes command = bytes([NFQNL_CFG_CMD_BIND, 0, 0, 0])
        flags = (NFQA_CFG_F_FAIL_OPEN if fail_open else 0) | (NFQA_CFG_F_GSO if gso else 0)
        mask = NFQA_CFG_F_FAIL_OPEN | NFQA_CFG_F_GSO
        self.config(attribute(NFQA_CFG_CMD, command), "bind", True)
        self.config(
            attribute(NFQA_CFG_FLAGS, int(flags).to_bytes(4, "big"))
            + attribute(NFQA_CFG_MASK, int(mask).to_bytes(4, "big")), "set flags", True)
        self.config(
            attribute(NFQA_CFG_QUEUE_MAXLEN, int(max_packets).to_bytes(4, "big")),
            "set length", True)
        # Without an acknowledgement: packets may stand before it.
        self.config(
            attribute(
                NFQA_CFG_PARAMS,
                int(PAYLOAD_MAX).to_bytes(4, "big") + bytes([NFQNL_COPY_PACKET])),
            "ask for packets", False)
        return 0

    cdef int config(self, bytes attributes, str what, bint acknowledge) except -1:
        cdef nlmsghdr header
        cdef nfgenmsg generic
        cdef uint8_t reply[512]
        cdef ssize_t size
        cdef int32_t code
        memset(&header, 0, sizeof(header))
        memset(&generic, 0, sizeof(generic))
        header.nlmsg_len = <uint32_t>(sizeof(header) + sizeof(generic) + len(attributes))
        header.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG
        header.nlmsg_flags = NLM_F_REQUEST | (NLM_F_ACK if acknowledge else 0)
        generic.version = NFNETLINK_V0
        generic.res_id = htons(<uint16_t>self.number)
        message = (
            (<char *>&header)[:sizeof(header)] + (<char *>&generic)[:sizeof(generic)] + attributes)
        self.check(<int>send(self.socket, <char *>message, len(message), 0), what)
        if acknowledge:
            size = recv(self.socket, reply, sizeof(reply), 0)
            self.check(<int>size, what)
            if size < <ssize_t>(sizeof(nlmsghdr) + 4):
                raise OSError(errno.EPROTO, f"queue {self.number}: {what}: no answer")
            memcpy(&code, reply + sizeof(nlmsghdr), 4)
            if code:
                raise OSError(-code, f"queue {self.number}: {what}: {os.strerror(-code)}")
        return 0

    # -- running ---------------------------------------------------------------------------------

    def fileno(self):
        """The netlink socket, readable when packets wait."""
        return self.socket

    def run(self):
        """Serve until `stop()`. The GIL is free."""
        self.work(True, 0)

    def process_ready(self, uint32_t limit):
        """Serve what waits now, `limit` packets or a group more, and return how many they were."""
        cdef uint64_t before = self.counters.received
        self.work(False, limit)
        return self.counters.received - before

    def stop(self):
        """Make `run()` return, now or as soon as it is called. Any thread may do this."""
        cdef uint64_t one = 1
        if self.wake >= 0:
            write(self.wake, &one, sizeof(one))

    def close(self):
        """Unbind. The kernel drops packets that wait for a verdict."""
        if self.running:
            raise RuntimeError(f"queue {self.number} is running: stop() it first")
        self.close_all()

    @property
    def closed(self):
        return self.socket < 0

    def stats(self):
        """The counters by name."""
        return dict(self.counters)

    def kernel_counters(self):
        """The kernel's view of the queue: packets that wait, that were dropped because the queue
        was full, and because they could not be handed over. 0 once it is closed.
        """
        if self.table >= 0:
            for row in read_table(self.table):
                if row[0] == self.number:
                    return row[2], row[5], row[6]
        return 0, 0, 0

    cdef void close_all(self) noexcept:
        cdef int fd
        if not self.opened:
            return
        for fd in (self.socket, self.wake, self.raw4, self.raw6, self.table):
            if fd >= 0:
                close(fd)
        self.socket = self.wake = self.raw4 = self.raw6 = self.table = -1

    cdef int work(self, bint block, uint32_t limit) except -1:
        cdef Worker *worker
        cdef int outcome = IDLE
        if self.running:
            raise RuntimeError(f"queue {self.number} is running already")
        if self.socket < 0:
            raise ValueError(f"queue {self.number} is closed")
        worker = self.core.worker_acquire()
        self.running = True
        try:
            while True:
                with nogil:
                    outcome = self.serve(worker, block, limit)
                if outcome != INTERRUPTED:
                    break
                PyErr_CheckSignals()
        finally:
            self.running = False
            self.core.worker_release(worker)
        if outcome == FAILED:
            raise OSError(
                self.failure, f"queue {self.number}: receive: {os.strerror(self.failure)}")
        return 0

    cdef int serve(self, Worker *worker, bint block, uint32_t limit) noexcept nogil:
        cdef pollfd ready[2]
        cdef uint64_t signal
        cdef int count
        cdef uint32_t done = 0
        ready[0].fd = self.socket
        ready[1].fd = self.wake
        ready[0].events = ready[1].events = POLLIN
        while True:
            if block:
                if poll(ready, 2, -1) < 0:
                    if c_errno == EINTR:
                        return INTERRUPTED
                    self.failure = c_errno
                    return FAILED
                if ready[1].revents:
                    read(self.wake, &signal, sizeof(signal))
                    return STOPPED
            elif done >= limit:
                return LIMIT
            count = recvmmsg(self.socket, self.messages, GROUP, MSG_DONTWAIT, NULL)
            if count < 0:
                if c_errno == ENOBUFS:
                    self.counters.overruns += 1
                    continue
                if c_errno == EINTR:
                    return INTERRUPTED
                if c_errno != EAGAIN:
                    self.failure = c_errno
                    return FAILED
                if not block:
                    return IDLE
                continue
            done += <uint32_t>count
            self.process(worker, <uint32_t>count)

    cdef void process(self, Worker *worker, uint32_t received) noexcept nogil:
        """A group of messages: through the core, and their verdicts on the way."""
        cdef uint32_t i, count = 0, routed = 0
        cdef Arrival *arrival
        cdef svcdp_packet *packet
        cdef timespec now
        for i in range(received):
            # `count` runs behind `i` where a message was no packet.
            arrival = &self.arrivals[count]
            if self.messages[i].msg_hdr.msg_flags & MSG_TRUNC or not parse_message(
                <uint8_t *>self.vectors[i].iov_base, self.messages[i].msg_len, arrival
            ):
                self.counters.errors += 1
                continue
            count += 1
            self.counters.received += 1
            packet = &self.packets[count - 1]
            memset(packet, 0, sizeof(svcdp_packet))
            packet.data = arrival.payload
            packet.len = arrival.length
            packet.mark = arrival.mark & ~(self.forward_mark | self.pass_mark)
            if arrival.payload is not NULL:
                # All of the message before it has been read.
                packet.headroom = <uint16_t>(
                    HEADROOM + (arrival.payload - <uint8_t *>self.vectors[i].iov_base))
            if arrival.info & NFQA_SKB_CSUMNOTREADY:
                packet.flags = SVCDP_PACKET_CSUM_PARTIAL
            if arrival.length < arrival.whole:
                # The core passes it: its IP length says more than came.
                self.counters.truncated += 1
        clock_gettime(CLOCK_MONOTONIC, &now)
        self.core.process_packets(
            worker, self.packets, count, now.tv_sec * <int64_t>1000000000 + now.tv_nsec)
        for i in range(count):
            if self.packets[i].verdict == SVCDP_VERDICT_REJECT:
                self.answer(&self.packets[i])
            self.reply(&self.replies[i], &self.arrivals[i], &self.packets[i])
        while routed < count:
            routed += self.send_some(routed, count)

    cdef void reply(
        self, Verdict *reply, const Arrival *arrival, const svcdp_packet *packet
    ) noexcept nogil:
        """Write the verdict message of a packet, all but its payload."""
        cdef bint changed = packet.flags & SVCDP_PACKET_CHANGED
        cdef bint forward = packet.verdict == SVCDP_VERDICT_FORWARD
        cdef uint32_t verdict = NF_DROP
        memset(reply, 0, sizeof(Verdict))
        reply.header.nlmsg_len = sizeof(Verdict) - sizeof(nlattr)
        reply.header.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT
        reply.header.nlmsg_flags = NLM_F_REQUEST
        reply.generic.version = NFNETLINK_V0
        reply.generic.res_id = htons(<uint16_t>self.number)
        reply.verdict_attribute.nla_len = sizeof(nlattr) + 8
        reply.verdict_attribute.nla_type = NFQA_VERDICT_HDR
        reply.id = arrival.id
        reply.mark_attribute.nla_len = sizeof(nlattr) + 4
        reply.mark_attribute.nla_type = NFQA_MARK
        reply.mark = packet.mark | (arrival.mark & self.forward_mark)
        if forward and changed and packet.len > PAYLOAD_MAX:
            self.counters.outgrown += 1
        elif forward or packet.verdict == SVCDP_VERDICT_PASS:
            verdict = NF_REPEAT
            if not self.repeat or arrival.mark & (self.forward_mark | self.pass_mark):
                # One that is marked is not to walk the chain again.
                verdict = NF_ACCEPT
            if forward:
                reply.mark |= self.forward_mark
            elif verdict == NF_REPEAT:
                reply.mark |= self.pass_mark
        reply.mark = htonl(reply.mark)
        reply.verdict = htonl(verdict)
        if verdict != NF_DROP and forward and changed:
            reply.payload_attribute.nla_len = <uint16_t>(sizeof(nlattr) + packet.len)
            reply.payload_attribute.nla_type = NFQA_PAYLOAD
            reply.header.nlmsg_len = sizeof(Verdict) + packet.len

    cdef uint32_t send_some(self, uint32_t start, uint32_t end) noexcept nogil:
        """Send verdicts from `start` on, as many as fit one message. How many they were."""
        cdef uint32_t i = start, bytes_ = 0, pieces = 0, length, each
        cdef msghdr message
        while i < end:
            length = align(self.replies[i].header.nlmsg_len)
            if i > start and bytes_ + length > self.send_max:
                break
            bytes_ += length
            pieces = self.add_pieces(i, pieces)
            i += 1
        memset(&message, 0, sizeof(message))
        message.msg_iov = self.pieces
        message.msg_iovlen = pieces
        while sendmsg(self.socket, &message, 0) < 0:
            if c_errno == EINTR:
                continue
            self.counters.errors += 1
            if i - start == 1:
                # Not even alone: without its new payload it must not go on, so it is dropped.
                self.drop(start)
                return 1
            for each in range(start, i):
                self.send_some(each, each + 1)
            return i - start
        self.counters.verdicts += i - start
        return i - start

    cdef uint32_t add_pieces(self, uint32_t i, uint32_t pieces) noexcept nogil:
        cdef Verdict *reply = &self.replies[i]
        cdef uint32_t length = reply.header.nlmsg_len
        cdef uint32_t head = sizeof(Verdict)
        if not reply.payload_attribute.nla_len:
            head -= sizeof(nlattr)
        self.pieces[pieces].iov_base = reply
        self.pieces[pieces].iov_len = head
        if head < length:
            pieces += 1
            self.pieces[pieces].iov_base = self.packets[i].data
            self.pieces[pieces].iov_len = length - head
        if align(length) != length:
            pieces += 1
            self.pieces[pieces].iov_base = PADDING
            self.pieces[pieces].iov_len = align(length) - length
        return pieces + 1

    cdef void drop(self, uint32_t i) noexcept nogil:
        cdef Verdict *reply = &self.replies[i]
        cdef bint had_payload = reply.payload_attribute.nla_len != 0
        reply.payload_attribute.nla_len = 0
        reply.header.nlmsg_len = sizeof(Verdict) - sizeof(nlattr)
        if had_payload:
            reply.verdict = htonl(NF_DROP)
        if send(self.socket, reply, reply.header.nlmsg_len, 0) >= 0:
            self.counters.verdicts += 1

    cdef void answer(self, const svcdp_packet *packet) noexcept nogil:
        """Send the answer to a rejected packet to where it came from."""
        cdef sockaddr_in to4
        cdef sockaddr_in6 to6
        cdef ssize_t sent
        cdef uint32_t length = self.core.build_answer(
            packet, self.answer_buffer, SVCDP_ANSWER_MAX)
        if length == 0:
            return
        if self.answer_buffer[0] >> 4 == 4:
            memset(&to4, 0, sizeof(to4))
            to4.sin_family = AF_INET
            memcpy(&to4.sin_addr, self.answer_buffer + 16, 4)
            sent = sendto(
                self.raw4, self.answer_buffer, length, MSG_DONTWAIT,
                <const sockaddr *>&to4, sizeof(to4))
        else:
            memset(&to6, 0, sizeof(to6))
            to6.sin6_family = AF_INET6
            memcpy(&to6.sin6_addr, self.answer_buffer + 24, 16)
            sent = sendto(
                self.raw6, self.answer_buffer, length, MSG_DONTWAIT,
                <const sockaddr *>&to6, sizeof(to6))
        if sent < 0:
            self.counters.errors += 1
        else:
            self.counters.answers += 1


def is_bound(number):
    """Whether some program has this queue, in the calling thread's network namespace."""
    fd = os.open(TABLE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return any(row[0] == number for row in read_table(fd))
    finally:
        os.close(fd)


cdef list read_table(int fd):
    """Rows of (number, port id, waiting, copy mode, copy range, dropped, dropped by user, ...)."""
    text = b""
    # The kernel gives about a page at a time.
    while part := os.pread(fd, 1 << 16, len(text)):
        text += part
    return [[int(word) for word in line.split()] for line in text.splitlines()]


cdef bytes attribute(int kind, bytes value):
    """A netlink attribute, padded."""
    cdef nlattr header
    header.nla_len = <uint16_t>(sizeof(nlattr) + len(value))
    header.nla_type = <uint16_t>kind
    return (<char *>&header)[:sizeof(nlattr)] + value + bytes(3 - (len(value) + 3) % 4)
