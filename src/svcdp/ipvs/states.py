"""Connections in the kernel's numbers: those of the sync protocol and of saved connections.

Source: include/net/ip_vs.h.
"""

from __future__ import annotations

from svcdp._core.engine import STATES
from svcdp.errors import ConfigError, StateError
from svcdp.status import ONE_PACKET, TEMPLATE, ConnectionState
from svcdp.types import Protocol

__all__ = [
    "family_of",
    "is_synchronised",
    "protocol_name",
    "protocol_number",
    "state_name",
    "state_number",
]

PROTOCOLS = {protocol.name.lower(): int(protocol) for protocol in Protocol}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
#: Names of a protocol's states, by the kernel's numbers.
PROTOCOL_STATES = {"tcp": STATES[:11], "udp": STATES[11:12], "sctp": STATES[12:26]}
TEMPLATE_STATES = ("NONE", "ASSURED")

#: States in which a director tells others of a connection; of UDP all.
SYNCHRONISED = {
    "tcp": {"ESTABLISHED", "FIN_WAIT", "CLOSE", "CLOSE_WAIT", "TIME_WAIT"},
    "udp": {"UDP"},
    "sctp": {
        "SCTP_ESTABLISHED",
        "SCTP_SHUTDOWN_SENT",
        "SCTP_SHUTDOWN_RECEIVED",
        "SCTP_SHUTDOWN_ACK_SENT",
        "SCTP_CLOSED",
    },
}


def family_of(state: ConnectionState) -> int:
    """4 or 6: the client's."""
    return 6 if ":" in state.client else 4


def protocol_number(name: str) -> int:
    """Of IP; 0 for templates of fwmark services. ConfigError."""
    try:
        return PROTOCOLS[name]
    except KeyError:
        raise ConfigError(f"no protocol {name!r} of connections") from None


def protocol_name(number: int) -> str:
    """StateError when connections have no such protocol."""
    try:
        return PROTOCOL_NAMES[number]
    except KeyError:
        raise StateError(f"no IP protocol {number} of connections") from None


def state_number(state: ConnectionState) -> int:
    """ConfigError when its protocol has no such state."""
    try:
        return _states(state.protocol, state.flags).index(state.state)
    except ValueError:
        raise ConfigError(f"{state.protocol} has no state {state.state!r}") from None


def state_name(protocol: str, flags: int, number: int) -> str:
    """StateError when the protocol has no such state."""
    names = _states(protocol, flags)
    if number >= len(names):
        raise StateError(f"{protocol} has no state {number}")
    return names[number]


def _states(protocol: str, flags: int) -> tuple[str, ...]:
    return TEMPLATE_STATES if flags & TEMPLATE else PROTOCOL_STATES.get(protocol, ())


def is_synchronised(state: ConnectionState) -> bool:
    """Whether other directors are told of a connection in this state."""
    if state.flags & ONE_PACKET:
        return False
    return bool(state.flags & TEMPLATE) or state.state in SYNCHRONISED.get(state.protocol, ())
