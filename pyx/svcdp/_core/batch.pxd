from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint8_t, uint32_t

from svcdp._core.abi cimport svcdp_packet


cdef class PacketBatch:
    cdef svcdp_packet *packets     # `count` of them are in use
    cdef uint8_t *memory           # slots of `slot_size` bytes; NULL when borrowed
    cdef uint32_t count
    cdef bint busy                 # the core has it, without the GIL
    cdef readonly uint32_t capacity
    cdef readonly uint32_t slot_size
    cdef readonly uint32_t headroom
    cdef Py_buffer borrowed
    cdef bint is_borrowed

    cdef int allocate(self, uint32_t capacity, uint32_t slot_size, uint32_t headroom) except -1
    cdef int check_writable(self) except -1
    cdef bytes verdict_bytes(self)
    cdef svcdp_packet *packet(self, Py_ssize_t index) except NULL
