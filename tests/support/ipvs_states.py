"""The state machines of IPVS, as a description of its behaviour gives them; not in the core's form.

A machine is a direction ("in", "out", or "in only": from the client of a connection none of whose
replies was seen), for TCP also with "secure" before it: secure_tcp.
"""

from __future__ import annotations

TCP, UDP, SCTP = 6, 17, 132

NAMES = {
    TCP: {
        "NO": "NONE", "ES": "ESTABLISHED", "SS": "SYN_SENT", "SR": "SYN_RECV", "FW": "FIN_WAIT",
        "TW": "TIME_WAIT", "CL": "CLOSE", "CW": "CLOSE_WAIT", "LA": "LAST_ACK", "LI": "LISTEN",
        "SA": "SYNACK",
    },
    UDP: {"": "UDP"},
    SCTP: {
        "NO": "SCTP_NONE", "I1": "SCTP_INIT1", "IN": "SCTP_INIT", "CS": "SCTP_COOKIE_SENT",
        "CR": "SCTP_COOKIE_REPLIED", "CW": "SCTP_COOKIE_WAIT", "CO": "SCTP_COOKIE",
        "CE": "SCTP_COOKIE_ECHOED", "ES": "SCTP_ESTABLISHED", "SS": "SCTP_SHUTDOWN_SENT",
        "SR": "SCTP_SHUTDOWN_RECEIVED", "SA": "SCTP_SHUTDOWN_ACK_SENT", "RJ": "SCTP_REJECTED",
        "CL": "SCTP_CLOSED",
    },
}  # fmt: skip
#: Seconds.
TIMEOUTS = {
    TCP: {
        "NO": 2, "ES": 900, "SS": 120, "SR": 60, "FW": 120, "TW": 120, "CL": 10, "CW": 60,
        "LA": 30, "LI": 120, "SA": 120,
    },
    UDP: {"": 300},
    SCTP: dict.fromkeys(NAMES[SCTP], 61) | {"NO": 2, "I1": 4, "ES": 900, "RJ": 4},
}  # fmt: skip
ACTIVE = {TCP: {"ES", "SS", "SR", "SA"}, UDP: set[str](), SCTP: {"ES"}}

#: By machine and event (SYN, FIN, ACK, RST, none of them): "from,from>to"; * is every state that
#: is not named; other states stay.
TCP_RULES = {
    ("in", "S"): "ES,SS>ES *>SR",
    ("in", "F"): "NO>CL ES>CW SR,FW,SA>TW",
    ("in", "A"): "NO,SR,SA>ES LA>CL",
    ("in", "R"): "NO,ES,SS,FW,TW,CW>CL SA>SR",
    ("in", ""): "*>CL",
    ("out", "S"): "NO,FW,TW,CL,CW,LA>SS SA>SR",
    ("out", "F"): "ES>FW NO,SR,CW,SA>TW",
    ("out", "A"): "NO,SR,LI,SA>ES",
    ("out", "R"): "SS>SS TW>TW *>CL",
    ("out", ""): "*>CL",
    ("in only", "S"): "ES,SS>ES *>SR",
    ("in only", "F"): "NO>CL ES>FW SR,SA>TW",
    ("in only", "A"): "NO,SR,SA>ES LA>CL",
    ("in only", "R"): "NO,ES,SS,FW,TW,CW>CL SA>CL",
    ("in only", ""): "*>CL",
}
#: What secure_tcp changes. A client's word does not make a connection ESTABLISHED.
SECURE_RULES = {
    ("in", "S"): "ES,SS>ES SA>SA *>SR",
    ("in", "F"): "NO>CL ES>CW SR,FW>TW",
    ("in", "A"): "NO>ES LA>CL",
    ("in", "R"): "NO,ES,SS,FW,TW,CW,SA>CL",
    ("out", "S"): "NO,FW,TW,CL,CW,LA>SS SR>SA",
    ("in only", "S"): "ES,SS>ES SR>SR *>SA",
}

