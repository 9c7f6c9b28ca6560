"""Network namespaces that are gone afterwards, whatever happens."""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from svcdp.errors import ClosedError, ConfigError, MissingCapability
from svcdp.lab._ip import NETNS, ip, remove_namespaces
from svcdp.lab.namespace import Namespace

__all__ = ["Lab", "wait_until"]

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERFACE_NAME_MAX = 15  # IFNAMSIZ less the 0 at its end

_numbers = itertools.count()


class Lab:
    """A context manager that makes network namespaces and removes them, with what runs in them.

    ::

        with Lab() as lab:
            left, right = lab.namespace("left"), lab.namespace("right")
            lab.link(left, right)
            left.add_address("right", "192.0.2.1/24")    # an interface is named after its peer
            right.add_address("left", "192.0.2.2/24")
            left.run(["ping", "-c1", "192.0.2.2"])

    Namespaces are called svcdp-PID-NUMBER-NAME. They are removed at the end of the block, also
    after an exception, SIGINT and SIGTERM: in the block these raise KeyboardInterrupt and
    SystemExit. What a killed program left is found by :meth:`stale` and removed by
    :meth:`remove_stale`.
    """

    def __init__(self) -> None:
        self.prefix = f"svcdp-{os.getpid()}-{next(_numbers)}-"
        self.namespaces: dict[str, Namespace] = {}
        self._handlers: dict[signal.Signals, Any] | None = None
        self._open = False

    def __enter__(self) -> Self:
        if os.geteuid():
            raise MissingCapability(errno.EPERM, "a lab makes network namespaces: run as root")
        self._open = True
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _interrupt) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that the lab started and remove its namespaces."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        if self._handlers is None:
            self._remove()
            return
        for number in SIGNALS:  # not now: the removal would be half done
            signal.signal(number, signal.SIG_IGN)
        try:
            self._remove()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _remove(self) -> None:
        processes = [process for space in self.namespaces.values() for process in space.processes]
        running = [process.pid for process in processes if process.poll() is None]
        remove_namespaces(_names(self.prefix), running)
        for process in processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with suppress(BrokenPipeError):  # what was not yet written to its stdin
                        stream.close()
        self.namespaces.clear()

    def namespace(self, name: str) -> Namespace:
        """A new namespace, its loopback up. In it, IPv6 addresses can be used at once."""
        if not self._open:
            raise ClosedError("the lab is closed: use it in `with Lab() as lab:`")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or len(name) > INTERFACE_NAME_MAX:
            raise ConfigError(f"namespace {name!r}: not 1 to {INTERFACE_NAME_MAX} of a-z, 0-9, -")
        if name in self.namespaces:
            raise ConfigError(f"namespace {name!r}: the lab has it already")
        space = Namespace(name, self.prefix + name)
        ip("netns", "add", space.full_name)
        self.namespaces[name] = space
        # Both: detection of duplicates, here of link-local addresses, is on when either is 1.
        for scope in ("all", "default"):
            space.sysctl(f"net.ipv6.conf.{scope}.accept_dad", 0)
        space.ip("link set lo up")
        return space

    def link(self, one: Namespace, other: Namespace) -> None:
        """A cable (a veth pair) between two namespaces. Each end is named after the other."""
        one.ip(
            f"link add name {other.name} type veth peer name {one.name} netns {other.full_name}",
            f"link set dev {other.name} up",
        )
        other.ip(f"link set dev {one.name} up")

    @staticmethod
    def stale() -> list[str]:
        """The namespaces (as ``ip netns`` names them) of labs whose program is gone."""
        return [
            name
            for name in _names("svcdp-")
            if (match := re.match(r"svcdp-(\d+)-\d+-", name))
            and not Path("/proc", match[1]).exists()
        ]

    @staticmethod
    def remove_stale() -> list[str]:
        """Remove what :meth:`stale` finds, with the processes in it; return the names."""
        names = Lab.stale()
        remove_namespaces(names)
        return names


def wait_until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """Ask until the answer is true, and return it. TimeoutError, naming ``what``, after
    ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(0.01)
    return answer


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as a shell would report it


def _names(prefix: str) -> list[str]:
    return sorted(path.name for path in NETNS.glob(prefix + "*"))
