"""The node daemon as a child process: ``svcdp run`` in the node's namespace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svcdp.errors import SvcdpError
from svcdp.node.client import AdminClient

__all__ = ["RunningDaemon", "running_daemon"]

START_TIME = 20.0  # seconds
STOP_TIME = 15.0

Popen = Callable[..., "subprocess.Popen[str]"]


class RunningDaemon:
    """A daemon that said that it is ready."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def get(self, what: str, **request: Any) -> list[dict[str, Any]]:
        """What the admin socket answers."""
        with AdminClient(str(self.folder / "run" / "admin.sock")) as client:
            return list(client.get(what, **request))

    def stop(self) -> int:
        """Ask it to end; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIME)


@contextmanager
def running_daemon(popen: Popen, folder: Path, *arguments: str) -> Iterator[RunningDaemon]:
    """Start it on ``folder/manifests``, unless arguments say what else to serve, with its log in
    ``folder/log``; wait until it is ready.
    """
    notifications = str(folder / f"notify-{time.monotonic_ns()}.sock")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        open(folder / "log", "w") as log,
    ):
        ready.bind(notifications)
        ready.settimeout(0.1)
        command = [sys.executable, "-m", "svcdp", "run", "--run-dir", str(folder / "run")]
        if not {"--ipvs", "--kubeconfig"}.intersection(arguments):
            command += ["-f", str(folder / "manifests")]
        command += arguments
        process = popen(command, stderr=log, env={**os.environ, "NOTIFY_SOCKET": notifications})
        try:
            _wait_ready(process, ready, folder / "log")
            yield RunningDaemon(process, folder)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_TIME)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_ready(process: subprocess.Popen[str], ready: socket.socket, log: Path) -> None:
    deadline = time.monotonic() + START_TIME
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if b"READY=1" in ready.recv(4096):
                return
        except TimeoutError:
            pass
    last = (log.read_text().splitlines() or ["it said nothing"])[-1]
    raise SvcdpError(f"the daemon did not start: {last.removeprefix('error: ')}")
