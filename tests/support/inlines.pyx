# cython: language_level=3, cdivision=True
"""Inline functions of the core that have no way in from Python, for tests: see inlines.py.

Packets and texts are copied to the end of a page that no readable one follows, so that reading a
byte too many is a crash.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from svcdp._core.abi cimport *
from svcdp._core.frag cimport *
from svcdp._core.ftp cimport *
from svcdp._core.hash cimport HashKey
from svcdp._core.memory cimport htons, ntohs
from svcdp._core.packet cimport *
from svcdp._core.persist cimport persistence_key
from svcdp._core.proto cimport *
from svcdp._core.sequence cimport *
from svcdp._core.service cimport ENGINE_SIP
from svcdp._core.sip cimport call_id
from svcdp._core.xmit cimport complete_checksum

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int mprotect(void *address, size_t length, int protection)
    int PROT_READ, PROT_WRITE, PROT_NONE, MAP_PRIVATE, MAP_ANONYMOUS

cdef size_t ARENA = 1 << 17
cdef uint8_t *LIMIT = <uint8_t *>mmap(
    NULL, ARENA + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + ARENA
mprotect(LIMIT, 4096, PROT_NONE)


cdef uint8_t *place(bytes data, bytes before=b"") except NULL:
    """A copy of `data` at the end of the arena, `before` in front of it."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef Py_ssize_t front = PyBytes_GET_SIZE(before)
    if size + front > <Py_ssize_t>ARENA:
        raise ValueError("too long")
    memcpy(LIMIT - size - front, PyBytes_AS_STRING(before), front)
    memcpy(LIMIT - size, PyBytes_AS_STRING(data), size)
    return LIMIT - size


cdef uint8_t *view_of(bytes packet, View *view) except NULL:
    cdef uint8_t *data = place(packet)
    cdef uint8_t reason = parse(data, <uint32_t>len(packet), view)
    if reason != PARSED:
        raise ValueError(f"reason {reason}")
    return data


# -- proto.pxd -----------------------------------------------------------------------------------

def event(bytes packet):
    cdef View view
    cdef const uint8_t *data = view_of(packet, &view)
    return event_of(data, &view)


def machine(direction, in_only, secure):
    return machine_of(direction, in_only, secure)


def step(uint8_t protocol, uint8_t state, uint32_t machine, uint8_t event):
    return next_state(protocol, state, machine, event)


def first(uint8_t protocol):
    return first_state(protocol)


def begins(bytes packet, bint sloppy):
    cdef View view
    cdef const uint8_t *data = view_of(packet, &view)
    return bool(begins_connection(data, &view, sloppy))


def opens_again(bytes packet):
    cdef View view
    cdef const uint8_t *data = view_of(packet, &view)
    return bool(reopens(data, &view))


def kind_of(uint8_t state):
    """(active, half open, closed)"""
    return bool(is_active(state)), bool(is_half_open(state)), bool(is_closed(state))


# -- sip.pxd, persist.pxd ------------------------------------------------------------------------

def sip(bytes text):
    cdef const uint8_t *id = NULL
    cdef uint32_t length = call_id(place(text), <uint32_t>len(text), &id)
    return PyBytes_FromStringAndSize(<const char *>id, length) if length else None


def key_of(bytes packet, uint8_t engine=ENGINE_SIP):
    cdef View view
    cdef const uint8_t *data = view_of(packet, &view)
    cdef const uint8_t *key = NULL
    cdef uint32_t length = persistence_key(engine, data, &view, &key)
    return PyBytes_FromStringAndSize(<const char *>key, length) if length else None


# -- frag.pxd ------------------------------------------------------------------------------------

