# Protocol states and their timeouts: the TCP machine of IPVS (ip_vs_proto_tcp.c), which knows
# flags and directions but no sequence numbers; UDP and SCTP have one state here.
from libc.stdint cimport uint8_t, uint32_t

from svcdp._core.packet cimport *

cdef enum:
    STATE_NONE = 0
    STATE_ESTABLISHED = 1
    STATE_SYN_SENT = 2
    STATE_SYN_RECV = 3
    STATE_FIN_WAIT = 4
    STATE_TIME_WAIT = 5
    STATE_CLOSE = 6
    STATE_CLOSE_WAIT = 7
    STATE_LAST_ACK = 8
    STATE_LISTEN = 9
    STATE_SYNACK = 10
    STATE_UDP = 11
    STATE_SCTP = 12
    STATE_COUNT = 13

cdef extern from * nogil:
    """
    #ifndef SVCDP_PROTO_H
    #define SVCDP_PROTO_H
    #include <stdint.h>

    enum { NO, ES, SS, SR, FW, TW, CL, CW, LA, LI, SA };

    /* [direction: 0 from the client, 1 from the server][event][state] -> state */
    static const uint8_t svcdp_tcp_next[2][4][11] = {
        {   /*          NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA */
            /* SYN */ {SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR},
            /* FIN */ {CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES},
            /* RST */ {CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, SR},
        },
        {
            /* SYN */ {SS, ES, SS, SR, SS, SS, SS, SS, SS, LI, SR},
            /* FIN */ {TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES},
            /* RST */ {CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL},
        },
    };
    #endif
    """
    const uint8_t tcp_next "svcdp_tcp_next"[2][4][11]


cdef inline uint8_t next_state(
    uint8_t protocol, uint8_t state, uint32_t direction, uint8_t tcp_flags
) noexcept nogil:
    if protocol == PROTOCOL_UDP:
        return STATE_UDP
    if protocol == PROTOCOL_SCTP:
        return STATE_SCTP
    if tcp_flags & TCP_RST:
        return tcp_next[direction][3][state]
    if tcp_flags & TCP_SYN:
        return tcp_next[direction][0][state]
    if tcp_flags & TCP_FIN:
        return tcp_next[direction][1][state]
    if tcp_flags & TCP_ACK:
        return tcp_next[direction][2][state]
    return STATE_CLOSE


cdef inline bint is_closed(uint8_t state) noexcept nogil:
    """Both sides, or a reset, have ended the connection; it only waits to be forgotten."""
    return state == STATE_TIME_WAIT or state == STATE_CLOSE


cdef inline bint is_active(uint8_t state) noexcept nogil:
    """Whether schedulers count the connection as active. UDP never is."""
    return (
        state == STATE_ESTABLISHED or state == STATE_SYN_SENT or state == STATE_SYN_RECV
        or state == STATE_SYNACK or state == STATE_SCTP
    )
