"""How long connections live without a packet: of all services, and of those that have their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from svcdp._core.engine import STATES, Core
from svcdp.errors import CapacityError, ConfigError
from svcdp.types import ServiceSpec

__all__ = ["TIMEOUTS"]

#: Sets of timeouts that services and connections can have at a time.
CLASSES = 256

#: Seconds; the core counts ns.
SHORTEST = 1e-9

#: Seconds without a packet after which a connection in this state is forgotten (ip_vs_proto_*.c).
TIMEOUTS: Mapping[str, float] = {
    "none": 2,
    "established": 900,
    "syn_sent": 120,
    "syn_recv": 60,
    "fin_wait": 120,
    "time_wait": 120,
    "close": 10,
    "close_wait": 60,
    "last_ack": 30,
    "listen": 120,
    "synack": 120,
    "udp": 300,
    "sctp_none": 2,
    "sctp_init1": 4,
    "sctp_init": 61,
    "sctp_cookie_sent": 61,
    "sctp_cookie_replied": 61,
    "sctp_cookie_wait": 61,
    "sctp_cookie": 61,
    "sctp_cookie_echoed": 61,
    "sctp_established": 900,
    "sctp_shutdown_sent": 61,
    "sctp_shutdown_received": 61,
    "sctp_shutdown_ack_sent": 61,
    "sctp_rejected": 4,
    "sctp_closed": 61,
}


def check_timeouts(timeouts: Mapping[str, float], what: str = "timeouts") -> dict[str, float]:
    """ConfigError unless these are seconds by state."""
    unknown = sorted(str(state) for state in timeouts if state not in TIMEOUTS)
    if unknown:
        raise ConfigError(f"{what}: {', '.join(unknown)} unknown; there are {', '.join(TIMEOUTS)}")
    for seconds in timeouts.values():
        if not isinstance(seconds, int | float) or not SHORTEST <= seconds < 1 << 31:
            raise ConfigError(f"{what} must be 1 ns to 2^31 seconds, not {seconds!r}")
    return dict(timeouts)


def timeout_list(timeouts: Mapping[str, float]) -> list[int]:
    """In ns, in the core's order of states."""
    return [int(timeouts[state.lower()] * 1e9) for state in STATES]


def own_timeouts(spec: ServiceSpec) -> tuple[tuple[str, float], ...]:
    """The timeouts that a service has of its own, in one order. ConfigError."""
    try:
        timeouts = dict(spec.timeouts)
    except (TypeError, ValueError):
        raise ConfigError(f"{spec}: timeouts must be pairs of a state and seconds") from None
    return tuple(sorted(check_timeouts(timeouts, f"{spec}: timeouts").items()))


class TimeoutClasses:
    """Sets of timeouts by the numbers that the core knows them by; 0 is that of all services
    without their own.
    """

    def __init__(self, timeouts: Mapping[str, float]) -> None:
        self._timeouts = dict(timeouts)
        self._numbers: dict[tuple[tuple[str, float], ...], int] = {(): 0}

    @property
    def timeouts(self) -> dict[str, float]:
        """Those of all."""
        return dict(self._timeouts)

    def configure(self, core: Core, timeouts: Mapping[str, float]) -> None:
        """Change those of all; what a service has of its own stays."""
        self._timeouts |= timeouts
        for own, number in self._numbers.items():
            core.set_timeouts(number, timeout_list({**self._timeouts, **dict(own)}))

    def numbers_of(self, core: Core, specs: Iterable[ServiceSpec]) -> list[int]:
        """The number of each service's set. Numbers that nobody uses are given again when there
        are no others. ConfigError, CapacityError.
        """
        wanted = [own_timeouts(spec) for spec in specs]
        new = [own for own in dict.fromkeys(wanted) if own not in self._numbers]
        if len(self._numbers) + len(new) > CLASSES:
            used = {0, *core.timeouts_in_use()}
            self._numbers = {
                own: number
                for own, number in self._numbers.items()
                if number in used or own in wanted
            }
            if len(self._numbers) + len(new) > CLASSES:
                raise CapacityError(f"more than {CLASSES} sets of timeouts at a time")
        free = sorted(set(range(CLASSES)).difference(self._numbers.values()))
        for own, number in zip(new, free, strict=False):
            core.set_timeouts(number, timeout_list({**self._timeouts, **dict(own)}))
            self._numbers[own] = number
        return [self._numbers[own] for own in wanted]
