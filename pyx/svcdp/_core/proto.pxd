# The states of connections, as in IPVS (ip_vs_proto_tcp.c, ip_vs_proto_sctp.c): machines that know
# flags or chunks and directions, and no sequence number. A packet is an *event*; which *machine*
# it drives depends on its direction and on whether replies are seen at all.
from libc.stdint cimport uint8_t, uint32_t

from svcdp._core.memory cimport load16, ntohs
from svcdp._core.packet cimport *

cdef enum:
    # TCP's are numbered as in the kernel.
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
    # The only one of a protocol without connections.
    STATE_UDP = 11
    # SCTP's, in the kernel's order, where NONE is 0.
    STATE_SCTP_NONE = 12
    STATE_SCTP_INIT1 = 13
    STATE_SCTP_INIT = 14
    STATE_SCTP_COOKIE_SENT = 15
    STATE_SCTP_COOKIE_REPLIED = 16
    STATE_SCTP_COOKIE_WAIT = 17
    STATE_SCTP_COOKIE = 18
    STATE_SCTP_COOKIE_ECHOED = 19
    STATE_SCTP_ESTABLISHED = 20
    STATE_SCTP_SHUTDOWN_SENT = 21
    STATE_SCTP_SHUTDOWN_RECEIVED = 22
    STATE_SCTP_SHUTDOWN_ACK_SENT = 23
    STATE_SCTP_REJECTED = 24
    STATE_SCTP_CLOSED = 25
    STATE_COUNT = 26

    # Sets of states, a bit each
    STATES_ESTABLISHED = 1 << STATE_ESTABLISHED | 1 << STATE_SCTP_ESTABLISHED
    STATES_ACTIVE = (
        STATES_ESTABLISHED | 1 << STATE_SYN_SENT | 1 << STATE_SYN_RECV | 1 << STATE_SYNACK)
    STATES_HALF_OPEN = (
        1 << STATE_SYN_RECV | 1 << STATE_SYNACK | 1 << STATE_SCTP_INIT1 | 1 << STATE_SCTP_INIT
    )
    STATES_CLOSED = 1 << STATE_TIME_WAIT | 1 << STATE_CLOSE | 1 << STATE_SCTP_CLOSED

    # The first two are directions: FROM_CLIENT, FROM_DESTINATION.
    MACHINE_IN = 0
    MACHINE_OUT = 1
    MACHINE_IN_ONLY = 2        # from the client, and no reply was ever seen
    MACHINE_SECURE = 3         # added to one of these: secure_tcp

    EVENT_SYN = 0
    EVENT_FIN = 1
    EVENT_ACK = 2
    EVENT_RST = 3
    EVENT_NO_FLAG = 4

    EVENT_DATA = 0
    EVENT_INIT = 1
    EVENT_INIT_ACK = 2
    EVENT_COOKIE_ECHO = 3
    EVENT_COOKIE_ACK = 4
    EVENT_SHUTDOWN = 5
    EVENT_SHUTDOWN_ACK = 6
    EVENT_SHUTDOWN_COMPLETE = 7
    EVENT_ERROR = 8
    EVENT_ABORT = 9

    EVENT_NONE = 255           # changes no state

    # SCTP chunk types (RFC 9260, 3.2)
    CHUNK_INIT = 1
    CHUNK_INIT_ACK = 2
    CHUNK_ABORT = 6
    CHUNK_SHUTDOWN = 7
    CHUNK_SHUTDOWN_ACK = 8
    CHUNK_ERROR = 9
    CHUNK_COOKIE_ECHO = 10
    CHUNK_COOKIE_ACK = 11
    CHUNK_SHUTDOWN_COMPLETE = 14
    CHUNK_NONE = 256           # not even the first one's header is there

    SCTP_HEADER = 12