_SCTP_STATES = tuple(NAMES[SCTP])
#: What each of these states becomes; "." stays.
_SCTP_GRID = {
    "in": {
        "data":              "ES  .  .  .  .  .  .  .  .  .  .  .  .  .",
        "init":              "I1 IN  .  .  .  .  .  .  .  .  .  . IN IN",
        "init ack":          "CW CW CW  .  . CO  .  .  .  .  .  .  .  .",
        "cookie echo":       "CR IN  . CR  .  .  .  .  .  .  .  .  .  .",
        "cookie ack":        "ES  .  .  .  .  .  . ES  .  .  .  .  .  .",
        "shutdown":          "SR  .  .  .  .  .  .  . SR  .  .  .  .  .",
        "shutdown ack":      "CL IN  .  .  .  .  .  .  . CL  . CL  .  .",
        "shutdown complete": "CL CL CL  .  .  .  .  .  .  .  . CL  .  .",
        "error":             "CL  .  .  .  .  .  . CL  .  .  .  .  .  .",
        "abort":             "CL CL CL CL CL RJ CL CL CL CL CL CL CL CL",
    },
    "out": {
        "data":              "ES  .  .  .  .  .  .  .  .  .  .  .  .  .",
        "init":              "CW CW CW CW CW CW CW CW  . CW CW CW CW CW",
        "init ack":          "CS CS CS  .  .  .  .  .  .  .  .  .  .  .",
        "cookie echo":       "CE CE CE CE CE CE CE CE  .  .  .  .  .  .",
        "cookie ack":        "ES ES ES ES ES ES ES ES  .  .  .  .  .  .",
        "shutdown":          "SS SS SS SS SS SS SS SS SS  .  .  .  .  .",
        "shutdown ack":      "SA SA SA SA SA  .  .  .  . SA SA  .  .  .",
        "shutdown complete": "CL  .  .  .  .  .  .  .  .  .  .  .  .  .",
        "error":             "CL CL CL CL CL  .  .  .  .  .  .  .  .  .",
        "abort":             "CL RJ CL CL CL CL CL CL CL CL CL CL CL CL",
    },
    "in only": {
        "data":              "ES  .  .  .  . ES  .  .  .  .  .  .  .  .",
        "init":              "I1 IN  . IN IN IN  .  .  .  .  .  . IN IN",
        "init ack":          "CE CE CE CE CE CE  .  .  .  .  .  .  .  .",
        "cookie echo":       "ES ES ES ES ES ES  .  .  .  .  .  .  .  .",
        "cookie ack":        "ES  .  . ES ES  . ES ES  .  .  .  .  .  .",
        "shutdown":          "SR  .  .  .  .  .  .  . SR  .  .  .  .  .",
        "shutdown ack":      "CL IN  .  .  .  .  .  . CL CL  . CL  .  .",
        "shutdown complete": "CL CL CL CL CL  .  .  .  .  . CL CL  .  .",
        "error":             "CL  .  .  .  .  .  .  .  .  .  .  .  .  .",
        "abort":             "CL CL CL CL CL RJ CL CL CL CL CL CL CL CL",
    },
}  # fmt: skip

TCP_EVENTS = ("S", "F", "A", "R", "")
SCTP_EVENTS = tuple(_SCTP_GRID["in"])


def tcp_next(machine: str, state: str, event: str) -> str:
    machine, secure = machine.removeprefix("secure "), machine.startswith("secure ")
    rules = TCP_RULES | SECURE_RULES if secure else TCP_RULES
    otherwise = state
    for rule in rules[machine, event].split():
        before, after = rule.split(">")
        if state in before.split(","):
            return after
        if before == "*":
            otherwise = after
    return otherwise


def sctp_next(machine: str, state: str, event: str) -> str:
    after = _SCTP_GRID[machine][event].split()[_SCTP_STATES.index(state)]
    return state if after == "." else after
