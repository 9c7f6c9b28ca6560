"""Many packets in one piece of memory."""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from svcdp._core.abi cimport *
from svcdp._core.answer cimport answer
from svcdp._core.batch cimport *

from svcdp.types import Reason, Verdict

cdef tuple VERDICTS = tuple(Verdict)
cdef tuple REASONS = tuple(Reason)


cdef class PacketBatch:
    """Packets in contiguous memory, for `Dataplane.process_batch`.

    `PacketBatch(capacity, slot_size, headroom)` owns its memory: each packet has a slot of
    `slot_size` bytes of which the first `headroom` stay free (for encapsulation). Fill it with
    `append()`, empty it with `clear()`. `PacketBatch.from_buffer()` borrows memory instead.

    A batch belongs to one thread at a time; `process_batch` refuses one that is being processed.
    It is processed once: what that made of marks and (tunnels) of offsets and lengths stays.
    """

    def __cinit__(self):
        self.packets = NULL
        self.memory = NULL
        self.is_borrowed = False

    def __init__(self, uint32_t capacity=64, uint32_t slot_size=2048, uint32_t headroom=64):
        if self.packets is not NULL:
            raise RuntimeError("a PacketBatch is initialised once")
        if not 1 <= capacity <= 1 << 20:
            raise ValueError("capacity must be 1 to 1048576 packets")
        if headroom > 0xffff or slot_size <= headroom or slot_size > 1 << 20:
            raise ValueError("slot_size must exceed headroom, and be 1048576 bytes at most")
        self.allocate(capacity, slot_size, headroom)
        self.memory = <uint8_t *>calloc(capacity, slot_size)
        if self.memory is NULL:
            raise MemoryError(f"cannot allocate {capacity} slots of {slot_size} bytes")

    cdef int allocate(self, uint32_t capacity, uint32_t slot_size, uint32_t headroom) except -1:
        self.packets = <svcdp_packet *>calloc(capacity, sizeof(svcdp_packet))
        if self.packets is NULL:
            raise MemoryError(f"cannot allocate a batch of {capacity} packets")
        self.capacity = capacity
        self.slot_size = slot_size
        self.headroom = headroom
        return 0

    @staticmethod
    def from_buffer(buffer, offsets, lengths, uint32_t headroom=0):
        """Borrow packets that lie in a writable buffer, the first byte of each at its offset. For
        the next packets in that buffer make another batch.

        `headroom` bytes before each offset may be written. The buffer stays exported until the
        batch is freed. ValueError when a packet does not lie inside it.
        """
        cdef PacketBatch batch = PacketBatch.__new__(PacketBatch)
        cdef svcdp_packet *packet
        cdef int64_t offset, length
        cdef list starts = list(offsets), sizes = list(lengths)
        if len(starts) != len(sizes) or not 1 <= len(starts) <= 1 << 20:
            raise ValueError("offsets and lengths must be of one size, 1 to 1048576")
        if headroom > 0xffff:
            raise ValueError("headroom must be 65535 bytes at most")
        batch.allocate(<uint32_t>len(starts), 0, headroom)
        PyObject_GetBuffer(buffer, &batch.borrowed, PyBUF_SIMPLE | PyBUF_WRITABLE)
        batch.is_borrowed = True
        for offset, length in zip(starts, sizes):
            if (
                not 0 <= length <= 0xffffffff
                or not headroom <= offset <= batch.borrowed.len
                or length > batch.borrowed.len - offset
            ):
                raise ValueError(
                    f"packet {batch.count}: offset {offset}, length {length} and headroom"
                    f" {headroom} do not fit into {batch.borrowed.len} bytes")
            packet = &batch.packets[batch.count]
            packet.data = <uint8_t *>batch.borrowed.buf + offset
            packet.len = <uint32_t>length
            packet.headroom = <uint16_t>headroom
            batch.count += 1
        return batch

    def __dealloc__(self):
        if self.is_borrowed:
            PyBuffer_Release(&self.borrowed)
        free(self.memory)
        free(self.packets)

    def append(self, packet, uint32_t mark=0):
        """Copy a packet (any buffer) into the next slot. Its index in the batch.

        ValueError when it is longer than slot_size - headroom, IndexError when the batch is full.
        """
        cdef Py_buffer source
        cdef svcdp_packet *slot
        self.check_writable()
        if self.count == self.capacity:
            raise IndexError(f"the batch is full: {self.capacity} packets")
        PyObject_GetBuffer(packet, &source, PyBUF_SIMPLE)
        try:
            if source.len > self.slot_size - self.headroom:
                raise ValueError(
                    f"a packet of {source.len} bytes does not fit into a slot of"
                    f" {self.slot_size} bytes with a headroom of {self.headroom}")
            slot = &self.packets[self.count]
            slot.data = (
                self.memory + <size_t>self.count * self.slot_size + self.headroom)
            slot.len = <uint32_t>source.len
            slot.headroom = <uint16_t>self.headroom
            slot.mark = mark
            slot.flags = 0
            memcpy(slot.data, source.buf, source.len)
        finally:
            PyBuffer_Release(&source)
        self.count += 1
        return self.count - 1

    def clear(self):
        """Forget the packets; the slots are free again."""
        self.check_writable()
        self.count = 0

    def __len__(self):
        return self.count

    cdef int check_writable(self) except -1:
        if self.busy:
            raise RuntimeError("the batch is being processed by another thread")
        if self.memory is NULL:
            raise ValueError("a batch that borrows its memory has a fixed set of packets")
        return 0

    cdef svcdp_packet *packet(self, Py_ssize_t index) except NULL:
        if index < 0:
            index += self.count
        if not 0 <= index < self.count:
            raise IndexError(f"no packet {index}: the batch holds {self.count}")
        return &self.packets[index]

    def __getitem__(self, Py_ssize_t index):
        """A copy of packet `index`, as it is now."""
        cdef svcdp_packet *packet = self.packet(index)
        return PyBytes_FromStringAndSize(<char *>packet.data, packet.len)

    def verdict(self, Py_ssize_t index):
        """What to do with packet `index`: a Verdict."""
        return VERDICTS[self.packet(index).verdict]

    def reason(self, Py_ssize_t index):
        """Why: a Reason."""
        return REASONS[self.packet(index).reason]

    def mark(self, Py_ssize_t index):
        """A packet's firewall mark, which a destination may have added to."""
        return self.packet(index).mark

    def answer(self, Py_ssize_t index):
        """What to send in reply to packet `index` (bytes), which was rejected: a TCP reset or an
        ICMP error. None when it was not, or must not be answered.
        """
        cdef uint8_t out[SVCDP_ANSWER_MAX]
        cdef svcdp_packet *packet = self.packet(index)
        cdef uint32_t length = 0
        if packet.verdict == SVCDP_VERDICT_REJECT:
            length = answer(packet, out, sizeof(out))
        return PyBytes_FromStringAndSize(<char *>out, length) if length else None

    def verdicts(self):
        """All verdicts, one byte a packet."""
        return self.verdict_bytes()

    cdef bytes verdict_bytes(self):
        cdef uint32_t i
        cdef bytes result = PyBytes_FromStringAndSize(NULL, self.count)
        cdef char *out = result
        for i in range(self.count):
            out[i] = self.packets[i].verdict
        return result