cdef extern from * nogil:
    """
    #ifndef SVCDP_PROTO_H
    #define SVCDP_PROTO_H
    #include <stdint.h>

    enum { NO, ES, SS, SR, FW, TW, CL, CW, LA, LI, SA };

    /* [machine][event][state] -> state */
    static const uint8_t svcdp_tcp_next[6][5][11] = {
        {   /* in    NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA */
            /* SYN */ {SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR},
            /* FIN */ {CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES},
            /* RST */ {CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, SR},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
        {   /* out   NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA */
            /* SYN */ {SS, ES, SS, SR, SS, SS, SS, SS, SS, LI, SR},
            /* FIN */ {TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES},
            /* RST */ {CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
        {   /* only  NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA */
            /* SYN */ {SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR},
            /* FIN */ {CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES},
            /* RST */ {CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
        {   /* in    NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA     secure_tcp */
            /* SYN */ {SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SA},
            /* FIN */ {CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, SA},
            /* ACK */ {ES, ES, SS, SR, FW, TW, CL, CW, CL, LI, SA},
            /* RST */ {CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
        {   /* out   NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA     secure_tcp */
            /* SYN */ {SS, ES, SS, SA, SS, SS, SS, SS, SS, LI, SA},
            /* FIN */ {TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES},
            /* RST */ {CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
        {   /* only  NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA     secure_tcp */
            /* SYN */ {SA, ES, ES, SR, SA, SA, SA, SA, SA, SA, SA},
            /* FIN */ {CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW},
            /* ACK */ {ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES},
            /* RST */ {CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL},
            /*  -  */ {CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL},
        },
    };

    /* SCTP keeps most states through most events, so here is what changes: the first rule whose
       `from` has the state. A state is a bit; bit 0 is NONE, then in the kernel's order. */
    static inline unsigned svcdp_sctp_next(unsigned machine, unsigned event, unsigned state)
    {
        enum {
            NONE = 1, INIT1 = 2, INIT = 4, C_SENT = 8, C_REPLIED = 16, C_WAIT = 32, COOKIE = 64,
            C_ECHOED = 128, ESTAB = 256, S_SENT = 512, S_RECV = 1024, S_ACK = 2048,
            REJECTED = 4096, CLOSED = 8192, ANY = 16383,
            START = NONE | INIT1 | INIT,
            OPENING = START | C_SENT | C_REPLIED | C_WAIT | COOKIE | C_ECHOED
        };
        static const struct { uint16_t from, to; } rules[3][10][3] = {
            {   /* in */
                /* data */          {{NONE, ESTAB}},
                /* init */          {{NONE, INIT1}, {INIT1 | REJECTED | CLOSED, INIT}},
                /* init ack */      {{START, C_WAIT}, {C_WAIT, COOKIE}},
                /* cookie echo */   {{NONE | C_SENT, C_REPLIED}, {INIT1, INIT}},
                /* cookie ack */    {{NONE | C_ECHOED, ESTAB}},
                /* shutdown */      {{NONE | ESTAB, S_RECV}},
                /* shutdown ack */  {{NONE | S_SENT | S_ACK, CLOSED}, {INIT1, INIT}},
                /* s. complete */   {{START | S_ACK, CLOSED}},
                /* error */         {{NONE | C_ECHOED, CLOSED}},
                /* abort */         {{C_WAIT, REJECTED}, {ANY, CLOSED}},
            },
            {   /* out */
                /* data */          {{NONE, ESTAB}},
                /* init */          {{ANY & ~ESTAB, C_WAIT}},
                /* init ack */      {{START, C_SENT}},
                /* cookie echo */   {{OPENING, C_ECHOED}},
                /* cookie ack */    {{OPENING, ESTAB}},
                /* shutdown */      {{OPENING | ESTAB, S_SENT}},
                /* shutdown ack */  {{START | C_SENT | C_REPLIED | S_SENT | S_RECV, S_ACK}},
                /* s. complete */   {{NONE, CLOSED}},
                /* error */         {{START | C_SENT | C_REPLIED, CLOSED}},
                /* abort */         {{INIT1, REJECTED}, {ANY, CLOSED}},
            },
            {   /* in only */
                /* data */          {{NONE | C_WAIT, ESTAB}},
                /* init */          {{NONE, INIT1},
                                     {INIT1 | C_SENT | C_REPLIED | C_WAIT | REJECTED | CLOSED,
                                      INIT}},
                /* init ack */      {{OPENING & ~(COOKIE | C_ECHOED), C_ECHOED}},
                /* cookie echo */   {{OPENING & ~(COOKIE | C_ECHOED), ESTAB}},
                /* cookie ack */    {{NONE | C_SENT | C_REPLIED | COOKIE | C_ECHOED, ESTAB}},
                /* shutdown */      {{NONE | ESTAB, S_RECV}},
                /* shutdown ack */  {{NONE | ESTAB | S_SENT | S_ACK, CLOSED}, {INIT1, INIT}},
                /* s. complete */   {{START | C_SENT | C_REPLIED | S_RECV | S_ACK, CLOSED}},
                /* error */         {{NONE, CLOSED}},
                /* abort */         {{C_WAIT, REJECTED}, {ANY, CLOSED}},
            },
        };
        unsigned i;
        for (i = 0; rules[machine][event][i].from; i++) {
            if (rules[machine][event][i].from >> state & 1) {
                return (unsigned)__builtin_ctz(rules[machine][event][i].to);
            }
        }
        return state;
    }
    #endif
    """
    const uint8_t tcp_next "svcdp_tcp_next"[6][5][11]
    uint32_t sctp_next "svcdp_sctp_next"(uint32_t machine, uint32_t event, uint32_t state)


cdef inline uint32_t machine_of(
    uint32_t direction, bint in_only, bint secure
) noexcept nogil:
    """The machine that a packet of this direction drives. `in_only`: the connection's replies do
    not come this way, and none was seen."""
    cdef uint32_t machine = direction
    if in_only and direction == MACHINE_IN:
        machine = MACHINE_IN_ONLY
    return machine + MACHINE_SECURE if secure else machine


cdef inline uint32_t first_chunk(const uint8_t *data, const View *view) noexcept nogil:
    """The type of the SCTP packet's first chunk, or CHUNK_NONE."""
    if view.end - view.transport < SCTP_HEADER + 4:
        return CHUNK_NONE
    return data[view.transport + SCTP_HEADER]


