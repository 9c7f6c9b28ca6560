"""The program and its processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAM = Path(__file__).parents[3] / "build" / "cluster" / "apiserver"

#: Of every start, stop and answer, seconds; never reached unless something is broken.
DEADLINE = 60.0
POLL = 0.02


class Process:
    """One of the program's servers; its log is ``NAME.log`` in the folder."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self._name = name
        self._log = folder / f"{name}.log"
        # Also a test run that is killed leaves no server behind.
        command = ["setpriv", "--pdeathsig", "KILL", str(PROGRAM), name, *arguments]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises `RuntimeError` with the end of the log if the server ends instead."""
        deadline = time.monotonic() + DEADLINE
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace")
                raise RuntimeError(f"{self._name} did not start:\n{log[-4000:]}")
            time.sleep(POLL)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Returns when the server is gone."""
        self._process.send_signal(number)
        try:
            self._process.wait(DEADLINE)
        finally:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A TCP port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
