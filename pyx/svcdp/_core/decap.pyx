"""Taking packets out of tunnels: what a real server does with what a director sent it."""

from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.decap cimport *
from svcdp._core.memory cimport htons
from svcdp._core.packet cimport View
from svcdp._core.xmit cimport complete_checksum


cdef bytes taken_out(const uint8_t *data, const Inside *inside):
    cdef uint32_t length = inside.end - inside.start
    cdef bytes result = PyBytes_FromStringAndSize(<const char *>data + inside.start, length)
    # Nobody else has seen this object yet.
    cdef uint8_t *packet = <uint8_t *>PyBytes_AS_STRING(result)
    cdef View view
    set_ecn(packet, inside.ecn)
    if parse_offloaded(packet, length, &view):
        complete_checksum(packet, &view)
    return result


def decapsulate(packet, uint16_t port=6080):
    """The packet (bytes) inside of a tunnel packet, or None when there is none or it is damaged.

    `packet`: a buffer with an IPv4 or IPv6 packet, whole, of protocol 4 or 41 (IP in IP), GRE
    without key and sequence number, or UDP to `port` (GUE version 0). Lengths, and checksums
    where there are some, are checked. The ECN field comes out as RFC 6040 says: None also for a
    packet that met congestion and cannot be told so.
    """
    cdef Py_buffer view
    cdef Inside inside
    PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
    try:
        if not find_tunnelled(
            <const uint8_t *>view.buf, <uint32_t>min(view.len, <Py_ssize_t>0xffffffff),
            htons(port), &inside
        ):
            return None
        return taken_out(<const uint8_t *>view.buf, &inside)
    finally:
        PyBuffer_Release(&view)


def decapsulate_payload(payload, uint8_t protocol, uint8_t traffic_class=0):
    """As decapsulate(), of what a socket gives: the payload of protocol 4, 41 or 47 (GRE), or of
    UDP (17: GUE). `traffic_class` is the outer header's type of service.
    """
    cdef Py_buffer view
    cdef Inside inside
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        if not find_inside(
            <const uint8_t *>view.buf, 0, <uint32_t>min(view.len, <Py_ssize_t>0xffffffff),
            protocol, traffic_class, &inside
        ):
            return None
        return taken_out(<const uint8_t *>view.buf, &inside)
    finally:
        PyBuffer_Release(&view)