cdef inline uint8_t sctp_event(const uint8_t *data, const View *view) noexcept nogil:
    cdef uint32_t chunk = first_chunk(data, view)
    cdef uint32_t second, length
    if chunk == CHUNK_NONE:
        return EVENT_NONE
    if chunk == CHUNK_COOKIE_ECHO or chunk == CHUNK_COOKIE_ACK:
        # An ABORT may share the packet, and is then what the sender means.
        length = ntohs(load16(data + view.transport + SCTP_HEADER + 2))
        second = view.transport + SCTP_HEADER + ((length + 3) & ~<uint32_t>3)
        if length >= 4 and second + 4 <= view.end and data[second] == CHUNK_ABORT:
            return EVENT_ABORT
        return EVENT_COOKIE_ECHO if chunk == CHUNK_COOKIE_ECHO else EVENT_COOKIE_ACK
    if chunk == CHUNK_INIT:
        return EVENT_INIT
    if chunk == CHUNK_INIT_ACK:
        return EVENT_INIT_ACK
    if chunk == CHUNK_SHUTDOWN:
        return EVENT_SHUTDOWN
    if chunk == CHUNK_SHUTDOWN_ACK:
        return EVENT_SHUTDOWN_ACK
    if chunk == CHUNK_SHUTDOWN_COMPLETE:
        return EVENT_SHUTDOWN_COMPLETE
    if chunk == CHUNK_ERROR:
        return EVENT_ERROR
    if chunk == CHUNK_ABORT:
        return EVENT_ABORT
    return EVENT_DATA


cdef inline uint8_t event_of(const uint8_t *data, const View *view) noexcept nogil:
    """What the packet means to its protocol's machine. An ICMP error means nothing to it."""
    if view.quoted:
        return EVENT_NONE
    if view.protocol == PROTOCOL_TCP:
        if view.tcp_flags & TCP_RST:
            return EVENT_RST
        if view.tcp_flags & TCP_SYN:
            return EVENT_SYN
        if view.tcp_flags & TCP_FIN:
            return EVENT_FIN
        return EVENT_ACK if view.tcp_flags & TCP_ACK else EVENT_NO_FLAG
    if view.protocol == PROTOCOL_SCTP:
        return sctp_event(data, view)
    return EVENT_NONE


cdef inline bint begins_connection(
    const uint8_t *data, const View *view, bint sloppy
) noexcept nogil:
    """Whether a packet of no known connection may be scheduled. `sloppy`: sloppy_tcp of a TCP
    packet, sloppy_sctp of an SCTP one."""
    cdef uint32_t chunk
    if view.protocol == PROTOCOL_TCP:
        return view.tcp_flags & (TCP_RST if sloppy else TCP_SYN | TCP_RST) == (
            0 if sloppy else TCP_SYN)
    if view.protocol == PROTOCOL_SCTP:
        chunk = first_chunk(data, view)
        return chunk == CHUNK_INIT or (sloppy and chunk != CHUNK_NONE and chunk != CHUNK_ABORT)
    return True


cdef inline bint reopens(const uint8_t *data, const View *view) noexcept nogil:
    """Whether a client's packet may open a new connection where one is known (RFC 9293, 3.6.1): as
    in IPVS by its SYN, whatever else is set.
    """
    if view.protocol == PROTOCOL_SCTP:
        return first_chunk(data, view) == CHUNK_INIT
    return view.tcp_flags & TCP_SYN


cdef inline uint8_t first_state(uint8_t protocol) noexcept nogil:
    """The state before a connection's first packet."""
    if protocol == PROTOCOL_UDP:
        return STATE_UDP
    return STATE_SCTP_NONE if protocol == PROTOCOL_SCTP else STATE_NONE


cdef inline uint8_t next_state(
    uint8_t protocol, uint8_t state, uint32_t machine, uint8_t event
) noexcept nogil:
    """`state` is one of the protocol's."""
    if event == EVENT_NONE:
        return state
    if protocol == PROTOCOL_TCP:
        return tcp_next[machine][event][state]
    # secure_tcp changes nothing here.
    return <uint8_t>(
        STATE_SCTP_NONE
        + sctp_next(machine % MACHINE_SECURE, event, state - STATE_SCTP_NONE))


cdef inline bint is_closed(uint8_t state) noexcept nogil:
    """Both sides, or a reset, have ended the connection; it only waits to be forgotten."""
    return STATES_CLOSED >> state & 1


cdef inline bint is_established(uint8_t state) noexcept nogil:
    return STATES_ESTABLISHED >> state & 1


cdef inline bint is_half_open(uint8_t state) noexcept nogil:
    """Only one side has been heard of."""
    return STATES_HALF_OPEN >> state & 1


cdef inline bint is_active(uint8_t state) noexcept nogil:
    """Whether schedulers count the connection as active. UDP never is."""
    return STATES_ACTIVE >> state & 1
