# Persistence engines: what, beside the client's address, binds a packet to a destination.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.memory cimport load16, ntohs
from svcdp._core.packet cimport PROTOCOL_UDP, View
from svcdp._core.service cimport ENGINE_SIP
from svcdp._core.sip cimport CALL_ID_MAX, call_id

cdef enum:
    PERSISTENCE_KEY_MAX = CALL_ID_MAX


cdef inline uint32_t persistence_key(
    uint8_t engine, const uint8_t *data, const View *view, const uint8_t **key
) noexcept nogil:
    """The bytes (at most PERSISTENCE_KEY_MAX) of the packet's key, which `key` is set to and which
    lie in the packet. 0: the packet has none, and no place with a service that asks for one.
    """
    cdef uint32_t at = view.transport + 8
    cdef uint32_t end
    if engine != ENGINE_SIP or view.protocol != PROTOCOL_UDP or view.quoted or view.end < at:
        return 0
    # Read again, so bounded again: the caller's buffer may have changed meanwhile.
    end = min(view.end, view.transport + ntohs(load16(data + view.transport + 4)))
    return call_id(data + at, end - at, key) if at < end else 0
