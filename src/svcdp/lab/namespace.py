"""One network namespace of a lab."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from svcdp.errors import ConfigError
from svcdp.io.netns import call_in
from svcdp.lab._ip import NETNS, ip

__all__ = ["Namespace"]

T = TypeVar("T")


class Namespace:
    """A host of a lab: made by :meth:`svcdp.lab.Lab.namespace`, gone when the lab is closed.

    ``name`` is what the lab calls it ("node"), ``full_name`` what ``ip netns`` does.
    """

    def __init__(self, name: str, full_name: str) -> None:
        self.name = name
        self.full_name = full_name
        self.processes: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        return f"<Namespace {self.full_name}>"

    @property
    def path(self) -> Path:
        """Its file, as ``setns()`` and ``nsenter --net=`` want it."""
        return NETNS / self.full_name

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 10,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here and return what it printed.

        CalledProcessError, with the program's stderr as a note, when ``check`` and it fails;
        TimeoutExpired after ``timeout`` seconds, when it was killed.
        """
        result = subprocess.run(
            self._enter(argv), capture_output=True, text=True, timeout=timeout, input=input
        )
        try:
            if check:
                result.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(result.stderr)
            raise
        return result

    def popen(self, argv: Sequence[str], **arguments: Any) -> subprocess.Popen[str]:
        """Start a program here; it is ended with the lab. ``arguments`` are those of Popen."""
        # A Ctrl-C at the terminal is for the program that has the lab.
        arguments.setdefault("start_new_session", True)
        arguments.setdefault("text", True)
        process: subprocess.Popen[str] = subprocess.Popen(self._enter(argv), **arguments)
        self.processes.append(process)
        return process

    def _enter(self, argv: Sequence[str]) -> list[str]:
        # It executes the program in its place, so the pid is the program's.
        return ["ip", "netns", "exec", self.full_name, *argv]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of ``function(*arguments)``, called here on a thread of its own.

        Sockets that it opens stay here.
        """
        return call_in(self.path, partial(function, *arguments))

    def ip(self, *commands: str) -> None:
        """Commands of ``ip``, each without the word: ``node.ip("link set lo up")``."""
        ip("-netns", self.full_name, "-batch", "-", batch="\n".join(commands))

    def sysctl(self, key: str, value: int | str) -> None:
        """Set one under ``net.``; ``/`` separates too, for interfaces with a dot."""
        if not key.startswith(("net.", "net/")):
            raise ConfigError(f"sysctl {key}: only those under net. belong to a network namespace")
        path = Path("/proc/sys", key if "/" in key else key.replace(".", "/"))
        self.call(path.write_text, str(value))

    def add_address(self, interface: str, *addresses: str) -> None:
        """Add addresses with their prefix length, such as ``192.0.2.1/24``."""
        # A new IPv6 address cannot be used before it is known to be no duplicate.
        self.ip(*(f"address add {a} dev {interface}{' nodad' * (':' in a)}" for a in addresses))
