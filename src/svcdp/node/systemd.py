"""Tell systemd how we are (``sd_notify(3)``, ``Type=notify``). Without systemd: nothing happens."""

from __future__ import annotations

import os
import socket

__all__ = ["notify", "watchdog_interval"]


def notify(state: str) -> None:
    """Send ``state``, for example ``"READY=1"``. Never raises: nobody depends on it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), address)
    except OSError:
        pass


def watchdog_interval() -> float | None:
    """Seconds between ``WATCHDOG=1`` messages, half of what systemd allows. None: not wanted."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    owner = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not limit.isdigit() or owner != str(os.getpid()):
        return None
    return int(limit) / 2_000_000
