"""The ``ip`` command of iproute2."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from svcdp.errors import FeatureUnavailable, MissingCapability, PlatformError

#: Where ``ip`` names network namespaces.
NETNS = Path("/run/netns")

TIMEOUT = 10.0  # seconds that one call may take
GRACE = 2.0  # seconds from SIGTERM to SIGKILL


def ip(*arguments: str, batch: str = "") -> str:
    """Run ``ip`` and return what it printed. ``batch``: commands, one a line, for ``-batch -``."""
    argv = ["ip", *arguments]
    try:
        result = subprocess.run(argv, input=batch, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise FeatureUnavailable(
            errno.ENOENT, "a lab needs the command ip: install iproute2"
        ) from None
    except subprocess.TimeoutExpired:
        message = f"{' '.join(argv)} did not end within {TIMEOUT:g} s"
        raise PlatformError(errno.ETIMEDOUT, message) from None
    if result.returncode:
        message = f"{' '.join(argv)} failed: {result.stderr.strip()}"
        if os.strerror(errno.EPERM) in message:
            raise MissingCapability(
                errno.EPERM, f"{message}; a lab needs CAP_SYS_ADMIN and CAP_NET_ADMIN: run as root"
            )
        raise PlatformError(errno.EIO, message)
    return result.stdout


def remove_namespaces(names: Iterable[str], processes: Iterable[int] = ()) -> None:
    """Remove namespaces, once ``processes`` (pids) and all that run in the namespaces ended."""
    names = list(names)
    inside = [ip("netns", "pids", name).split() for name in names]
    _end({*processes, *map(int, chain.from_iterable(inside))} - {os.getpid()})
    with ExitStack() as stack:  # one that cannot be removed does not keep the others
        for name in names:
            stack.callback(ip, "netns", "delete", name)


def _end(pids: Iterable[int]) -> None:
    """SIGTERM, and SIGKILL for those that are still there after a grace time."""
    deadline = time.monotonic() + GRACE
    pids = [pid for pid in pids if _signal(pid, signal.SIGTERM)]
    while (pids := [pid for pid in pids if _running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in pids:
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _running(pid: int) -> bool:
    """A zombie does not run: whoever started it has yet to wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
