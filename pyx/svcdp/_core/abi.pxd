# The C declarations of include/svcdp/abi.h, and nothing else.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from "svcdp/abi.h" nogil:
    enum:
        SVCDP_VERDICT_PASS
        SVCDP_VERDICT_FORWARD
        SVCDP_VERDICT_DROP
        SVCDP_VERDICT_REJECT
        SVCDP_VERDICT_COUNT

    enum:
        SVCDP_REASON_NO_SERVICE
        SVCDP_REASON_ESTABLISHED
        SVCDP_REASON_REPLY
        SVCDP_REASON_NEW
        SVCDP_REASON_RELATED
        SVCDP_REASON_NO_DESTINATION
        SVCDP_REASON_SOURCE_RANGE
        SVCDP_REASON_NO_CONNECTION
        SVCDP_REASON_TABLE_FULL
        SVCDP_REASON_NO_PORT
        SVCDP_REASON_NO_MASQUERADE
        SVCDP_REASON_TRUNCATED
        SVCDP_REASON_MALFORMED
        SVCDP_REASON_FRAGMENT
        SVCDP_REASON_PROTOCOL
        SVCDP_REASON_NOT_IP
        SVCDP_REASON_TIME_EXCEEDED
        SVCDP_REASON_TOO_BIG
        SVCDP_REASON_OVERLOAD
        SVCDP_REASON_NO_CALL_ID
        SVCDP_REASON_DESTINATION_GONE
        SVCDP_REASON_BYPASS
        SVCDP_REASON_NO_HEADROOM
        SVCDP_REASON_CHECKSUM
        SVCDP_REASON_COUNT

    enum:
        SVCDP_ANSWER_DEFAULT
        SVCDP_ANSWER_UNREACHABLE
        SVCDP_ANSWER_TIME_EXCEEDED
        SVCDP_ANSWER_TOO_BIG

    enum:
        SVCDP_PACKET_CSUM_PARTIAL
        SVCDP_PACKET_CHANGED
        SVCDP_PACKET_NEXT_HOP

    enum:
        SVCDP_ANSWER_MAX

    ctypedef struct svcdp_packet "struct svcdp_packet":
        uint8_t *data
        uint32_t len
        uint32_t mark
        uint16_t headroom
        uint16_t flags
        uint8_t verdict
        uint8_t reason
        uint16_t answer
        uint32_t destination
        uint32_t answer_mtu
