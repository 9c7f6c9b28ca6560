"""ipvsadm's command line, as far as it changes services: a line to a command and its options."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from svcdp.errors import ConfigError

__all__ = ["CHECKSUMS", "METHODS", "SERVICES", "Command", "read_number", "read_words"]

#: Commands and options by their letters.
LETTERS = {
    "A": "add-service",
    "E": "edit-service",
    "D": "delete-service",
    "C": "clear",
    "Z": "zero",
    "R": "restore",
    "S": "save",
    "L": "list",
    "l": "list",
    "h": "help",
    "a": "add-server",
    "e": "edit-server",
    "d": "delete-server",
    "t": "tcp-service",
    "u": "udp-service",
    "f": "fwmark-service",
    "s": "scheduler",
    "p": "persistent",
    "M": "netmask",
    "b": "sched-flags",
    "o": "ops",
    "6": "ipv6",
    "r": "real-server",
    "g": "gatewaying",
    "i": "ipip",
    "m": "masquerading",
    "w": "weight",
    "x": "u-threshold",
    "y": "l-threshold",
}
SERVICES = ("tcp-service", "udp-service", "sctp-service", "fwmark-service")
METHODS = {"gatewaying": "dr", "ipip": "tunnel", "masquerading": "masq"}
CHECKSUMS = ("tun-nocsum", "tun-csum", "tun-remcsum")
SWITCHES = {"ops", "ipv6", *METHODS, *CHECKSUMS}
#: One of each, once.
EXCLUSIVE = (SERVICES, tuple(METHODS), CHECKSUMS)

_SERVICE = {*SERVICES, "ipv6"}
_SERVICE_OPTIONS = _SERVICE | {"scheduler", "persistent", "netmask", "sched-flags", "ops", "pe"}
_SERVER = _SERVICE | {"real-server"}
_SERVER_OPTIONS = (
    _SERVER
    | {"weight", "u-threshold", "l-threshold", "tun-type", "tun-port"}
    | {*METHODS, *CHECKSUMS}
)
#: What goes with each command.
COMMANDS: dict[str, set[str]] = {
    "add-service": _SERVICE_OPTIONS,
    "edit-service": _SERVICE_OPTIONS,
    "delete-service": _SERVICE,
    "clear": set(),
    "add-server": _SERVER_OPTIONS,
    "edit-server": _SERVER_OPTIONS,
    "delete-server": _SERVER,
    "set": set(),
    "zero": _SERVICE,
}
#: ipvsadm's other commands, and what to do instead.
ELSEWHERE = {
    "restore": "put the lines themselves here",
    "save": "run `svcdp ipvs save`",
    "list": "run `svcdp ipvs list`",
    "help": "run `svcdp ipvs restore --help`",
    "start-daemon": "start svcdp with --sync-role, --sync-interface and so on",
    "stop-daemon": "start svcdp with --sync-role none",
}
OPTIONS = _SERVICE_OPTIONS | _SERVER_OPTIONS

#: What ipvsadm takes for ``-p`` alone (its manual says 300).
PERSISTENT = 360
#: How many timeouts ``--set`` has.
TIMEOUTS = 3


class Command(NamedTuple):
    """A line, read. ``options`` by their long names; ``timeouts`` are those of ``--set``."""

    name: str
    options: dict[str, str]
    timeouts: list[str]


def read_words(words: Iterable[str]) -> Command:
    """ConfigError names the word that is wrong."""
    left = deque(words)
    command = ""
    timeouts: list[str] = []
    options: dict[str, str] = {}
    while left:
        word = left.popleft()
        name, value = _read_option(word, left)
        if name in COMMANDS:
            if command:
                raise ConfigError(f"{word}: there is a command already, --{command}")
            if value is not None:
                raise ConfigError(f"{word}: --{name} takes no value")
            command = name
            if name == "set":
                timeouts = [left.popleft() for _ in range(min(TIMEOUTS, len(left)))]
        elif name in OPTIONS:
            if any(each in options for each in _exclusive(name)):
                raise ConfigError(f"{word}: given twice, or in another way already")
            options[name] = _read_value(word, name, value, left)
        elif name in ELSEWHERE:
            raise ConfigError(f"{word}: changes no services: {ELSEWHERE[name]}")
        else:
            raise ConfigError(f"{word!r}: no option of what changes services")
    if not command:
        raise ConfigError("no command: expected one of -A -E -D -C -Z -a -e -d --set")
    for name in options:
        if name not in COMMANDS[command]:
            raise ConfigError(f"--{name} does not go with --{command}")
    if command == "set" and len(timeouts) < TIMEOUTS:
        raise ConfigError("--set needs three timeouts: tcp tcpfin udp")
    return Command(command, options, timeouts)


def _exclusive(name: str) -> tuple[str, ...]:
    return next((group for group in EXCLUSIVE if name in group), (name,))


def _read_option(word: str, left: deque[str]) -> tuple[str, str | None]:
    """The long name of ``-w5``, ``--weight=5`` and so on, and a value that hangs on it. Of short
    ones in one word, such as ``-At``, the others go back to what is ``left``.
    """
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, value if equals else None
    if not word.startswith("-") or word == "-":
        raise ConfigError(f"{word!r}: expected an option")
    name, rest = LETTERS.get(word[1], word), word[2:]
    if rest and (name in SWITCHES or name in COMMANDS):
        left.appendleft(f"-{rest}")
        return name, None
    return name, rest or None


def _read_value(word: str, name: str, value: str | None, left: deque[str]) -> str:
    if name in SWITCHES:
        if value is not None:
            raise ConfigError(f"{word}: --{name} takes no value")
        return ""
    if value is not None:
        return value
    if name == "persistent":  # its value may be left out
        return left.popleft() if left and not left[0].startswith("-") else str(PERSISTENT)
    if not left:
        raise ConfigError(f"{word}: its value is missing")
    return left.popleft()


def read_number(text: str, low: int, high: int, what: str) -> int:
    """ConfigError unless it is decimal digits, ``low`` to ``high``."""
    if text.isdecimal() and text.isascii() and len(text) < 20 and low <= int(text) <= high:
        return int(text)
    raise ConfigError(f"{what}: {text!r} is not a number from {low} to {high}")