cdef class Fragments:
    """A table of fragments, and packets that meet it."""
    cdef FragmentTable table
    cdef HashKey key

    def __cinit__(self):
        cdef int i
        for i in range(6):
            self.key.word[i] = 2 * i + 1
        fragment_table_init(&self.table)

    def __dealloc__(self):
        fragment_table_free(&self.table)

    def parse(self, bytes packet):
        """(reason or None, is first, protocol, ports, transport, end) of a fragment."""
        cdef View view
        cdef Fragment fragment
        cdef uint8_t reason = parse_fragment(
            place(packet), <uint32_t>len(packet), &view, &fragment)
        if reason != PARSED:
            return reason, False, 0, (0, 0), 0, 0
        return (
            None, bool(view.fragment), view.protocol,
            (ntohs(view.source_port), ntohs(view.destination_port)), view.transport, view.end)

    def remember(self, bytes packet, bytes source, bytes target, uint32_t destination, int64_t now):
        """`packet`, a first fragment, got these addresses."""
        cdef View view
        cdef Fragment fragment
        cdef FragmentRoute route
        if parse_fragment(place(packet), <uint32_t>len(packet), &view, &fragment) != PARSED:
            raise ValueError("no fragment")
        memset(&route, 0, sizeof(route))
        memcpy(route.source, PyBytes_AS_STRING(source), len(source))
        memcpy(route.target, PyBytes_AS_STRING(target), len(target))
        route.destination = destination
        fragment_remember(&self.table, &self.key, &fragment, &route, now)

    def follow(self, bytes packet, int64_t now):
        """(destination, packet as it goes on) of a later fragment, or None."""
        cdef View view
        cdef Fragment fragment
        cdef FragmentRoute route
        cdef svcdp_packet p
        memset(&p, 0, sizeof(p))
        p.data = place(packet)
        p.len = <uint32_t>len(packet)
        if parse_fragment(p.data, p.len, &view, &fragment) != PARSED or not fragment.offset:
            return None
        if not fragment_find(&self.table, &self.key, &fragment, now, &route):
            return None
        rewrite_fragment(&p, &view, &route)
        return route.destination, PyBytes_FromStringAndSize(<char *>p.data, p.len)


# -- ftp.pxd, sequence.pxd -----------------------------------------------------------------------

def ftp_line(bytes text, bint from_client, uint8_t asked=0):
    """(kind, address or None, port, start, end) of a payload."""
    cdef FtpMessage message
    cdef uint8_t kind = ftp_read(place(text), <uint32_t>len(text), from_client, asked, &message)
    address = PyBytes_FromStringAndSize(<char *>message.address, 4 * message.words)
    return kind, address or None, ntohs(message.port), message.start, message.end


cdef class Ftp:
    """The helper of one control connection."""
    cdef FtpControl control

    @property
    def asked(self):
        return self.control.asked

    @property
    def numbers(self):
        """(position, delta, previous delta) of both directions."""
        return [
            (self.control.seq[i].position, self.control.seq[i].delta,
             self.control.seq[i].previous_delta) for i in range(2)]

    def packet(
        self, bytes packet, bint from_client, bytes address=b"", uint16_t port=0,
        uint16_t headroom=0, uint16_t flags=0,
    ):
        """(kind, port that it named, outcome, flags, packet) with `address`, `port` in its text, if
        there is an address, and with a whole checksum again.
        """
        cdef View view
        cdef FtpMessage message
        cdef svcdp_packet p
        cdef uint32_t outcome = 0
        cdef uint32_t direction = 0 if from_client else 1
        memset(&p, 0, sizeof(p))
        p.data = place(packet, b"\xa5" * headroom)
        p.len = <uint32_t>len(packet)
        p.headroom = headroom
        p.flags = flags
        if parse(p.data, p.len, &view) != PARSED:
            return None
        kind = ftp_look(&p, &view, from_client, &self.control, &message)
        named = ntohs(message.port)
        if kind != FTP_NOTHING and message.port and address:
            outcome = ftp_rewrite(
                &p, &view, &self.control.seq[direction], &message,
                <const uint8_t *>PyBytes_AS_STRING(address), htons(port))
        move_numbers(
            &p, &view, &self.control.seq[direction], &self.control.seq[1 - direction])
        if p.flags & SVCDP_PACKET_CSUM_PARTIAL:
            complete_checksum(p.data, &view)
        if p.headroom > headroom + 64 or p.data + p.len != LIMIT:
            raise AssertionError("the end of the packet moved")
        return kind, named, outcome, p.flags, PyBytes_FromStringAndSize(<char *>p.data, p.len)
