from libc.stdint cimport int64_t, uint8_t, uint32_t

from svcdp._core.abi cimport svcdp_packet

cdef struct Worker

cdef class Core:
    # For queue loops in other modules; see engine.pyx for the contract of each.
    cdef Worker *worker_acquire(self) except NULL
    cdef void worker_release(self, Worker *worker) noexcept nogil
    cdef void process_packets(
        self, Worker *worker, svcdp_packet *packets, uint32_t count, int64_t now
    ) noexcept nogil
    cdef uint32_t build_answer(
        self, const svcdp_packet *packet, uint8_t *out, uint32_t capacity
    ) noexcept nogil
